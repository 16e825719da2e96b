"""Checkpoint files: written atomically, read without pickle, merged from the shards of processes.

checkpoints/step_000250.ckpt     a file, or a folder with one part per process (FSDP2 on request)
checkpoints/best.ckpt            the best by a logged value, if one is configured
"""

import errno
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from distill.core.tensors import unsharded
from distill.machine import faults
from distill.machine.faults import first_line
from distill.storage.atomic import open_atomic
from distill.storage.bounded import check_archive
from distill.storage.checkpoint_names import checkpoints_at, steps_in
from distill.storage.loaded_weights import check_stored
from distill.terminal.shown import shown

log = logging.getLogger("distill.training.checkpoints")
# Windows cannot remove a memory-mapped file, but old checkpoints are removed.
MAPPED = os.name == "posix"
OURS = {"iteration": int, "images_seen": int, "skipped": int, "ema": Mapping}  # fields and types
LIGHTNING: dict[str, type] = {  # those that Lightning writes
    **{"global_step": int, "pytorch-lightning_version": str, "optimizer_states": list},
    **dict.fromkeys(("state_dict", "loops", "callbacks"), Mapping),
}


def write_checkpoint(state: Any, path: Path) -> None:
    """Write to a temporary file, flush to disk, rename: the final file is always complete.

    Raises OSError with a sentence for the user.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_atomic(path, flush=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a disk is full
        strerror = isinstance(error, OSError) and error.strerror
        reason = faults.write_error(error) or strerror or first_line(error)
        what = f"cannot write the checkpoint {path} ({reason})"
        hint = "earlier ones are unchanged: make room, then resume"
        if not steps_in(path.parent, ".ckpt"):
            hint = (
                f"there is no earlier one: make room, remove {path.parent.parent} and start again"
            )
        raise OSError(f"{what}; {hint}") from None
    _flush_renames(path.parent)


def _flush_renames(folder: Path) -> None:
    """Flush the names in this folder to disk; no effect on Windows, which cannot open folders."""
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The unsharded checkpoint at `path`, a file or a folder of shards.

    Raises ValueError if it is incomplete, or was not written by distill.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    for file in files:
        check_archive(file)
    try:
        parts = [
            torch.load(file, weights_only=True, map_location="cpu", mmap=MAPPED) for file in files
        ]
        for part, file in zip(parts, files, strict=True):
            check_stored((x for x in tree_leaves(part) if isinstance(x, Tensor)), file)
        state = unsharded(parts)
        if files[-1].name.endswith(".pt") and f"_of_{len(files):05d}" not in files[-1].name:
            raise KeyError("parts are missing")
        state["distill"]["iteration"]  # checkpoints of other programs do not have it
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except Exception as error:  # damaged files raise nearly anything; pickled code UnpicklingError
        raise ValueError(
            f"{path} is incomplete or no checkpoint of distill ({first_line(error, 90)})"
        ) from None
    return state


def check_fits(state: Mapping[str, Any], module: nn.Module, where: str) -> None:
    """Raise ValueError unless names and shapes in `state` match the module.

    The message starts with `where`, and names up to three differences.
    """
    expected = {name: list(x.shape) for name, x in module.state_dict().items()}
    found = {name: list(x.shape) for name, x in state.items()}
    problems = [f"it lacks {name}" for name in expected if name not in found]
    problems += [f"nothing here takes its {name}" for name in found if name not in expected]
    differing = (name for name in expected if name in found and expected[name] != found[name])
    problems += [f"its {name} is {found[name]} and {expected[name]} here" for name in differing]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        what = f"{where} is of another method, teacher, student or discriminator"
        raise ValueError(f"{what}: {'; '.join(problems[:3])}{more}")


def check_fields(state: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError, naming the file at `path`, for a checkpoint with fields of wrong types.

    Also for NaN in weights, checked at some values of every tensor. Missing fields are reported by
    the code that needs them.
    """
    ours, about = state["distill"], state.get("about", {})
    metadata = about if isinstance(about, Mapping) else {}
    kinds: list[tuple[str, Any, type | tuple[type, ...]]] = [
        *((key, ours[key], kind) for key, kind in OURS.items() if key in ours),
        *((key, state[key], kind) for key, kind in LIGHTNING.items() if key in state),
        ("about", about, Mapping),
        ("about.train_seconds", metadata.get("train_seconds") or 0.0, (int, float)),
        ("about.loggers", metadata.get("loggers") or {}, Mapping),
    ]
    for key, value, kind in kinds:
        if not isinstance(value, kind) or isinstance(value, bool) or _negative(value):
            what = f"has {key}={shown(value, 60)}, which no run writes"
            raise ValueError(f"{path}: {what}; name another checkpoint")
    for name, x in {**state.get("state_dict", {}), **ours.get("ema", {})}.items():
        if not isinstance(x, Tensor) or _is_nan(x):
            what = "is no tensor" if not isinstance(x, Tensor) else "is not a number"
            raise ValueError(f"{path}: its {shown(name, 60)} {what}; name an earlier checkpoint")


def _negative(value: Any) -> bool:
    return isinstance(value, int | float) and not value >= 0


def _is_nan(x: Tensor) -> bool:
    """Whether any of about 64 evenly spaced values is NaN."""
    if not x.is_floating_point() or not x.numel():
        return False
    return bool(x.flatten()[:: -(-x.numel() // 64)].float().isnan().any())


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint to resume from: `path` itself, or the newest usable one of a run folder.

    Damaged ones are named in a warning, and an earlier one is used. Raises FileNotFoundError if
    there is none, ValueError if none can be used.
    """
    found = checkpoints_at(path)
    problems: list[str] = []
    for candidate in found:
        try:
            check_fields(read_checkpoint(candidate), candidate)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            log.warning("%s; resuming from %s instead", "; ".join(problems), candidate.name)
        return candidate
    raise ValueError(f"resume={path}: no checkpoint can be used: {'; '.join(problems)}")
