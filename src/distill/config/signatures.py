"""Signatures of classes and functions, read from their source without importing their modules.

The keyword arguments of a `_target_` are the keys of its node, and the annotations give the types
of the values. If the source does not say enough, every value passes: building the object is the
final check.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from distill.storage.source_code import PLAIN, find, home, last, lineage_of

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a node with keys",
    "node": "a node with a _target_",
    "None": "null",
}
PLURALS = {  # the same for items of a list
    "int": "whole numbers",
    "float": "numbers",
    "str": "texts",
    "list": "lists",
}
LISTS = {"list", "tuple", "Sequence", "Iterable", "List", "Tuple"}
DICTS = {"dict", "Mapping", "Dict"}
# Class of a library -> the class that its **kwargs go to.
FORWARDED_TO = {"TensorBoardLogger": "torch.utils.tensorboard.writer.SummaryWriter"}
# Node -> a class of ours that takes further keys of it.
BESIDE = {"trainer": "distill.training.speed.Speed"}
# Node -> keys that the program sets itself: a value in the configuration would be ignored.
GIVEN_BY_PROGRAM = {
    "method": {"players", "loop"},
    "teacher": {"deferred"},
    "score_teacher": {"deferred"},
    "student": {"teacher"},
    "discriminator.features": {"teacher"},
    "discriminator.heads": {"channels", "pooled", "image"},
    "discriminator.condition": {"teacher", "features"},
    "optimizer.student": {"params"},
    "optimizer.discriminator": {"params"},
    "optimizer.fake_score": {"params"},
    "logger": {"save_dir"},  # of each logger
    "trainer": {  # trainer_keys.py refuses others, with what to type instead
        "enable_checkpointing", "enable_progress_bar", "enable_model_summary",
        "use_distributed_sampler",
    },
}  # fmt: skip
NOT_WRITTEN = {"Tensor"}  # types that no YAML value has: errors do not name them


@dataclass(frozen=True)
class Signature:
    """`keys`: keyword -> annotation, or None. `open`: whether other keywords may be taken too.

    `needed`: keywords without a default. `homes`: keyword -> the module of its annotation, if it
    is another.
    """

    module: str
    keys: dict[str, ast.expr | None] = field(default_factory=dict)
    open: bool = False
    needed: frozenset[str] = frozenset()
    homes: dict[str, str] = field(default_factory=dict)


def signature(target: str) -> Signature | None:
    """The signature of a class or function by its dotted name; None if its source is not found."""
    found = find(*target.rpartition("::")[2].rpartition(".")[::2])
    if found is None:
        return None
    module, node = found
    if isinstance(node, ast.ClassDef):
        taken = _of_class(module, node)
        more = (
            signature(FORWARDED_TO[node.name]) if taken.open and node.name in FORWARDED_TO else None
        )
        return replace(taken, keys={**more.keys, **taken.keys}, open=more.open) if more else taken
    return _of_function(module, node) if isinstance(node, ast.FunctionDef) else None


def signature_at(path: str, target: str) -> Signature | None:
    """The signature of the node at this path: that of its target, and of a class of ours beside
    it.
    """
    taken, more = signature(target), _beside(path)
    if not taken or not more:
        return taken
    homes = {**taken.homes, **dict.fromkeys(more.keys, more.module)}
    return replace(taken, keys={**taken.keys, **more.keys}, homes=homes)


def keys_beside(path: str) -> set[str]:
    """The keys of the node at this path that a class of ours takes, and not its target."""
    more = _beside(path)
    return set(more.keys) if more else set()


def _beside(path: str) -> Signature | None:
    name = BESIDE.get(path.rstrip("."))
    return signature(name) if name else None


def expected(taken: Signature, key: str, value: Any) -> str | None:
    """What the value of a key must be, as text; None if it fits, or if the source does not say."""
    annotation = taken.keys.get(key)
    if annotation is None:
        return None
    choices = list(_choices(taken.homes.get(key, taken.module), annotation))
    if any(_fits(choice, value) for choice in choices):
        return None
    words = [_in_words(choice) for choice in choices if choice[0] != "None"]
    return " or ".join(dict.fromkeys([*words, *(["null"] if ("None",) in choices else [])]))


def _in_words(choice: tuple[Any, ...]) -> str:
    """A kind as text; for a list with the kinds of its items."""
    if choice[0] == "literal":
        return str(choice[1])
    inner = choice[1] if choice[0] == "list" else []
    kinds = [PLURALS[c[0]] for c in inner if c[0] in PLURALS]
    if not kinds or len(kinds) < len(inner):
        return WORDS[choice[0]]
    deeper = [_in_words(c).removeprefix("a list") for c in inner if c[0] == "list"]
    example = ", as [[1, 2], [3, 4]]" if deeper == [" of whole numbers"] else ""
    return f"a list of {' or '.join(kinds)}{''.join(deeper)}{example}"


def given_by_program(path: str) -> set[str]:
    """The keys of the node at this path that the program sets itself."""
    return GIVEN_BY_PROGRAM.get("logger" if path.startswith("logger.") else path.rstrip("."), set())


def of_nodes(taken: Signature, key: str) -> bool:
    """Whether the value of a key is a mapping of nodes with a `_target_`."""
    annotation = taken.keys.get(key)
    if annotation is None:
        return False
    choices = _choices(taken.homes.get(key, taken.module), annotation)
    return any(choice[0] == "dict" and ("node",) in choice[1:] for choice in choices)


def options(taken: Signature, key: str) -> list[str]:
    """The values of a key that its annotation lists as Literal."""
    annotation = taken.keys.get(key)
    found = [] if annotation is None else _choices(taken.homes.get(key, taken.module), annotation)
    return [str(choice[1]) for choice in found if choice[0] == "literal"]


def _fits(choice: tuple[Any, ...], value: Any) -> bool:
    kind = choice[0]
    if kind == "literal":
        return value == choice[1] and type(value) is type(choice[1])
    if kind == "list":
        inner = choice[1]
        return isinstance(value, list) and (
            not inner or all(any(_fits(c, item) for c in inner) for item in value)
        )
    if kind == "node":
        return isinstance(value, dict) and "_target_" in value
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict": dict}
    if kind in kinds:
        return isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
    return value is None if kind == "None" else True


def _choices(module: str, node: ast.expr | None) -> Iterator[tuple[Any, ...]]:
    """The kinds that an annotation allows: ("int",), ("literal", value), ("list", item kinds),
    ("any",), ...
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _choices(module, ast.parse(node.value, mode="eval").body)
    elif isinstance(node, ast.Constant):
        yield ("None",) if node.value is None else ("any",)
    elif isinstance(node, ast.BinOp):
        yield from _choices(module, node.left)
        yield from _choices(module, node.right)
    elif isinstance(node, ast.Subscript):
        yield from _subscript(module, last(node.value), _parts(node.slice))
    else:
        yield from _named(module, node)


def _subscript(module: str, name: str, parts: list[ast.expr]) -> Iterator[tuple[Any, ...]]:
    if name in ("Optional", "Union"):
        for part in parts:
            yield from _choices(module, part)
        if name == "Optional":
            yield ("None",)
    elif name == "Literal":
        for part in parts:
            yield ("literal", part.value) if isinstance(part, ast.Constant) else ("any",)
    elif name in LISTS:
        # the items of a tuple of several kinds are not checked
        several = [p for p in parts if not (isinstance(p, ast.Constant) and p.value is ...)]
        yield ("list", list(_choices(module, several[0])) if len(several) == 1 else [])
    elif name == "Callable" and module.startswith("distill."):  # a node with `_partial_`
        yield ("node",)
    else:
        yield ("dict", *_choices(module, parts[-1])) if name in DICTS else ("any",)


def _named(module: str, node: ast.expr | None) -> Iterator[tuple[Any, ...]]:
    name = last(node)
    if name in LISTS:
        yield ("list", [])
    elif name in DICTS:
        yield ("dict",)
    elif name in WORDS:
        yield (name,)
    elif name not in NOT_WRITTEN:
        found = find(home(module, node), name) if module.startswith("distill.") else None
        if found and isinstance(found[1], ast.Assign):
            yield from _choices(found[0], found[1].value)
        elif found and found[0].startswith("distill."):
            yield ("node",)  # an object of ours: YAML has its class and arguments
        else:
            yield ("any",)


def _parts(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


# -- classes and functions -------------------------------------------------------------------------


def _of_function(module: str, node: ast.FunctionDef) -> Signature:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    keys = {a.arg: a.annotation for a in arguments if a.arg != "self"}
    plain, only = [*node.args.posonlyargs, *node.args.args], node.args.kwonlyargs
    without = plain[: len(plain) - len(node.args.defaults)]
    without += [
        a for a, default in zip(only, node.args.kw_defaults, strict=True) if default is None
    ]
    needed = frozenset(a.arg for a in without if a.arg != "self")
    return Signature(module, keys, open=node.args.kwarg is not None, needed=needed)


def _of_class(module: str, node: ast.ClassDef) -> Signature:
    """From its __init__, or from the fields of a dataclass. In our classes, `**kwargs` are taken to
    go to the base class.
    """
    keys: dict[str, ast.expr | None] = {}
    homes: dict[str, str] = {}
    needed = None
    for where, each in lineage_of(module, node):
        taken = _own_signature(where, each)
        if taken is None:
            continue
        # Only of the class itself: it may pass what its base needs.
        needed = taken.needed if needed is None else needed
        homes = {**dict.fromkeys(taken.keys, where), **homes}
        keys = {**taken.keys, **keys}
        if not taken.open:
            return Signature(module, keys, needed=needed, homes=homes)
        if not where.startswith("distill."):
            break
    nothing = needed is None and _known(module, node)
    return Signature(module, keys, open=not nothing, needed=needed or frozenset(), homes=homes)


def _known(module: str, node: ast.ClassDef) -> bool:
    """Whether every base of a class was found: without any __init__ it then takes no arguments."""
    for base in node.bases:
        if last(base) in PLAIN:
            continue
        found = find(module, last(base))
        if not found or not isinstance(found[1], ast.ClassDef) or not _known(*found):
            return False
    return True


def _own_signature(module: str, node: ast.ClassDef) -> Signature | None:
    """The signature in the body of a class; None if only its bases have one."""
    for line in node.body:
        if isinstance(line, ast.FunctionDef) and line.name == "__init__":
            return _of_function(module, line)
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
        named = {
            line.target.id: line.annotation
            for line in fields
            if isinstance(line.target, ast.Name)
            and "ClassVar" not in ast.unparse(line.annotation)
            and "init=False" not in ast.unparse(line)
        }
        bare = {f.target.id for f in fields if isinstance(f.target, ast.Name) and f.value is None}
        # fields of a base count as well
        further = any(last(b) not in PLAIN for b in node.bases)
        return Signature(module, named, open=further, needed=frozenset(bare & set(named)))
    return None
