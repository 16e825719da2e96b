"""Configurations before anything is built: safe instantiation, paths, run folders, resuming.

Nothing here imports torch, so that commands can report mistakes at once.
"""

import contextlib
import datetime
import difflib
import functools
import hashlib
import inspect
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

import distill.worlds.shapes
from distill.config import paths, texts, trust
from distill.config.leaving_out import leave_out
from distill.config.paths import SHIPPED, escaped
from distill.config.signatures import keys_beside
from distill.machine.faults import first_line
from distill.machine.ranks import rank, world_size
from distill.storage.checkpoint_names import steps_in
from distill.storage.trusted import is_trusted
from distill.teachers.loading.locate import near
from distill.terminal import secret
from distill.terminal.shown import shown
from distill.training import run_folders as folders

SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
UNREAD = ("README.md", "curves")  # beside the shipped models and latents
PAPER = "paper"  # the option of `recipe` and `heads` that sets nothing
_loader: ContextVar[ConfigLoader | None] = ContextVar("loader", default=None)


def for_world(group: str, name: str, teacher: str) -> str:
    """In a defaults list: the option of `recipe` or `heads` for a method or discriminator of this
    name: that of this teacher, `<name>_shapes_unet`; where there is none, that of its world,
    `<name>_shapes`; then `<name>`, what its paper sets in other groups; and at last `paper`.
    """
    loader = _loader.get() or GlobalHydra.instance().config_loader()
    options = loader.get_group_options(group)
    wanted = (f"{name}_{teacher}", f"{name}_{teacher.partition('_')[0]}", name)
    return next((option for option in wanted if option in options), PAPER)


@contextlib.contextmanager
def options_of(loader: ConfigLoader) -> Iterator[None]:
    """Within, `for_world` finds options by this loader, and not by that of the running command."""
    token = _loader.set(loader)
    try:
        yield
    finally:
        _loader.reset(token)


OmegaConf.register_new_resolver("for_world", for_world, replace=True)
# Keys that a resumed run may not change.
FIXED_ON_RESUME = (
    *("method", "teacher", "score_teacher", "student", "discriminator", "seed"),
    "loop.head_start",
)
OPTIMIZER = re.compile(r"optimizer\.\w+\._target_")  # nor these: checkpoints have its state


def is_fixed_on_resume(key: str) -> bool:
    """Whether this dotted key keeps its value when a run is resumed."""
    begins = any(key == name or key.startswith(f"{name}.") for name in FIXED_ON_RESUME)
    return begins or OPTIMIZER.fullmatch(key) is not None


def make(node: DictConfig, key: str) -> Any:
    """Instantiate the node at a dotted key, if `trust` allows its classes. Nothing else calls
    Hydra's `instantiate`.

    Containers become plain, and shipped paths absolute. Texts with `${` bypass OmegaConf, which
    would read them as interpolations.
    """
    tree = checked_node(node, key)
    texts = paths.verbatim(tree)
    if not texts:
        return instantiate(OmegaConf.create(tree), _convert_="all")
    rest = {name: value for name, value in tree.items() if name not in texts}
    build = instantiate(OmegaConf.create({**rest, "_partial_": True}), _convert_="all")
    return functools.partial(build, **texts) if tree.get("_partial_") else build(**texts)


def checked_node(node: DictConfig, key: str = "") -> Any:
    """The node as plain containers, with every value resolved.

    Raises ValueError for a `_target_` that is not allowed at its key, for a key that its target
    does not take, and for text that would be an interpolation when it is read again.
    """
    return _checked_value(OmegaConf.to_container(node, resolve=True, throw_on_missing=True), key)


def _checked_value(value: Any, path: str) -> Any:
    if isinstance(value, str):
        if "${" not in value:
            return shipped(value)
        if trust.WORDS.fullmatch(path):
            return value
        file = "rename it, or give a link to it" if paths.is_path(path) else "write it otherwise"
        raise ValueError(f"{path}={value}: must not hold ${{, an interpolation's; {file}")
    if isinstance(value, list):
        return [_checked_value(inner, f"{path}.{i}") for i, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" in value:
        name = str(value["_target_"])
        takes = inspect.signature(_target(name, path)).parameters
        unknown = sorted(set(map(str, value)) - {*takes, *keys_beside(path)} - SPECIAL)
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            key, near = f"{path}.{unknown[0]}" if path else unknown[0], nearest(unknown[0], takes)
            how = leave_out(key, overrides())
            raise ValueError(f"{key}: {name} takes no such key{near}; {how}")
    return {
        key: _checked_value(inner, f"{path}.{key}" if path else key) for key, inner in value.items()
    }


def _target(name: str, path: str) -> Any:
    """The class or function of this name, if it is allowed at the key."""
    trust.check_target(name, path)
    try:
        found = get_object(name)
    except Exception as error:  # an import may raise anything
        cause = error.__cause__
        missing = isinstance(cause, ModuleNotFoundError) and name.startswith(str(cause.name))
        if cause and not missing and is_trusted(name):  # something is wrong in the user's module
            what = f"{type(cause).__name__}: {first_line(cause)}"
            raise ValueError(
                f"{path}._target_: {name}: cannot be imported ({what}); mend it"
            ) from None
        raise ValueError(
            f"{path}._target_: {name}: there is nothing of this name; check how it is written"
        ) from None
    trust.check_object(found, name, path)
    return found


def check_counts(cfg: DictConfig, counts: Mapping[str, int]) -> None:
    """Raise ValueError unless the value of each key is a whole number at or above its minimum."""
    for key, least in counts.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{key}={value}: must be a whole number, {least} or more")
        if value is not None and value >= 2**63:
            raise ValueError(f"{key}={value}: must be a whole number below 2**63")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` with the closest of the known names, whatever their case, or ""."""
    names = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), names, n=1)
    return f" (did you mean {names[close[0]]}?)" if close else ""


def shipped(path: str) -> str:
    """`shapes:mmdit` -> the folder in the package, `~/x` -> below the home folder; else unchanged.

    Raises FileNotFoundError for an unknown name after `shapes:`.
    """
    if path.startswith("~/"):
        return os.path.expanduser(path)
    if not path.startswith(SHIPPED):
        return path
    folder = Path(distill.worlds.shapes.__file__).parent / "models" / path.removeprefix(SHIPPED)
    if not folder.exists():
        known = sorted(SHIPPED + p.name for p in folder.parent.glob("*") if p.name not in UNREAD)
        what = f"nothing of this name is shipped{nearest(path, known)}"
        raise FileNotFoundError(f"{path}: {what}; there is {', '.join(known)}")
    return str(folder)


def file_name(text: str) -> str:
    """A text as part of a file name: letters, digits, `.`, `-` and `_`.

    At most 180 bytes of the 255 that file systems allow, and only letters of the locale. A text
    that these limits change gets a hash of it appended.
    """
    plain = re.sub(r"[^\w.-]+", "_", text).strip("._")
    encoding = sys.getfilesystemencoding()
    kept = plain.encode(encoding, "ignore")[:180].decode(encoding, "ignore")
    if kept == plain:
        return plain
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{kept}_{digest}".lstrip("_")


def name_of(cfg: DictConfig) -> str:
    """`name`, or `<method>_<teacher>` as chosen on the command line."""
    if cfg.name or not HydraConfig.initialized():
        return cfg.name or "run"
    return "{method}_{teacher}".format(**HydraConfig.get().runtime.choices)


def run_folder(cfg: DictConfig) -> Path:
    """Create and return the run folder: that of `resume`, `run_dir`, `runs/slurm_<job>_<name>` in
    a SLURM job, or else a new one named by date.
    """
    if cfg.resume:
        return folder_of(cfg.resume)
    if (folder := _shared_folder(cfg)) is None and "RANK" in os.environ:
        raise ValueError(
            "run_dir=null: processes of torchrun do not share a new folder; set run_dir, so that"
            " all write there"
        )
    if folder is None:
        name = file_name(name_of(cfg))
        return _fresh_folder(f"runs/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
    check_run_dir_free(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir={folder} cannot be made ({error.strerror}); choose another run_dir="
        ) from None
    return folder


def check_run_dir_free(cfg: DictConfig) -> None:
    """Raise FileExistsError if the folder of a new run holds a run or other files already."""
    folder = None if cfg.resume else _shared_folder(cfg)
    if folder is None or rank() != 0 or is_restarted():
        return
    others = folders.foreign(folder)
    if not others:
        return
    if not (folder / "config.yaml").exists():
        what = (
            f"is not empty (it has {shown(others[0], 60)}), and a run would overwrite what is there"
        )
        raise FileExistsError(f"run_dir={folder}: {what}; name another run_dir=, or empty it")
    has_checkpoint = any((folder / "checkpoints").glob("step_*.ckpt"))
    hint = "remove it, since it has no checkpoint to resume from"
    if has_checkpoint:
        hint = f"resume={folder}"
    raise FileExistsError(
        f"run_dir={folder} holds a run already; choose another run_dir= or {hint}"
    )


def _shared_folder(cfg: DictConfig) -> Path | None:
    """The folder that all processes of the command know, and a requeued SLURM job too; None if
    there is none.
    """
    if cfg.run_dir or "SLURM_PROCID" not in os.environ:
        return Path(cfg.run_dir) if cfg.run_dir else None
    if world_size() == 1 and os.environ.get("SLURM_JOB_NAME") in (
        "bash",
        "interactive",
    ):  # a shell, for many runs
        return None
    sweep = OmegaConf.select(HydraConfig.get(), "job.num") if HydraConfig.initialized() else None
    stem = f"slurm_{os.environ['SLURM_JOB_ID']}_{file_name(name_of(cfg))}"
    return Path("runs") / (stem if sweep is None else f"{stem}_{sweep}")


def is_restarted() -> bool:
    """Whether SLURM has requeued this job, after a preemption or at the request of the run."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def requeued(cfg: DictConfig) -> str | None:
    """The run folder from which a requeued SLURM job resumes; None without a checkpoint there."""
    folder = _shared_folder(cfg) if is_restarted() else None
    found = (
        folder and (folder / "config.yaml").exists() and steps_in(folder / "checkpoints", ".ckpt")
    )
    return str(folder) if found else None


def _fresh_folder(stem: str) -> Path:
    """Create a new folder; its name gets a number if another run has it already."""
    for i in itertools.count(1):
        folder = Path(stem if i == 1 else f"{stem}-{i}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def folder_of(resume: str) -> Path:
    """The run folder of `resume`, which is a run folder or one of its checkpoints."""
    return run_at(
        str(Path(resume).parent.parent) if resume.endswith(".ckpt") else resume, key="resume"
    )


def run_at(path: str, key: str = "run") -> Path:
    """The run folder at this path. Raises FileNotFoundError, naming `key`, for any other path."""
    if not (Path(path) / "config.yaml").is_file():
        what = f"not a run folder (it has no config.yaml){near(path)}"
        raise FileNotFoundError(f"{key}={path}: {what}")
    return Path(path)


def config_of(run: str | Path, key: str, *keys: str) -> DictConfig | None:
    """These keys of a run folder's configuration, read by `trust.read`; None without a run folder.

    Paths of files that were moved together with the run are corrected.
    """
    if not is_run(run):
        return None
    file = Path(run) / "config.yaml"
    found = paths.relocated(trust.read(file, key, *keys), Path(run))
    texts.check_shown_paths(found, file)
    return found


def is_run(path: str | Path) -> bool:
    """Whether this is a run folder."""
    return (Path(path) / "config.yaml").is_file()


def read_unchecked(run: str | Path, *keys: str) -> DictConfig | None:
    """As `config_of`, without checking its targets: only to compare and print. Without `keys` all
    keys.
    """
    if not is_run(run):
        return None
    content = OmegaConf.create(trust.data(Path(run) / "config.yaml", *keys))
    return paths.relocated(content, Path(run))


def secrets(cfg: DictConfig) -> dict[str, Any]:
    """Dotted key -> value of every secret, which `to_yaml` leaves out."""
    return secret.secrets_in(OmegaConf.to_container(cfg, resolve=True))


def to_yaml(cfg: DictConfig) -> bytes:
    """The configuration as YAML: every value resolved, and *** in place of secrets.

    `${` in a text is escaped, so that it stays text when the file is read.
    """
    tree = secret.masked_tree(OmegaConf.to_container(cfg, resolve=True))
    return OmegaConf.to_yaml(OmegaConf.create(escaped(tree))).encode()


def overrides() -> list[str]:
    """The overrides of the command line; in a sweep those of the current job."""
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else OmegaConf.create([])
    raw: Any = OmegaConf.to_container(task, resolve=False)
    both = zip(raw, task, strict=True)
    return [secret.resolved(text) if secret.TYPED in text else value for text, value in both]


def changes(before: DictConfig, now: DictConfig) -> dict[str, str]:
    """Dotted key -> `key=value (was ...)` for every value that has changed."""
    trees = (secret.masked_tree(OmegaConf.to_container(c, resolve=True)) for c in (before, now))
    both = (dotted(tree) for tree in trees)
    old, new = (
        {key: value for key, value in keys.items() if not isinstance(value, dict)} for keys in both
    )
    keys = (key for key in sorted(old | new) if old.get(key) != new.get(key))
    return {key: f"{key}={new.get(key)} (was {old.get(key)})" for key in keys}


def processes(cfg: DictConfig) -> int:
    """The number of training processes on all nodes."""
    devices = cfg.trainer.get("devices", 1)
    if devices in ("auto", -1, "-1"):
        import torch

        on_cpu = cfg.trainer.get("accelerator") == "cpu"
        devices = 1 if on_cpu else max(1, torch.cuda.device_count())  # as Lightning does
    count = len(devices) if isinstance(devices, ListConfig) else int(devices)
    return count * cfg.trainer.get("num_nodes", 1)


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a tree with its value; inner nodes have a key too."""
    found = {}
    for key, value in tree.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            found |= dotted(value, f"{prefix}{key}.")
    return found
