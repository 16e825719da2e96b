"""From a raw sample's bytes to values: pixels in [-1, 1], captions, latents. What cannot be decoded is a `BadSample`.

A raw sample is what `shards` reads: {extension: bytes} with `__key__` and `__url__`. The bytes come from anywhere, so
nothing here unpickles, and only the image formats named in `FORMATS` are tried.
"""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
LATENTS = ("latent.npy", "latents.npy", "npy")


class BadSample(ValueError):
    """A sample that cannot be used: `name` is `<shard>:<key>`, `reason` says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both in args: so it survives pickling between processes
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def name_of(sample: dict) -> str:
    """`<shard>:<key>`, the name of a sample in messages."""
    return f"{sample['__url__']}:{sample['__key__']}"


def image(sample: dict, size: int | None = None) -> Tensor:
    """The sample's image [3, H, W] in [-1, 1], RGB; with `size` the central square, resized to [3, size, size].

    EXIF rotation is applied, transparency laid on white. Raises BadSample if there is none, it does not decode, or its
    shorter side is under half of `size`: enlarged that much, it would teach blur.
    """
    extension = _pick(sample, tuple(FORMATS), "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # harmless oddities, told anew for every image; bombs are errors
            file = Image.open(io.BytesIO(sample[extension]), formats=tuple(set(FORMATS.values())))
            picture = _rgb(ImageOps.exif_transpose(file))
        small = size is not None and 2 * min(picture.size) < size
        picture = picture if size is None or small else _square(picture, size)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadSample(name_of(sample), f"its .{extension} does not decode ({_first_line(error)})") from None
    if small:
        raise BadSample(
            name_of(sample), f"its image is {picture.width} x {picture.height}, under half of {size} a side"
        )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(127.5).sub(1.0)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
        picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:  # what lies under full transparency is arbitrary: do not teach it
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _square(picture: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, then centre crop, in one resampling: a strip of 1 x 100,000 pixels stays harmless."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def caption(sample: dict) -> str:
    """The sample's caption: its `.txt`, else `caption` or `text` of its `.json`. Raises BadSample if there is none."""
    extension = _pick(sample, ("txt", "json"), "caption")
    try:
        text = sample[extension].decode("utf-8-sig") if extension == "txt" else _from_json(sample[extension])
        text.encode("utf-8")  # JSON can smuggle in half a surrogate pair, on which tokenizers fail
    except (ValueError, RecursionError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeError) else f"gives no caption ({_first_line(error)})"
        raise BadSample(name_of(sample), f"its .{extension} {reason}") from None
    return text.strip()


def _from_json(data: bytes) -> str:
    record = json.loads(data)
    text = (record.get("caption") or record.get("text")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError("no text under 'caption' or 'text'")
    return text


def latent(sample: dict) -> Tensor:
    """The sample's latents, float32 [C, h, w], from its `.latent.npy`. Raises BadSample unless finite floats in 3-D."""
    extension = _pick(sample, LATENTS, "latents")
    try:
        array = np.lib.format.read_array(io.BytesIO(sample[extension]), allow_pickle=False)
    except Exception as error:  # a damaged header raises nearly anything, and one that claims any size MemoryError
        raise BadSample(name_of(sample), f"its .{extension} does not decode ({_first_line(error)})") from None
    if array.ndim != 3 or array.dtype.kind != "f":
        reason = f"its .{extension} is {array.dtype} {list(array.shape)}, not floats [C, h, w]"
        raise BadSample(name_of(sample), reason)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and is refused below
        x = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not torch.isfinite(x).all():
        raise BadSample(name_of(sample), f"its .{extension} holds nan or inf")
    return x


def _pick(sample: dict, extensions: tuple[str, ...], what: str) -> str:
    for extension in extensions:
        if extension in sample:
            return extension
    there = ", ".join(sorted(key for key in sample if not key.startswith("__"))) or "nothing"
    raise BadSample(name_of(sample), f"it has no {what} ({', '.join(extensions)}), only {there}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
