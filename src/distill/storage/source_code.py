"""What stands in the source of a module, read without importing it, so that the answer comes at
once.
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
ROOTS = PLAIN - {"Callback"}  # bases that are nobody's to ask for
MOST_IMPORTS = 8  # through which a name is followed; one that is handed on more often is a joke


def attribute(target: str, name: str) -> Any:
    """A constant that stands in the body of a class or of one of its bases; None if there is
    none.
    """
    value = assigned(target, name)
    return value.value if isinstance(value, ast.Constant) else None


def assigned(target: str, name: str) -> ast.expr | None:
    """What is assigned to a name in the body of the class of this dotted name, or of the nearest of
    its bases that does so; None if there is none.
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
    """The class of this dotted name and its bases, nearest first, as `module.Class` where each
    stands.

    Bases whose source cannot be found are left out; empty where no such class stands in a source.
    """
    found = find(*target.rpartition(".")[::2])
    if found is None or not isinstance(found[1], ast.ClassDef):
        return []
    return [f"{module}.{node.name}" for module, node in lineage_of(*found, ending=ROOTS)]


def lineage_of(
    module: str, node: ast.ClassDef, ending: Container[str] = PLAIN
) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and the bases of ours or of its library whose source can be found, nearest first.

    Bases of the names in `ending` are left out.
    """
    yield module, node
    for base in node.bases:
        found = None if last(base) in ending else find(home(module, base), last(base))
        if found and isinstance(found[1], ast.ClassDef):
            yield from lineage_of(*found, ending=ending)


def last(node: ast.expr | None) -> str:
    """`Sequence` of `Sequence` and of `collections.abc.Sequence`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def home(module: str, node: ast.expr | None) -> str:
    """The module in which a name that `module` writes stands: of `losses.Game` that which `losses`
    is there.
    """
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        return module
    here = node.value.id
    read = source(module)
    found = None if read is None else statement(read[0], here)
    if not isinstance(found, ast.ImportFrom) or found.level:
        return module
    alias = next(a for a in found.names if (a.asname or a.name) == here)
    return f"{found.module}.{alias.name}"


def find(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """Where a name of a module is defined, through its imports: the module, and the statement."""
    for _ in range(MOST_IMPORTS):
        read = source(module)
        if read is None:
            return None
        tree, is_package = read
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
    """The statement at the top of a module by which this name is there."""
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
    """The tree of a module, and whether it is a package; None where it has no source here, or none
    of Python's: to import it will say what is wrong.

    The package at the top alone is asked where it lies.
    """
    for file in _files(module):
        if file.is_file():
            with suppress(SyntaxError, ValueError):
                return ast.parse(file.read_text(encoding="utf-8")), file.name == "__init__.py"
    return None


def inside(root: str) -> Iterator[str]:
    """A module and, if it is a package, all that are inside it, sorted."""
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
    """Where the source of a module may lie."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    if not spec.submodule_search_locations:  # a file of the user's own
        if not rest and (spec.origin or "").endswith(".py"):
            yield Path(str(spec.origin))
        return
    for place in spec.submodule_search_locations:
        path = Path(place).joinpath(*rest)
        yield path / "__init__.py"
        if rest:
            yield path.with_suffix(".py")
