"""What a configuration may call: the allowed `_target_`s of every key.

SHIPPED lists what any configuration may hold, also that of an untrusted run folder. TYPED lists
what the command line may hold in addition. Only the environment allows other classes:

    DISTILL_TRUST=mypackage,other     packages that the command line may name
    DISTILL_TRUST_RUN=runs/mine       run folders that may do what the command line may

Installed packages with an entry point of the group `distill` are trusted like those of
DISTILL_TRUST. Nothing here imports the named modules: names are looked up in their sources.

Files are data: no resolver runs on them, and they may not name another machine.
"""

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from distill.config import signatures
from distill.storage import source_code
from distill.storage.bounded import LOADER, parse_yaml, text_of
from distill.storage.renames import renamed
from distill.storage.safe_paths import TRUST_RUN, is_trusted_run
from distill.storage.trusted import TRUST, is_trusted
from distill.terminal import secret


@dataclass(frozen=True)
class Allowed:
    """Allowed `_target_`s: `names`, and subclasses of `base` in the modules `inside`."""

    names: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    base: str | None = None

    def has(self, name: str) -> bool:
        """Whether the class or function of this name is allowed, without importing it."""
        if name in self.names:
            return True
        if not name.startswith(tuple(f"{module}." for module in self.inside)):
            return False
        classes = source_code.lineage(name)
        return bool(classes) and self.is_home(classes[0]) and self.base in (None, *classes)

    def is_home(self, defined: str) -> bool:
        """Whether this dotted name of a definition lies in one of the modules."""
        return defined.startswith(tuple(f"{module}." for module in self.inside))

    def __str__(self) -> str:
        return ", ".join([*self.names, *(f"a class of {module}" for module in self.inside)])


def _named(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


LIGHTNING = "lightning.pytorch"
NETWORK = Allowed(inside=("distill.discriminators",))
OPTIMIZERS = "adamw8bit adamw8bit_bnb adafactor prodigy schedule_free muon"
OPTIMIZER = Allowed(
    names=_named("distill.training.optimizers", OPTIMIZERS),
    inside=("torch.optim",),
    base="torch.optim.optimizer.Optimizer",
)
# Key (`*` is any name) -> what it may hold in every configuration.
SHIPPED = {
    "method": Allowed(inside=("distill.methods",), base="distill.methods.base.Distillation"),
    "method.*": Allowed(
        inside=(
            "distill.core.times",
            "distill.core.score_distillation",
            "distill.teachers.decoder",
        ),
    ),
    "teacher": Allowed(
        inside=("distill.teachers",), base="distill.teachers.pipeline.PipelineTeacher"
    ),
    "score_teacher": Allowed(
        inside=("distill.teachers",), base="distill.teachers.pipeline.PipelineTeacher"
    ),
    "student": Allowed(names=_named("distill.students", "full lora.lora stylegan.stylegan")),
    "discriminator.features": NETWORK,
    "discriminator.heads": NETWORK,
    "discriminator.condition": NETWORK,
    "discriminator.condition.*": NETWORK,
    "data": Allowed(
        names=_named("distill.data.source", "images latents pairs prompts drawn preferences")
    ),
    "data.reader": Allowed(names=_named("distill.worlds.shapes.scenes", "Scenes Edits")),
    "loop": Allowed(names=("distill.training.loop_settings.LoopSettings",)),
    "optimizer.student": OPTIMIZER,
    "optimizer.discriminator": OPTIMIZER,
    "optimizer.fake_score": OPTIMIZER,
    "sampler": Allowed(inside=("distill.sampling",), base="distill.sampling.FewSteps"),
    "metrics": Allowed(
        names=(
            "distill.evaluation.shapes.Shapes",
            "distill.evaluation.shapes_edit.EditedShapes",
            "distill.evaluation.shapes_fill.FilledShapes",
            "distill.evaluation.prompted.Prompted",
        ),
    ),
    "metrics.networks.*": Allowed(
        inside=("distill.evaluation.networks", "distill.evaluation.rewards"),
        base="distill.evaluation.networks.Describer",
    ),
    "metrics.scores.*": Allowed(
        inside=("distill.evaluation.scores",), base="distill.evaluation.scores.Score"
    ),
    "trainer": Allowed(names=("lightning.Trainer", f"{LIGHTNING}.Trainer")),
    "trainer.strategy": Allowed(
        names=_named("distill.training.strategies", "DataParallel FullyShardedDataParallel")
    ),
    # Those of Lightning's that open no file by a configured name.
    "callbacks.*": Allowed(
        names=(
            *_named("distill.training.callbacks", "Progress Health Alarms Samples"),
            "distill.training.scoring.Scores",
            *_named("distill.training.checkpoints", "Checkpoints"),
            *_named(f"{LIGHTNING}.callbacks", "DeviceStatsMonitor EarlyStopping"),
            *_named(f"{LIGHTNING}.callbacks", "LearningRateMonitor ModelSummary Timer"),
        )
    ),
    # Lightning's that only write into the run's folder, and ours, which log to the user's account.
    "logger.*": Allowed(
        names=(
            *_named("distill.training.csv_logger", "CsvLog"),
            *_named("distill.training.trackers.kinds", "Mlflow Trackio Wandb"),
            *_named(f"{LIGHTNING}.loggers", "CSVLogger TensorBoardLogger"),
        )
    ),
}
# Key -> what only the command line may name: its user may write files and use any server.
TYPED = {
    "callbacks.*": Allowed(
        inside=(f"{LIGHTNING}.callbacks",), base=f"{LIGHTNING}.callbacks.callback.Callback"
    ),
    "logger.*": Allowed(
        inside=(f"{LIGHTNING}.loggers",), base=f"{LIGHTNING}.loggers.logger.Logger"
    ),
    "trainer.strategy": Allowed(
        inside=(f"{LIGHTNING}.strategies",), base=f"{LIGHTNING}.strategies.strategy.Strategy"
    ),
    "trainer.profiler": Allowed(
        inside=(f"{LIGHTNING}.profilers",), base=f"{LIGHTNING}.profilers.profiler.Profiler"
    ),
}
# Keys that only the command line may set: they name paths outside the run's folder, or would be
# ignored.
NOT_FROM_FILES = (
    "data.cache_dir",
    *_named("trainer", "callbacks default_root_dir logger model_registry plugins profiler"),
)
NOT_FROM_LOGGERS = {"entity", "space_id", "tracking_uri"}  # the same of each logger
# Groups of a run: a node with keys, or null.
GROUPS = {pattern.partition(".")[0] for pattern in SHIPPED}
# Prompts, which `compose.make` passes unchanged.
WORDS = re.compile(r"method\.negative|callbacks\.samples\.prompts\.\d+")
TEXTS = re.compile(rf"name|{WORDS.pattern}")  # texts that are never paths
# Keys that may hold an escaped `${`. At other keys a copy of the value would be read again, as an
# interpolation.
CALLED = re.compile(rf"name|run_dir|out|prompts(?:\.\d+)?|{WORDS.pattern}")
REFERS = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # an interpolation that is not escaped
# `scheme://`, fsspec's chains, webdataset's pipes, shares of a network, variables of a path.
ELSEWHERE = re.compile(r"://|::|^\s*(?:pipe:|\\\\|//)|\$\w|%\w+%")
LARGEST = 2**20  # ours: limit of a configuration file in bytes; a usual one has 5,000


class Loader(LOADER):  # type: ignore[misc, valid-type]
    """Reads YAML as OmegaConf does: 1e-5 is a number, and a date is a text."""

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


def rules(key: str, *, untrusted: bool = False) -> list[Allowed]:
    """What a key may hold, in an untrusted file or on the command line; [] if no class."""
    tables = (SHIPPED,) if untrusted else (SHIPPED, TYPED)
    return [holds for table in tables for pattern, holds in table.items() if _matches(pattern, key)]


def _matches(pattern: str, key: str) -> bool:
    parts, names = pattern.split("."), key.split(".")
    return len(parts) == len(names) and all(
        part in ("*", name) for part, name in zip(parts, names, strict=True)
    )


def check_target(name: str, key: str, *, untrusted: bool = False) -> None:
    """Raise ValueError unless this class or function is allowed at the dotted key.

    Nothing is imported.
    """
    held = rules(key, untrusted=untrusted)
    if any(holds.has(name) for holds in held) or (not untrusted and is_trusted(name)):
        return
    inside = tuple(f"{module}." for holds in held for module in holds.inside)
    if inside and name.startswith(inside) and signatures.signature(name) is None:
        what = "there is nothing of this name; check how it is written"
        raise ValueError(f"{key}._target_: {name}: {what}")
    allowed = f"{key} may be {', '.join(map(str, held))}" if held else f"{key} holds no class"
    hint = "" if untrusted else f"; to allow a class of yours set {TRUST}=<its package>"
    raise ValueError(f"{key}._target_: {name} is refused: {allowed}{hint}")


def check_object(found: Any, name: str, key: str) -> None:
    """As `check_target`, for the imported object of this name."""
    held = rules(key)
    if name in (named for holds in held for named in holds.names):
        return
    home = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
    bases = {f"{c.__module__}.{c.__qualname__}" for c in getattr(found, "__mro__", ())}
    fitting = [holds for holds in held if holds.base is None or holds.base in bases]
    if is_trusted(name):
        based = [holds.base for holds in held if holds.base]
        if not isinstance(found, type) or not based or bases.intersection(based):
            return
        raise ValueError(f"{key}._target_: {name} is refused: it must be a {' or a '.join(based)}")
    if not isinstance(found, type) or not any(holds.is_home(home) for holds in fitting):
        may = ", ".join(map(str, held))
        raise ValueError(f"{key}._target_: {name} is refused: {key} may be {may}")


def check_targets(tree: Any, key: str = "", *, untrusted: bool = False) -> None:
    """Raise ValueError for the first `_target_` of a plain tree that is not allowed at its key."""
    for path, value in walk(tree, key):
        if isinstance(value, Mapping) and "_target_" in value:
            check_target(str(value["_target_"]), path, untrusted=untrusted)


def walk(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted key, nodes before their children."""
    yield key, tree
    inner: Any = ()
    if isinstance(tree, Mapping):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = enumerate(tree)
    for name, value in inner:
        yield from walk(value, f"{key}.{name}" if key else str(name))


# -- files -----------------------------------------------------------------------------------------


def read(file: Path, *keys: str, ignored: Container[str] = ()) -> DictConfig:
    """The configuration in this file, checked so that objects may be built from it.

    See `data` and `check_file`.
    """
    tree = data(file, *keys)
    check_file(tree, file, ignored)
    return OmegaConf.create(tree)


def data(file: Path, *keys: str) -> dict[str, Any]:
    """The content of this file at these dotted keys, or at all: numbers, texts, lists and nodes.

    No resolver runs. Call `check_file` before objects are built from it. Raises ValueError, naming
    file and key, for an interpolation, an alias, and other values that are not data.
    """
    tree = _select(plain(file), keys)
    for path, value in walk(tree, ""):
        if problem := _not_data(path, value):
            raise ValueError(f"{file}: {path}{problem}")
    return tree


def check_file(
    tree: dict[str, Any], file: Path, ignored: Container[str] = (), *, trusted: bool = False
) -> None:
    """Raise ValueError, naming file and key, for content that only the user may type.

    That is a class that is not allowed at its key, a path on another machine, and the like. Keys in
    `ignored` are skipped, since they are replaced. A `trusted` file, or one that
    `is_trusted_run`, may hold everything that may be typed.
    """
    tree = without(tree, ignored)
    for path, value in walk(tree, ""):
        if secret.is_masked(value):
            what = "is a secret, which is not saved; give it on the command line again"
            raise ValueError(f"{file}: {path}={value}: {what}")
    if not trusted and not is_trusted_run(file):
        _check_untrusted(tree, file)


def plain(file: Path) -> dict[str, Any]:
    """The content of a YAML file, with interpolations as text.

    Raises ValueError if it is not a mapping, is too large, or holds aliases, which could expand to
    more than the memory.
    """
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{file}: is larger than any configuration; copy it again")
    text = text_of(file)
    with suppress(yaml.YAMLError):  # `parse_yaml` says what is wrong
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=LOADER)):
            raise ValueError(f"{file}: holds an alias (*name); write the value out")
    tree = parse_yaml(text, str(file), Loader) or {}
    if not isinstance(tree, dict):
        raise ValueError(f"{file}: is no mapping of keys; copy it again")
    return renamed(tree)


def _select(tree: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The tree, or only these of its dotted keys."""
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
    """The tree without these dotted keys."""
    if not isinstance(tree, Mapping):
        return tree
    paths = {name: f"{key}.{name}" if key else str(name) for name in tree}
    return {
        name: without(value, keys, paths[name])
        for name, value in tree.items()
        if paths[name] not in keys
    }


def _not_data(key: str, value: Any) -> str | None:
    """What is wrong with a value of a file, which must be data; None if nothing is."""
    if isinstance(value, Mapping):
        odd = [
            name for name in value if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name)
        ]
        return f": {odd[0]!r} is no name of a key" if odd else None
    if isinstance(value, str):
        if REFERS.search(value) or ("${" in value and not CALLED.fullmatch(key)):
            return f"={value}: holds an interpolation; write the value out in a file"
        return ": is missing (???); give it a value" if value == "???" else None
    if value is None or isinstance(value, bool | int | float | list):
        return None
    return f": a {type(value).__name__} is no value of a configuration"


def _check_untrusted(tree: dict[str, Any], file: Path) -> None:
    """Raise ValueError for content that may be typed, but is refused in an untrusted file."""
    hint = f"if you trust this run, set {TRUST_RUN}={file.parent}"
    try:
        check_targets(tree, untrusted=True)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {hint}") from None
    for key, value in walk(tree, ""):
        if reason := _refusal(key, value):
            raise ValueError(f"{file}: {key}={value}: {reason}; {hint}")


def _refusal(key: str, value: Any) -> str | None:
    """Why an untrusted file may not hold this value; None if it may."""
    special = key.rpartition(".")[2]
    if key in GROUPS and value is not None and not isinstance(value, Mapping):
        return "must be a node with keys, or null"
    if special in ("_args_", "_recursive_", "_convert_"):
        return "is only allowed on the command line"
    if special == "_partial_" and not isinstance(value, bool):
        return "must be true or false"
    alone = key in NOT_FROM_FILES or (key.startswith("logger.") and special in NOT_FROM_LOGGERS)
    if alone and value is not None:
        return "is only allowed on the command line"
    if not isinstance(value, str) or TEXTS.fullmatch(key) or special == "_target_":
        return None
    if ELSEWHERE.search(value):
        return "is neither a path on this machine nor a hub id"
    if key.startswith("logger.") and re.search(r"[/\\~]|\.\.", value):
        return "would leave the run's folder"
    return None
