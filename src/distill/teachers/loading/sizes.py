"""Size of a pipeline, from its files' headers, and memory of its decoder."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import torch

from distill.core.limits import AT_ONCE, FRAMES, at_once
from distill.machine.memory import peak
from distill.storage.bounded import check_header, mapping_of
from distill.teachers.loading import settings
from distill.teachers.loading.locate import home_of, index_of
from distill.teachers.loading.shapes_only import without_weights
from distill.terminal.shown import shown

VARIANTS = (".fp16.", ".bf16.", ".non_ema.")


def parameters(folder: Path) -> int:
    """Number of values in the safetensors files of a folder, from their headers; variants do not
    count.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if not any(v in file.name for v in VARIANTS)]
    return sum(map(_numbers, plain or files))


def _numbers(file: Path) -> int:
    """0 for a damaged file; loading it gives the error."""
    try:
        found = sum(math.prod(shape) for shape in _shapes(file).values())
    except (ValueError, TypeError, OverflowError):
        return 0
    return found if 0 <= found <= 2 * file.stat().st_size else 0  # two a byte are the most


def _shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a file, from its header; {} for a damaged or too large
    one.
    """
    try:
        check_header(file)
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            small = length < file.stat().st_size
            header = json.loads(opened.read(length)) if small else {}
        return {name: x["shape"] for name, x in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors in the safetensors files of a folder."""
    found: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= _shapes(file)
    return found


def shapes_by_config(path: Path, part: str) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a network of diffusers in a pipeline folder, by its
    configuration alone.
    """
    kind = getattr(diffusers, str(index_of(str(path))[part][1]))
    model = without_weights(kind, Path(home_of(path, part), part), torch.float32)
    return {name: list(x.shape) for name, x in model.state_dict().items()}


def of_pipeline(path: Path) -> dict[str, int]:
    """Part -> number of parameters, of a pipeline folder and its bases."""
    parts = [name for name, pair in index_of(str(path)).items() if isinstance(pair, list)]
    found = {name: parameters(Path(home_of(path, name), name)) for name in parts}
    return {name: count for name, count in found.items() if count}


def pixels_of(path: Path, denoiser: str) -> int | None:
    """Side in pixels of the pictures of a pipeline's training; None where its files lack it."""
    side = config_of(path, denoiser).get("sample_size")
    return side * cell_of(path) if isinstance(side, int) else None


def cell_of(path: Path) -> int:
    """Side of a latent in pixels."""
    return settings.cell_of(config_of(path, "vae"), str(path))


def config_of(path: Path, part: str) -> dict[str, Any]:
    file = Path(home_of(path, part), part, "config.json")
    return dict(mapping_of(file))


def decoding(
    path: Path, height: int, width: int, dtype: str, *, frames: int = 0, tiling: bool = False
) -> int:
    """Bytes that the decoder of a pipeline folder needs for pictures of this size in pixels, or for
    a video of so many `frames`, without its weights. `dtype` is the autoencoder's.

    In batches of `limits.at_once`, and in tiles above that size, as in `PipelineTeacher.pictures`.
    tiling: in tiles of any size, as the teacher's option.
    """
    config = config_of(path, "vae")
    name = str(config.get("_class_name"))
    if not name.startswith("Autoencoder") or not hasattr(diffusers, name):
        raise ValueError(f"{path}: its vae/ is a {shown(name, 60)}, no autoencoder of diffusers")
    kind = getattr(diffusers, name)
    precision = getattr(torch, dtype)
    vae: Any = without_weights(kind, Path(home_of(path, "vae"), "vae"), precision)
    if (tiling or height * width > AT_ONCE) and hasattr(vae, "enable_tiling"):
        vae.enable_tiling()
    channels = config.get("latent_channels") or config.get("z_dim") or 4
    times = [max(frames - 1, 0) // FRAMES + 1] if "temperal_downsample" in config else []
    sides = [side // cell_of(path) for side in (height, width)]
    shape = (at_once(height, width * max(frames, 1)), channels, *times, *sides)
    latents = torch.empty(shape, dtype=precision, device="meta")
    return peak(lambda: vae.decode(latents).sample)
