"""How the code reads, in numbers: printed by `make check`, beside those of the code before it had
rooms. Nothing fails.

python tests/measures.py [FOLDER]      the package, src/distill unless a folder is given
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "distill"
COLUMNS, FILE, METHOD_FILE = 100, 400, 180
# The same of commit c21297f: all methods, and most modules in one folder.
BEFORE = {
    "files": 105,
    "lines": 11_240,
    "% of lines over 100 columns": 12.7,
    "tuple assignments in 1,000 lines": 18.9,
    "assignment expressions in 1,000 lines": 6.2,
    "functions": 869,
    "median of a function's lines": 6,
    "90th percentile": 18,
    "longest function": 40,
    "files over 400 lines": 0,
    "method files over 180 lines": 0,
    "modules in the top folder": 36,
}


def functions(tree: ast.AST) -> Iterator[int]:
    """Lines of each function, its docstring included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def tuples(tree: ast.AST) -> int:
    """Assignments of several values to several names at once: `a, b = 1, 2`."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
    return sum(isinstance(node.value, ast.Tuple) for node in found if several(node))


def several(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def measured(package: Path) -> dict[str, float]:
    """Name -> number, of all files of the package."""
    files = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in files.items()}
    lines = [line for text in files.values() for line in text.splitlines()]
    lengths = sorted(length for tree in trees.values() for length in functions(tree))
    walrus = sum(
        isinstance(node, ast.NamedExpr) for tree in trees.values() for node in ast.walk(tree)
    )
    long = {path: len(text.splitlines()) for path, text in files.items()}
    methods = [n for p, n in long.items() if p.parent.name == "methods" and p.stem != "base"]
    thousands = len(lines) / 1000
    return {
        "files": len(files),
        "lines": len(lines),
        f"% of lines over {COLUMNS} columns": 100
        * sum(len(x) > COLUMNS for x in lines)
        / len(lines),
        "tuple assignments in 1,000 lines": sum(map(tuples, trees.values())) / thousands,
        "assignment expressions in 1,000 lines": walrus / thousands,
        "functions": len(lengths),
        "median of a function's lines": statistics.median(lengths),
        "90th percentile": lengths[int(0.9 * len(lengths))],
        "longest function": lengths[-1],
        f"files over {FILE} lines": sum(count > FILE for count in long.values()),
        f"method files over {METHOD_FILE} lines": sum(count > METHOD_FILE for count in methods),
        "modules in the top folder": len(list(package.glob("*.py"))),
    }


def main() -> None:
    found = measured(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    print(f"{'':40}{'now':>10}{'before':>10}")
    for name, value in found.items():
        before = f"{BEFORE[name]:10,.1f}" if name in BEFORE else ""
        print(f"{name:40}{value:10,.1f}{before}")


if __name__ == "__main__":
    main()
