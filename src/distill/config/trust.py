"""What a configuration may call: for every key what its `_target_` may name.

SHIPPED says what any configuration may hold, that of a stranger's run folder too; TYPED what the
command line may hold besides. A class of one's own is let in by the environment alone:

    DISTILL_TRUST=mypackage,other     packages that one's own command line may name
    DISTILL_TRUST_RUN=runs/mine       folders of runs that may do what one's own command line may

Installed packages with an entry point of the group `distill` count as named by DISTILL_TRUST.
Nothing here imports what is asked for: names are looked up in the sources.

What comes with files is data: no resolver runs on it, and it names no place beyond this machine.
"""

import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from distill.config import signatures
from distill.storage.bounded import LOADER
from distill.storage.inside import TRUST_RUN, is_own
from distill.storage.renames import renamed
from distill.terminal import secret

TRUST = "DISTILL_TRUST"


@dataclass(frozen=True)
class Holds:
    """What a `_target_` may name: `names`, and classes of modules that descend from `base`."""

    names: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    base: str | None = None

    def has(self, name: str) -> bool:
        """Whether the class or function of this name is one of them, by the sources alone."""
        if name in self.names:
            return True
        if not name.startswith(tuple(f"{module}." for module in self.inside)):
            return False
        classes = signatures.lineage(name)
        return bool(classes) and self.is_home(classes[0]) and self.base in (None, *classes)

    def is_home(self, defined: str) -> bool:
        """Whether a class that is defined under this dotted name stands in one of the modules."""
        return defined.startswith(tuple(f"{module}." for module in self.inside))

    def __str__(self) -> str:
        return ", ".join([*self.names, *(f"a class of {module}" for module in self.inside)])


def _named(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


LIGHTNING = "lightning.pytorch"
NETWORK = Holds(inside=("distill.discriminators",))
OPTIMIZER = Holds(inside=("torch.optim",), base="torch.optim.optimizer.Optimizer")
# Key, `*` for any one name -> what it may hold, wherever the configuration came from.
SHIPPED = {
    "method": Holds(inside=("distill.methods",), base="distill.methods.base.Distillation"),
    "method.*": Holds(
        inside=(
            "distill.core.times",
            "distill.core.score_distillation",
            "distill.teachers.decoder",
        ),
    ),
    "teacher": Holds(
        inside=("distill.teachers",), base="distill.teachers.pipeline.PipelineTeacher"
    ),
    "student": Holds(names=("distill.students.full", "distill.students.lora.lora")),
    "discriminator.features": NETWORK,
    "discriminator.heads": NETWORK,
    "discriminator.condition": NETWORK,
    "discriminator.condition.*": NETWORK,
    "data": Holds(names=_named("distill.data.source", "images latents prompts drawn")),
    "data.reader": Holds(names=("distill.worlds.shapes.scenes.Scenes",)),
    "optimizer": Holds(names=("distill.training.engine.Engine",)),
    "optimizer.student": OPTIMIZER,
    "optimizer.discriminator": OPTIMIZER,
    "sampler": Holds(inside=("distill.sampling",), base="distill.sampling.FewSteps"),
    "metrics": Holds(
        names=("distill.evaluation.shapes.Shapes", "distill.evaluation.prompted.Prompted"),
    ),
    "metrics.networks.*": Holds(
        inside=("distill.evaluation.networks",), base="distill.evaluation.networks.Describer"
    ),
    "metrics.scores.*": Holds(
        inside=("distill.evaluation.scores",), base="distill.evaluation.scores.Score"
    ),
    "trainer": Holds(names=("lightning.Trainer", f"{LIGHTNING}.Trainer")),
    "trainer.strategy": Holds(
        names=_named("distill.training.strategies", "DataParallel FullyShardedDataParallel")
    ),
    # Those of Lightning's that open no file of a name that they are given.
    "callbacks.*": Holds(
        names=(
            *_named("distill.training.callbacks", "Progress Health Alarms Samples"),
            *_named("distill.training.checkpoints", "Checkpoints"),
            *_named(f"{LIGHTNING}.callbacks", "DeviceStatsMonitor EarlyStopping"),
            *_named(f"{LIGHTNING}.callbacks", "LearningRateMonitor ModelSummary Timer"),
        )
    ),
    # Those of Lightning's that write into the run's own folder and send nothing.
    "logger.*": Holds(
        names=(
            *_named("distill.training.csv_logger", "CsvLog"),
            *_named(f"{LIGHTNING}.loggers", "CSVLogger TensorBoardLogger"),
        )
    ),
}
# Key -> what the command line may name besides: it does what its user wants, and with any server.
TYPED = {
    "callbacks.*": Holds(
        inside=(f"{LIGHTNING}.callbacks",), base=f"{LIGHTNING}.callbacks.callback.Callback"
    ),
    "logger.*": Holds(inside=(f"{LIGHTNING}.loggers",), base=f"{LIGHTNING}.loggers.logger.Logger"),
    "trainer.strategy": Holds(
        inside=(f"{LIGHTNING}.strategies",), base=f"{LIGHTNING}.strategies.strategy.Strategy"
    ),
    "trainer.profiler": Holds(
        inside=(f"{LIGHTNING}.profilers",), base=f"{LIGHTNING}.profilers.profiler.Profiler"
    ),
}
# What one may type and no file may say: a place outside the run's folder, or it is passed over.
NOT_FROM_FILES = _named(
    "trainer", "callbacks default_root_dir logger model_registry plugins profiler"
)
# Groups of a run: a node with keys, or null.
GROUPS = {pattern.partition(".")[0] for pattern in SHIPPED}
# Prompts, which `compose.make` hands over as they are.
WORDS = re.compile(r"method\.negative|callbacks\.samples\.prompts\.\d+")
TEXTS = re.compile(rf"name|{WORDS.pattern}")  # words, and no place
# They and texts of which nothing is built may hold an escaped `${`. Elsewhere a copy of the value,
# read once more, would be an interpolation.
CALLED = re.compile(rf"name|run_dir|out|prompts(?:\.\d+)?|{WORDS.pattern}")
REFERS = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # an interpolation that is not escaped
# `scheme://`, fsspec's chains, webdataset's pipes, shares of a network, variables of a path.
ELSEWHERE = re.compile(r"://|::|^\s*(?:pipe:|\\\\|//)|\$\w|%\w+%")
LARGEST = 2**20  # bytes of a configuration; ours have 5,000


class Loader(LOADER):  # type: ignore[misc, valid-type]
    """Reads YAML into plain values as OmegaConf does, where 1e-5 is a number and a date a text."""

    yaml_implicit_resolvers = get_yaml_loader().yaml_implicit_resolvers

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                what = f"found duplicate key {key.value}"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            names.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep=deep)


# -- targets ---------------------------------------------------------------------------------------


def rules(key: str, *, stranger: bool = False) -> list[Holds]:
    """What a key may hold, in a stranger's file or on one's own command line; [] for no class."""
    tables = (SHIPPED,) if stranger else (SHIPPED, TYPED)
    return [holds for table in tables for pattern, holds in table.items() if _matches(pattern, key)]


def _matches(pattern: str, key: str) -> bool:
    parts, names = pattern.split("."), key.split(".")
    return len(parts) == len(names) and all(
        part in ("*", name) for part, name in zip(parts, names, strict=True)
    )


def check_target(name: str, key: str, *, stranger: bool = False) -> None:
    """Raise ValueError unless the node at this dotted key may name this class or function.

    By the sources alone: nothing is imported.
    """
    held = rules(key, stranger=stranger)
    if any(holds.has(name) for holds in held) or (not stranger and is_trusted(name)):
        return
    inside = tuple(f"{module}." for holds in held for module in holds.inside)
    if inside and name.startswith(inside) and signatures.signature(name) is None:
        what = "there is nothing of this name; check how it is written"
        raise ValueError(f"{key}._target_: {name}: {what}")
    may = f"{key} may be {', '.join(map(str, held))}" if held else f"{key} holds no class"
    own = "" if stranger else f"; a class of your own comes in by {TRUST}=<its package>"
    raise ValueError(f"{key}._target_: {name} is refused: {may}{own}")


def check_made(found: Any, name: str, key: str) -> None:
    """As `check_target`, of the object itself that was found under the name."""
    held = rules(key)
    if name in (named for holds in held for named in holds.names):
        return
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    bases = {f"{c.__module__}.{c.__qualname__}" for c in getattr(found, "__mro__", ())}
    fitting = [holds for holds in held if holds.base is None or holds.base in bases]
    if is_trusted(name):
        based = [holds.base for holds in held if holds.base]
        if not isinstance(found, type) or not based or fitting:
            return
        raise ValueError(f"{key}._target_: {name} is refused: it must be a {' or a '.join(based)}")
    if not isinstance(found, type) or not any(holds.is_home(home) for holds in fitting):
        may = ", ".join(map(str, held))
        raise ValueError(f"{key}._target_: {name} is refused: {key} may be {may}")


def check_targets(tree: Any, key: str = "", *, stranger: bool = False) -> None:
    """Raise ValueError for the first `_target_` of a plain tree that its key may not hold."""
    for path, value in walk(tree, key):
        if isinstance(value, Mapping) and "_target_" in value:
            check_target(str(value["_target_"]), path, stranger=stranger)


def walk(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted key, nodes before what is in them."""
    yield key, tree
    inner: Any = ()
    if isinstance(tree, Mapping):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = enumerate(tree)
    for name, value in inner:
        yield from walk(value, f"{key}.{name}" if key else str(name))


def is_trusted(name: str) -> bool:
    """Whether the user's environment or an installed package lets this name in."""
    given = [word.strip() for word in os.environ.get(TRUST, "").split(",")]
    return any(name.startswith(f"{root}.") for root in (*given, *_plugins()) if root)


@cache
def _plugins() -> tuple[str, ...]:
    """Modules of the entry points that installed packages have in the group `distill`."""
    return tuple(point.module for point in entry_points(group="distill"))


# -- files -----------------------------------------------------------------------------------------


def read(file: Path, *keys: str, but: Container[str] = ()) -> DictConfig:
    """The configuration in this file, of which things may be made: see `data` and `check_file`."""
    tree = data(file, *keys)
    check_file(tree, file, but)
    return OmegaConf.create(tree)


def data(file: Path, *keys: str) -> dict[str, Any]:
    """What this file says at these dotted keys, all unless given: numbers, words, lists and nodes.

    No resolver runs, and nothing may be made of it before `check_file`. Raises ValueError, naming
    file and key, for an interpolation, an alias and whatever else is not data.
    """
    tree = _picked(plain(file), keys)
    for path, value in walk(tree, ""):
        if said := _not_data(path, value):
            raise ValueError(f"{file}: {path}{said}")
    return tree


def check_file(
    tree: dict[str, Any], file: Path, but: Container[str] = (), *, own: bool = False
) -> None:
    """Raise ValueError, naming file and key, for what a file says that only its user may type.

    That is: a class that its key may not hold, a place that is not of this machine, and the like.
    What stands at the keys in `but` is not looked at, since it is replaced. An `own` file, and one
    that `is_own`, may say what may be typed.
    """
    tree = without(tree, but)
    for path, value in walk(tree, ""):
        if secret.is_hidden(value):
            what = (
                "was left out of the file, being nobody else's; give it on the command line again"
            )
            raise ValueError(f"{file}: {path}={value}: {what}")
    if not own and not is_own(file):
        _check_stranger(tree, file)


def plain(file: Path) -> dict[str, Any]:
    """What a YAML file says, interpolations as text.

    Raises ValueError for one that is no node with keys, is larger than any configuration, or holds
    aliases, which can stand for more than any memory has.
    """
    if file.stat().st_size > LARGEST:
        raise ValueError(
            f"{file}: is larger than any configuration; take it from where it was made"
        )
    text = file.read_text(encoding="utf-8")
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=LOADER)):
            raise ValueError(f"{file}: holds an alias (*name); write the value out")
        tree = yaml.load(text, Loader=Loader) or {}
    except (RecursionError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        what = f"is no configuration{line}; take it from where it was made"
        raise ValueError(f"{file}: {what}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: is no node with keys; take it from where it was made")
    return renamed(tree)


def _picked(tree: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The tree, or of it these dotted keys alone, as far as it has them."""
    if not keys:
        return tree
    kept: dict[str, Any] = {}
    for key in keys:
        *path, last = key.split(".")
        here: Any = tree
        for name in path:
            here = here.get(name) if isinstance(here, Mapping) else None
        if isinstance(here, Mapping) and last in here:
            there = kept
            for name in path:
                there = there.setdefault(name, {})
            there[last] = here[last]
    return kept


def without(tree: Any, keys: Container[str], key: str = "") -> Any:
    """The tree without what stands at these dotted keys."""
    if not isinstance(tree, Mapping):
        return tree
    paths = {name: f"{key}.{name}" if key else str(name) for name in tree}
    return {
        name: without(value, keys, paths[name])
        for name, value in tree.items()
        if paths[name] not in keys
    }


def _not_data(key: str, value: Any) -> str | None:
    """What is wrong with a value that is to be data alone, whoever wrote it; None if nothing is."""
    if isinstance(value, Mapping):
        odd = [
            name for name in value if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name)
        ]
        return f": {odd[0]!r} is no name of a key" if odd else None
    if isinstance(value, str):
        if REFERS.search(value) or ("${" in value and not CALLED.fullmatch(key)):
            what = "interpolation, and what came with files is data; write the value out"
            return f"={value}: holds an {what}"
        return ": is missing (???); give it a value" if value == "???" else None
    if value is None or isinstance(value, bool | int | float | list):
        return None
    return f": a {type(value).__name__} is no value of a configuration"


def _check_stranger(tree: dict[str, Any], file: Path) -> None:
    """Raise ValueError for what one may type and a stranger's file may not say."""
    way = f"if you trust this run, set {TRUST_RUN}={file.parent}"
    try:
        check_targets(tree, stranger=True)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {way}") from None
    for key, value in walk(tree, ""):
        if said := _beyond(key, value):
            raise ValueError(f"{file}: {key}={value}: {said}; {way}")


def _beyond(key: str, value: Any) -> str | None:
    """Why a stranger's file may not say this; None where it may."""
    special = key.rpartition(".")[2]
    if key in GROUPS and value is not None and not isinstance(value, Mapping):
        return "must be a node with keys, or null"
    if special in ("_args_", "_recursive_", "_convert_"):
        return "is for one's own command line"
    if special == "_partial_" and not isinstance(value, bool):
        return "must be true or false"
    if key in NOT_FROM_FILES and value is not None:
        return "is for one's own command line"
    if not isinstance(value, str) or TEXTS.fullmatch(key) or special == "_target_":
        return None
    if ELSEWHERE.search(value):
        return "is no name on this machine or the hub"
    if key.startswith("logger.") and re.search(r"[/\\~]|\.\.", value):
        return "would leave the run's folder"
    return None
