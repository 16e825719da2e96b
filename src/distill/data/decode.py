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

FORMATS = ("JPEG", "PNG", "WEBP")
IMAGES, CAPTIONS, LATENTS = ("jpg", "jpeg", "png", "webp"), ("txt", "json"), ("latent.npy", "latents.npy", "npy")


class BadSample(ValueError):
    """A raw sample that cannot be used: `name` is `<shard>:<key>`, `reason` says why."""

    def __init__(self, sample: dict, reason: str):
        self.name, self.reason = f"{sample['__url__']}:{sample['__key__']}", reason
        super().__init__(f"{self.name}: {reason}")


def image(sample: dict, size: int) -> Tensor:
    """The central square of the sample's image, resized to [3, size, size], RGB in [-1, 1].

    EXIF rotation is applied, transparency laid on white. Raises BadSample if there is none, it does not decode, or its
    shorter side is under half of `size`: enlarged that much, it would teach blur.
    """
    extension = _pick(sample, IMAGES, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # harmless oddities, told anew for every image; bombs are errors
            picture = _rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(sample[extension]), formats=FORMATS)))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise _undecodable(sample, extension, error) from None
    width, height = picture.size
    if 2 * (side := min(width, height)) < size:
        raise BadSample(sample, f"its image is {width} x {height}, under half of {size} a side")
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)  # cropped while resampling: a strip of 1 x 100,000 stays harmless
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(127.5).sub(1.0)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
        picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:  # what lies under full transparency is arbitrary: do not teach it
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def caption(sample: dict) -> str:
    """The sample's caption: its `.txt`, else `caption` or `text` of its `.json`. Raises BadSample if there is none."""
    extension = _pick(sample, CAPTIONS, "caption")
    try:
        text = sample[extension].decode("utf-8-sig")
        if extension == "json":
            record = json.loads(text)
            text = (record.get("caption") or record.get("text")) if isinstance(record, dict) else None
        str(text).encode()  # JSON can smuggle in half a surrogate pair, on which tokenizers fail
    except UnicodeError:
        raise BadSample(sample, f"its .{extension} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _undecodable(sample, extension, error) from None
    if not isinstance(text, str):
        raise BadSample(sample, f"its .{extension} has no text under 'caption' or 'text'")
    return text.strip()


def latent(sample: dict) -> Tensor:
    """The sample's latents, float32 [C, h, w], from its `.latent.npy`. Raises BadSample unless finite floats in 3-D."""
    extension = _pick(sample, LATENTS, "latents")
    try:
        array = np.lib.format.read_array(io.BytesIO(sample[extension]), allow_pickle=False)
    except Exception as error:  # a damaged header raises nearly anything, and one that claims any size MemoryError
        raise _undecodable(sample, extension, error) from None
    if array.ndim != 3 or array.dtype.kind != "f":
        raise BadSample(sample, f"its .{extension} is {array.dtype} {list(array.shape)}, not floats [C, h, w]")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and is refused below
        x = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not torch.isfinite(x).all():
        raise BadSample(sample, f"its .{extension} holds nan or inf")
    return x


def _pick(sample: dict, extensions: tuple[str, ...], what: str) -> str:
    for extension in extensions:
        if extension in sample:
            return extension
    there = ", ".join(sorted(key for key in sample if not key.startswith("__"))) or "nothing"
    raise BadSample(sample, f"it has no {what} ({', '.join(extensions)}), only {there}")


def _undecodable(sample: dict, extension: str, error: BaseException) -> BadSample:
    what = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return BadSample(sample, f"its .{extension} does not decode ({what})")
