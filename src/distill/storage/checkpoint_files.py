"""Checkpoint files: written whole or not at all, read without pickle, put together from the parts
of processes.

checkpoints/step_000250.ckpt     a file, or a folder with one part per process (FSDP2 on request)
checkpoints/best.ckpt            the best by a logged value, if one was named
"""

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.tensors import unsharded
from distill.machine import faults
from distill.machine.faults import first_line
from distill.storage.aside import opened_aside
from distill.storage.bounded import check_archive
from distill.storage.checkpoint_names import checkpoints_at, steps_in
from distill.terminal.shown import shown

log = logging.getLogger("distill.training.checkpoints")
# Windows does not remove a file that is mapped, and old checkpoints are removed
MAPPED = os.name == "posix"


def write(state: Any, path: Path) -> None:
    """Write beside, flush to disk, rename: a file of the final name is always complete.

    Raises OSError in words.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with opened_aside(path, flush=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a disk is full
        said = isinstance(error, OSError) and error.strerror
        reason = faults.reason(error) or said or first_line(error)
        what = f"cannot write the checkpoint {path} ({reason})"
        way = "those before it are untouched: make room, then resume"
        if not steps_in(path.parent, ".ckpt"):
            way = f"there is none before it: make room, remove {path.parent.parent} and begin anew"
        raise OSError(f"{what}; {way}") from None
    _flush_renames(path.parent)


def _flush_renames(folder: Path) -> None:
    """Have the disk know the names in this folder, where a system lets folders be opened.

    Windows does not.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems flush only files
            raise
    finally:
        os.close(opened)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, file or folder, whole.

    Raises ValueError if it is cut short or none of ours.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    for file in files:
        check_archive(file)
    try:
        parts = [
            torch.load(file, weights_only=True, map_location="cpu", mmap=MAPPED) for file in files
        ]
        kept = unsharded(parts)
        if files[-1].name.endswith(".pt") and f"_of_{len(files):05d}" not in files[-1].name:
            raise KeyError("parts are missing")
        kept["distill"]["iteration"]  # without it it is another program's
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except (
        Exception
    ) as error:  # damaged files raise nearly anything, and a pickle with code in it UnpicklingError
        raise ValueError(
            f"{path} is cut short or no checkpoint of distill ({first_line(error, 90)})"
        ) from None
    return kept


def check_fits(state: Mapping[str, Any], module: nn.Module, where: str) -> None:
    """Raise ValueError unless names and shapes in `state` are those of the module, naming some that
    differ.

    `where` begins the sentence.
    """
    own = {name: list(x.shape) for name, x in module.state_dict().items()}
    kept = {name: list(x.shape) for name, x in state.items()}
    problems = [f"it lacks {name}" for name in own if name not in kept]
    problems += [f"nothing here takes its {name}" for name in kept if name not in own]
    both = (name for name in own if name in kept and own[name] != kept[name])
    problems += [f"its {name} is {kept[name]} and {own[name]} here" for name in both]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        what = f"{where} is of another method, teacher, student or discriminator"
        raise ValueError(f"{what}: {'; '.join(problems[:3])}{more}")


def check_fields(kept: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, naming the file at `path`, for a checkpoint whose fields are not what a run
    has kept there.

    And for weights that are no numbers, by a few of every tensor. What is missing is for who takes
    it up.
    """
    own, about = kept["distill"], kept.get("about", {})
    said = about if isinstance(about, Mapping) else {}
    kinds: list[tuple[str, Any, type | tuple[type, ...]]] = [
        *((key, own.get(key), int) for key in ("iteration", "images_seen", "skipped")),
        ("global_step", kept.get("global_step"), int),
        ("pytorch-lightning_version", kept.get("pytorch-lightning_version"), str),
        *((key, kept.get(key), Mapping) for key in ("state_dict", "loops")),
        ("callbacks", kept.get("callbacks", {}), Mapping),
        ("optimizer_states", kept.get("optimizer_states"), list),
        ("ema", own.get("ema"), Mapping),
        ("about", about, Mapping),
        ("about.train_seconds", said.get("train_seconds") or 0.0, (int, float)),
        ("about.loggers", said.get("loggers") or {}, Mapping),
    ]
    for key, value, kind in kinds:
        if value is None:
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or _negative(value):
            what = f"says {key}={shown(value, 60)}, which no run keeps there"
            raise ValueError(f"{path}: {what}; name another checkpoint")
    for name, x in {**(kept.get("state_dict") or {}), **(own.get("ema") or {})}.items():
        if not isinstance(x, Tensor) or _is_nan(x):
            what = "is no tensor" if not isinstance(x, Tensor) else "is not a number"
            raise ValueError(f"{path}: its {shown(name, 60)} {what}; name an earlier checkpoint")


def _negative(value: Any) -> bool:
    return isinstance(value, int | float) and not value >= 0


def _is_nan(x: Tensor) -> bool:
    """Whether any of some 64 evenly spread values is none."""
    if not x.is_floating_point() or not x.numel():
        return False
    return bool(x.flatten()[:: -(-x.numel() // 64)].float().isnan().any())


def newest(path: Path) -> Path:
    """The checkpoint to go on from: `path` itself, or the newest of a run folder; a bad one is
    named and passed over.

    Raises FileNotFoundError if there is none, ValueError if none can be used.
    """
    found = checkpoints_at(path)
    problems: list[str] = []
    for candidate in found:
        try:
            check_fields(read(candidate), candidate)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("%s; going on from %s instead", "; ".join(problems), candidate.name)
        return candidate
    raise ValueError(f"resume={path}: no checkpoint can be used: {'; '.join(problems)}")
