"""Look up classes, functions and constants in the source of modules, without importing them.

Importing torch or diffusers takes seconds; reading a source takes milliseconds.
"""

import ast
import importlib.util
from collections.abc import Container, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# Bases of classes that add no keyword and no constant of their own.
PLAIN = frozenset({"Module", "object", "Protocol", "ABC", "Callback"})
ROOTS = PLAIN - {"Callback"}  # bases that are never required of a target
MOST_IMPORTS = 8  # ours: re-exports through which a name is followed, more than any package has


def attribute(target: str, name: str) -> Any:
    """The constant assigned to `name` in the body of a class or a base; None if there is none."""
    value = assigned(target, name)
    return value.value if isinstance(value, ast.Constant) else None


def assigned(target: str, name: str) -> ast.expr | None:
    """The expression assigned to `name` in the body of a class, or of its first base with one.

    `target` is the dotted name of the class. None if nothing is assigned.
    """
    found = find(*target.rpartition(".")[::2])
    if found is None or not isinstance(found[1], ast.ClassDef):
        return None
    for _, node in lineage_of(*found):
        values = [value for each, value in assignments(node) if each == name]
        if values:
            return values[-1]
    return None


def assignments(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Name and value of each plain assignment in the body of a class."""
    for line in node.body:
        if isinstance(line, ast.Assign):
            yield from ((t.id, line.value) for t in line.targets if isinstance(t, ast.Name))
        elif isinstance(line, ast.AnnAssign) and line.value and isinstance(line.target, ast.Name):
            yield line.target.id, line.value


def lineage(target: str) -> list[str]:
    """A class and its bases, nearest first, each as the `module.Class` that defines it.

    `target` is the dotted name of the class. Bases without a readable source are left out. The list
    is empty if the class has none.
    """
    found = find(*target.rpartition(".")[::2])
    if found is None or not isinstance(found[1], ast.ClassDef):
        return []
    return [f"{module}.{node.name}" for module, node in lineage_of(*found, ending=ROOTS)]


def lineage_of(
    module: str, node: ast.ClassDef, ending: Container[str] = PLAIN
) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and its bases with a readable source, in Python's order of resolution (C3): (module,
    definition).

    Bases named in `ending` are left out.
    """
    yield module, node
    bases = []
    for base in node.bases:
        found = None if last(base) in ending else find(home(module, base), last(base))
        if found and isinstance(found[1], ast.ClassDef):
            bases.append((found[0], found[1]))
    yield from _merged([*(list(lineage_of(*base, ending=ending)) for base in bases), bases])


def _merged(orders: list[list[tuple[str, ast.ClassDef]]]) -> Iterator[tuple[str, ast.ClassDef]]:
    """The classes of several orders, in an order that agrees with each of them.

    Where there is none, which Python refuses, the first class that is left comes next.
    """
    left = [[(f"{module}.{node.name}", (module, node)) for module, node in o] for o in orders]
    while left := [order for order in left if order]:
        later = {name for order in left for name, _ in order[1:]}
        chosen, found = next((o[0] for o in left if o[0][0] not in later), left[0][0])
        yield found
        left = [[pair for pair in order if pair[0] != chosen] for order in left]


def last(node: ast.expr | None) -> str:
    """`Sequence` of `Sequence` and of `collections.abc.Sequence`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def home(module: str, node: ast.expr | None) -> str:
    """The module that holds a name used in `module`.

    For `losses.Game` it is the module that `module` imports as `losses`; for a plain name it is
    `module`.
    """
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        return module
    prefix = node.value.id
    parsed = source(module)
    found = None if parsed is None else statement(parsed[0], prefix)
    if not isinstance(found, ast.ImportFrom) or found.level:
        return module
    alias = next(a for a in found.names if (a.asname or a.name) == prefix)
    return f"{found.module}.{alias.name}"


def find(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """The module that defines a name, and the defining statement; imports are followed."""
    for _ in range(MOST_IMPORTS):
        parsed = source(module)
        if parsed is None:
            return None
        tree, is_package = parsed
        found = statement(tree, name)
        if not isinstance(found, ast.ImportFrom):
            return None if found is None else (module, found)
        alias = next(a for a in found.names if (a.asname or a.name) == name)
        parents = module.split(".")[: len(module.split(".")) - found.level + is_package]
        start = parents if found.level else []
        module = ".".join([*start, *([found.module] if found.module else [])])
        name = alias.name
    return None


def statement(tree: ast.Module, name: str) -> ast.stmt | None:
    """The top-level statement that defines or imports `name`; None if there is none."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign) and any(last(target) == name for target in node.targets):
            return node
        if isinstance(node, ast.ImportFrom) and name in [a.asname or a.name for a in node.names]:
            return node
    return None


@lru_cache(maxsize=256)
def source(module: str) -> tuple[ast.Module, bool] | None:
    """The syntax tree of a module, and whether it is a package.

    None if no source is found or it cannot be parsed; the import reports that error later. Only the
    top-level package is looked up by Python's import system.
    """
    for file in _files(module):
        if file.is_file():
            with suppress(SyntaxError, ValueError):
                return ast.parse(file.read_text(encoding="utf-8")), file.name == "__init__.py"
    return None


def inside(root: str) -> Iterator[str]:
    """The dotted names of a module and, if it is a package, of all modules in it, sorted."""
    yield root
    for file in _files(root):
        if file.is_file() and file.name == "__init__.py":
            for inner in sorted(file.parent.rglob("*.py")):
                parts = inner.relative_to(file.parent).with_suffix("").parts
                if parts[-1] != "__init__":
                    yield ".".join([root, *parts])
                elif parts[:-1]:
                    yield ".".join([root, *parts[:-1]])
            return


def _files(module: str) -> Iterator[Path]:
    """The files that may hold the source of a module."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    if not spec.submodule_search_locations:  # a single file
        if not rest and (spec.origin or "").endswith(".py"):
            yield Path(str(spec.origin))
        return
    for folder in spec.submodule_search_locations:
        path = Path(folder).joinpath(*rest)
        yield path / "__init__.py"
        if rest:
            yield path.with_suffix(".py")
