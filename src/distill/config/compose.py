"""What is done with a configuration before anything is built: safe instantiation, paths, run
folders, going on.

Nothing here imports torch, so that commands can refuse a mistake at once.
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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

import distill.worlds.shapes
from distill.config import paths, texts, trust
from distill.config.paths import SHIPPED, escaped
from distill.machine.ranks import rank, world
from distill.storage.checkpoint_names import steps_in
from distill.teachers.loading.locate import near
from distill.terminal import secret
from distill.terminal.shown import shown
from distill.training import run_folders as folders

SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
# a path `shapes:name` means the model or shards of this name inside the package
# In a defaults list: what a teacher is of, `shapes_unet` like `shapes`.
OmegaConf.register_new_resolver("world", lambda teacher: teacher.partition("_")[0], replace=True)
# Once a run has begun.
FIXED = ("method", "teacher", "student", "discriminator", "seed", "optimizer.head_start")


def make(node: DictConfig, key: str) -> Any:
    """The one way to instantiate: the node at a dotted key, of what `trust` lets that hold.

    Its containers are plain, and shipped paths absolute. Texts that hold `${` go past OmegaConf, to
    which they would be interpolations.
    """
    tree = allowed(node, key)
    if not (held := paths.verbatim(tree)):
        return instantiate(OmegaConf.create(tree), _convert_="all")
    rest = {name: value for name, value in tree.items() if name not in held}
    build = instantiate(OmegaConf.create({**rest, "_partial_": True}), _convert_="all")
    return functools.partial(build, **held) if tree.get("_partial_") else build(**held)


def allowed(node: DictConfig, key: str = "") -> Any:
    """The node as plain containers, every value resolved. Raises ValueError for what no
    configuration may hold.

    That is: a target that its key may not hold, a key that its target does not take (with the
    nearest that it does), and text that would become an interpolation when it is read again, behind
    the check's back.
    """
    return _allowed(OmegaConf.to_container(node, resolve=True, throw_on_missing=True), key)


def _allowed(value: Any, path: str) -> Any:
    if isinstance(value, str):
        if "${" not in value:
            return shipped(value)
        if trust.WORDS.fullmatch(path):
            return value
        file = "rename it, or give a link to it" if paths.is_path(path) else "write it otherwise"
        raise ValueError(f"{path}={value}: must not hold ${{, an interpolation's; {file}")
    if isinstance(value, list):
        return [_allowed(inner, f"{path}.{i}") for i, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" in value:
        name = str(value["_target_"])
        takes = inspect.signature(_target(name, path)).parameters
        unknown = sorted(set(map(str, value)) - set(takes) - SPECIAL)
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise ValueError(
                f"{unknown[0]}: {name} takes no such key{nearest(unknown[0], takes)}; leave it out"
            )
    return {key: _allowed(inner, f"{path}.{key}" if path else key) for key, inner in value.items()}


def _target(name: str, path: str) -> Any:
    """The class or function of this name: what the key may hold, not whatever a module imports."""
    trust.check_target(name, path)
    try:
        found = get_object(name)
    except Exception:  # Hydra wraps whatever an import raises
        raise ValueError(
            f"{path}._target_: {name}: there is nothing of this name; check how it is written"
        ) from None
    trust.check_made(found, name, path)
    return found


def check_counts(cfg: DictConfig, counts: Mapping[str, int]) -> None:
    """Raise ValueError unless the value of each key is a whole number, and not under the least that
    is given here.
    """
    for key, least in counts.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{key}={value}: must be a whole number, {least} or more")
        if value is not None and value >= 2**63:
            raise ValueError(f"{key}={value}: must be a whole number below 2**63")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` for the most alike of the known names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shipped(path: str) -> str:
    """`shapes:mmdit` -> the folder in the package, `~/x` -> that of the user; any other path
    unchanged.
    """
    if path.startswith("~/"):
        return os.path.expanduser(path)
    if not path.startswith(SHIPPED):
        return path
    folder = Path(distill.worlds.shapes.__file__).parent / "models" / path.removeprefix(SHIPPED)
    if not folder.exists():
        known = sorted(p.name for p in folder.parent.glob("*"))
        raise FileNotFoundError(
            f"{path}: nothing of this name is shipped; there is {', '.join(known)}"
        )
    return str(folder)


def file_name(text: str) -> str:
    """A text as part of a file's name: letters, digits, `.`, `-` and `_`, as every system takes
    them.

    It has at most 180 bytes, of the 255 that are possible, and no letters that the locale lacks.
    What these limits change is told apart by a hash of the text.
    """
    plain = re.sub(r"[^\w.-]+", "_", text).strip("._")
    encoding = sys.getfilesystemencoding()
    kept = plain.encode(encoding, "ignore")[:180].decode(encoding, "ignore")
    if kept == plain:
        return plain
    mark = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{kept}_{mark}".lstrip("_")


def name_of(cfg: DictConfig) -> str:
    """`name`, or `<method>_<teacher>` as chosen on the command line."""
    if cfg.name or not HydraConfig.initialized():
        return cfg.name or "run"
    return "{method}_{teacher}".format(**HydraConfig.get().runtime.choices)


def run_folder(cfg: DictConfig) -> Path:
    """The folder of this run, made: `resume`, `run_dir`, SLURM's `runs/slurm_<job>_<name>` or a
    fresh one by date.
    """
    if cfg.resume:
        return folder_of(cfg.resume)
    if (folder := _own_folder(cfg)) is None and "RANK" in os.environ:
        raise ValueError(
            "run_dir=null: torchrun starts every process by itself; set run_dir, so that all write"
            " there"
        )
    if folder is None:
        name = file_name(name_of(cfg))
        return _fresh_folder(f"runs/{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{name}")
    refuse_taken(cfg)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"run_dir={folder} cannot be made ({error.strerror}); choose another run_dir="
        ) from None
    return folder


def refuse_taken(cfg: DictConfig) -> None:
    """Raise FileExistsError if the folder that a new run is to have holds a run already, or files
    of anybody's.
    """
    folder = None if cfg.resume else _own_folder(cfg)
    if folder is None or rank() != 0 or restarted():
        return
    others = folders.foreign(folder)
    if not others:
        return
    if not (folder / "config.yaml").exists():
        what = (
            f"is not empty (it has {shown(others[0], 60)}), and a run would write over what is"
            " there"
        )
        raise FileExistsError(f"run_dir={folder}: {what}; name another run_dir=, or empty it")
    kept = any((folder / "checkpoints").glob("step_*.ckpt"))
    how = f"resume={folder}" if kept else "remove it, for it has no checkpoint to go on from"
    raise FileExistsError(f"run_dir={folder} holds a run already; choose another run_dir= or {how}")


def _own_folder(cfg: DictConfig) -> Path | None:
    """The one that every process of the command knows, and the job when it is started again, if
    there is such.
    """
    if cfg.run_dir or "SLURM_PROCID" not in os.environ:
        return Path(cfg.run_dir) if cfg.run_dir else None
    if world() == 1 and os.environ.get("SLURM_JOB_NAME") in (
        "bash",
        "interactive",
    ):  # a shell, for many runs
        return None
    sweep = OmegaConf.select(HydraConfig.get(), "job.num") if HydraConfig.initialized() else None
    stem = f"slurm_{os.environ['SLURM_JOB_ID']}_{file_name(name_of(cfg))}"
    return Path("runs") / (stem if sweep is None else f"{stem}_{sweep}")


def restarted() -> bool:
    """Whether SLURM runs this job again, after a preemption or because the run asked for it."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def requeued(cfg: DictConfig) -> str | None:
    """The run that a job which SLURM runs again goes on with: the one in its own folder, if it has
    a checkpoint.
    """
    folder = _own_folder(cfg) if restarted() else None
    found = (
        folder and (folder / "config.yaml").exists() and steps_in(folder / "checkpoints", ".ckpt")
    )
    return str(folder) if found else None


def _fresh_folder(stem: str) -> Path:
    """One that nobody has, with a number behind its name if another run began in this second."""
    for i in itertools.count(1):
        folder = Path(stem if i == 1 else f"{stem}-{i}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def folder_of(resume: str) -> Path:
    """The run folder that `resume`, a run folder or one of its checkpoints, lies in."""
    return run_at(
        str(Path(resume).parent.parent) if resume.endswith(".ckpt") else resume, key="resume"
    )


def run_at(path: str, key: str = "run") -> Path:
    """The run folder at this path. Raises FileNotFoundError, naming `key`, if it is none."""
    if not (Path(path) / "config.yaml").is_file():
        what = f"not a run folder (it has no config.yaml){near(path)}"
        raise FileNotFoundError(f"{key}={path}: {what}")
    return Path(path)


def config_of(run: str | Path, key: str, *keys: str) -> DictConfig | None:
    """These keys of a run folder's configuration, by `trust.read`; None of what is no run.

    Its paths are found where they moved along with it.
    """
    if not is_run(run):
        return None
    file = Path(run) / "config.yaml"
    found = paths.located(trust.read(file, key, *keys), Path(run))
    texts.check_places(found, file)
    return found


def is_run(path: str | Path) -> bool:
    """Whether this is a run folder."""
    return (Path(path) / "config.yaml").is_file()


def looked_at(run: str | Path, *keys: str) -> DictConfig | None:
    """As `config_of`, all keys unless given, to compare and print alone: its targets are not
    checked.
    """
    if not is_run(run):
        return None
    said = OmegaConf.create(trust.data(Path(run) / "config.yaml", *keys))
    return paths.located(said, Path(run))


def secrets(cfg: DictConfig) -> dict[str, Any]:
    """Dotted key -> value, of what `written` leaves out."""
    return secret.found(OmegaConf.to_container(cfg, resolve=True))


def written(cfg: DictConfig) -> bytes:
    """The configuration as a file has it: every value resolved, and *** for what is secret.

    A text that holds `${` is a text there too, and refers to nothing.
    """
    tree = secret.hidden(OmegaConf.to_container(cfg, resolve=True))
    return OmegaConf.to_yaml(OmegaConf.create(escaped(tree))).encode()


def overrides() -> list[str]:
    """What the command line says, of one job where it is a sweep."""
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else OmegaConf.create([])
    raw: Any = OmegaConf.to_container(task, resolve=False)
    both = zip(raw, task, strict=True)
    return [secret.restored(word) if secret.TYPED in word else said for word, said in both]


def changes(before: DictConfig, now: DictConfig) -> dict[str, str]:
    """Dotted key -> `key=value (was ...)`, for every value that is not as before."""
    trees = (secret.hidden(OmegaConf.to_container(c, resolve=True)) for c in (before, now))
    both = (dotted(tree) for tree in trees)
    old, new = (
        {key: value for key, value in keys.items() if not isinstance(value, dict)} for keys in both
    )
    keys = (key for key in sorted(old | new) if old.get(key) != new.get(key))
    return {key: f"{key}={new.get(key)} (was {old.get(key)})" for key in keys}


def processes(cfg: DictConfig) -> int:
    """How many processes train, over all nodes."""
    devices = cfg.trainer.get("devices", 1)
    if devices in ("auto", -1, "-1"):
        import torch

        devices = (
            1 if cfg.trainer.get("accelerator") == "cpu" else max(1, torch.cuda.device_count())
        )  # as Lightning
    count = len(devices) if isinstance(devices, ListConfig) else int(devices)
    return count * cfg.trainer.get("num_nodes", 1)


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a tree with its value, those of inner nodes as well."""
    found = {}
    for key, value in tree.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            found |= dotted(value, f"{prefix}{key}.")
    return found
