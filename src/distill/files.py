"""Checkpoint files: written whole or not at all, read without pickle, cut up and put together among processes. Besides
them small files, pictures, and what is said while any file is read.

checkpoints/step_000250.ckpt     a file, or a folder with one part per process (FSDP2 on request)
checkpoints/best.ckpt            the best by a logged value, if one was named
"""

import errno
import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from torchvision.utils import save_image

from distill import faults, formats
from distill.aside import aside, put, put_in_place
from distill.bounded import check_archive
from distill.limits import checkpoints_at, steps_in
from distill.shown import shown

log = logging.getLogger("distill.checkpoint")
CUT = "cut along dimension 0"  # key under which a process keeps its part of a tensor
MAPPED = (
    os.name == "posix"
)  # Windows does not remove a file that is mapped, and old checkpoints are removed


def write(state: Any, path: Path) -> None:
    """Write beside, flush to disk, rename: a file of the final name is always complete. Raises OSError in words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = aside(path)
    try:
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when a disk is full
        part.unlink(missing_ok=True)
        said = isinstance(error, OSError) and error.strerror
        reason = faults.reason(error) or said or first_line(error)
        what = f"cannot write the checkpoint {path} ({reason})"
        way = "those before it are untouched: make room, then resume"
        if not steps_in(path.parent, ".ckpt"):
            way = f"there is none before it: make room, remove {path.parent.parent} and begin anew"
        raise OSError(f"{what}; {way}") from None
    _flush_renames(path.parent)


def _flush_renames(folder: Path) -> None:
    """Have the disk know the names in this folder, where a system lets folders be opened. Windows does not."""
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


def fingerprint(module: nn.Module) -> str:
    """Twelve hex digits of names, shapes and an even choice of at most 64 values of every tensor, on any device."""
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        digest.update(f"{name}{list(x.shape)}".encode())
        some = x.flatten()[:: -(-x.numel() // 64) or 1].cpu()  # where there is float64
        digest.update(str(some.double().tolist()).encode())
    return digest.hexdigest()[:12]


def upright(picture: Image.Image) -> Image.Image:
    """As RGB: turned as its EXIF says, transparency on white, 16-bit grey scaled.

    Raises ValueError for too many pixels, of which a JPEG's are decoded fewer (see `formats.reduced`), and for numbers
    whose white is not known: floats, and integers of more than 16 bits.
    """
    picture = ImageOps.exif_transpose(formats.reduced(picture))
    if picture.mode == "F":  # Pillow would clip it, to black where it lies in [0, 1]
        raise ValueError("its pixels are floats; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # Pillow would clip it to white
        grey = np.asarray(picture)
        if grey.size and (grey.min() < 0 or grey.max() >= 2**16):
            raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits")
        picture = Image.fromarray((grey // 256).astype(np.uint8))
    if (
        picture.has_transparency_data
    ):  # what lies under full transparency is arbitrary: do not teach it
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture.convert("RGB")


def put_grid(pictures: Tensor, path: Path, nrow: int) -> None:
    """Pictures [N, 3, H, W] in [0, 1] as one PNG, `nrow` of them in a row, there only when whole."""
    save_image(pictures, content := io.BytesIO(), nrow=nrow, format="png")
    put(path, content.getvalue())


@contextmanager
def silent() -> Iterator[None]:
    """What libraries would warn of in several lines as they read, who calls makes one sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error says first, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def duplicate(path: Path, to: Path) -> None:
    """Give a file or folder a second name, which replaces what has it; without using room where files can be linked."""
    part = aside(to)
    if path.is_dir():
        shutil.copytree(path, part, copy_function=_link)
    else:
        _link(path, part)
    if to.is_dir() or path.is_dir():
        put_in_place(part, to)
    else:
        part.replace(to)


def _link(path: str | Path, to: str | Path) -> None:
    try:
        Path(to).hardlink_to(path)
    except (OSError, NotImplementedError):  # exFAT, for one, has no links
        shutil.copyfile(path, to)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, file or folder, whole. Raises ValueError if it is cut short or none of ours."""
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    for file in files:
        check_archive(file)
    try:
        parts = [
            torch.load(file, weights_only=True, map_location="cpu", mmap=MAPPED) for file in files
        ]
        kept = joined(parts)
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
    """Raise ValueError unless names and shapes in `state` are those of the module, naming some that differ.

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
    """Raise ValueError, naming the file at `path`, for a checkpoint whose fields are not what a run has kept there.

    And for weights that are no numbers, by a few of every tensor. What is missing is for who takes it up.
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
    """The checkpoint to go on from: `path` itself, or the newest of a run folder; a bad one is named and passed over.

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


# -- tensors that several processes share ------------------------------------------------------------------------------


def whole(x: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes, which must all call this; any other stays as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(value: Tensor, target: Tensor) -> Tensor:
    """A tensor as `target` keeps it: on its device, and cut among the processes or not."""
    value = value.to(target.device)
    if isinstance(value, DTensor) or not isinstance(target, DTensor):
        return value
    return distribute_tensor(value, target.device_mesh, target.placements)


def gathered(tree: Any, *, keep: bool) -> Any:
    """Every tensor whole and on the CPU; all processes must call this, those with `keep` get the result."""

    def take(x: Tensor) -> Tensor | None:
        x = whole(x)  # one after the other: together they may not fit on the device
        return x.cpu() if keep else None

    return tree_map_only(Tensor, take, tree)


def split(tree: Any) -> Any:
    """This process's parts of all cut tensors, and all others, on the CPU."""
    return tree_map_only(
        Tensor, lambda x: {CUT: x.to_local().cpu()} if isinstance(x, DTensor) else x.cpu(), tree
    )


def joined(parts: list[Any]) -> Any:
    """The inverse of `split`, from the parts of all processes in the order of their ranks."""
    first = parts[0]
    if isinstance(first, dict) and CUT in first:
        return torch.cat([part[CUT] for part in parts])
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    return (
        [joined(list(of)) for of in zip(*parts, strict=True)] if isinstance(first, list) else first
    )
