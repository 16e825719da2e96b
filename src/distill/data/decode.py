"""Raw bytes of a sample -> pixels in [-1, 1], captions, latents, embeddings; otherwise `BadSample`.

A raw sample is what `shards` reads: {extension: bytes} with `__key__` and `__url__`. The bytes are
not trusted: nothing here unpickles, and only the image formats of `formats` are tried.
"""

import io
import json
import re
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core.types import EMBEDDED
from distill.data.bad import BadSample as BadSample
from distill.data.bad import Unread
from distill.data.folder import CAPTIONS, caption_of
from distill.data.shards import DOTTED
from distill.machine.faults import first_line
from distill.storage import formats
from distill.storage.pictures import to_rgb

LATENTS = ("latent.npy", "latents.npy", "npy")
HEAD = 2**16  # bytes that nearly always include the size
IN_MEMORY = re.compile(r"\s*<_io\.BytesIO object at 0x\w+>")  # Pillow's name for a file in memory
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


def image(sample: dict, width: int, height: int | None = None, *, part: str = "") -> Tensor:
    """The largest central crop of the image with the shape of width x height, resized: [3, height,
    width].

    RGB in [-1, 1]; height None is a square. EXIF rotation is applied, transparency composited on
    white, and the first frame taken. Raises BadSample if there is no image, it does not decode, or
    the crop is less than half as wide: enlarged that much, it would teach blur. `part` names one of
    several pictures of a sample: `source` reads `.source.png`.
    """
    extension, height = _image(sample, part), height or width
    data = io.BytesIO(_bytes(sample, extension))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # harmless; decompression bombs are errors
            picture = to_rgb(formats.open_picture(data, extension))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise _undecodable(sample, extension, error) from None
    has = picture.size
    across, down = min(has[0], has[1] * width / height), min(has[1], has[0] * height / width)
    if 2 * across < width:
        wanted = f"{width} a side" if width == height else f"{width} x {height}"
        raise BadSample(sample, f"its image is {has[0]} x {has[1]}, under half of {wanted}")
    left, top = (has[0] - across) / 2, (has[1] - down) / 2
    # Cropped while resampling: a strip of 1 x 100,000 needs no memory.
    box = (left, top, left + across, top + down)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return (
        torch.from_numpy(np.array(picture))
        .permute(2, 0, 1)
        .contiguous()
        .float()
        .div(127.5)
        .sub(1.0)
    )


def image_size(sample: dict, part: str = "") -> tuple[int, int]:
    """Width and height in pixels as displayed, from the image's first bytes.

    Raises BadSample if these do not suffice.
    """
    extension = _image(sample, part)
    data = io.BytesIO(_bytes(sample, extension))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = formats.open_picture(data, extension)
            formats.check_pixels(picture)
            # Pillow's size of a TIFF is as displayed. A PNG with EXIF after its pixels would be
            # read in full.
            check_exif = picture.format != "TIFF" and (
                picture.format != "PNG" or "exif" in picture.info
            )
            turned = check_exif and picture.getexif().get(0x0112) in SIDEWAYS
    except Exception as error:
        raise _undecodable(sample, extension, error) from None
    return picture.size[::-1] if turned else picture.size


def caption(sample: dict, key: str = "caption") -> str:
    """The caption: `.txt`, else `.caption`, else `caption` or `text` of the `.json`.

    Any other `key` is one of the `.json`. Raises BadSample if there is none.
    """
    plain = key == "caption"
    ends = CAPTIONS if plain else ("json",)
    extension = caption_of(sample, ends) or _pick(sample, ends, "caption")
    data, found = _bytes(sample, extension), {}
    try:
        text = data.decode("utf-8-sig")
        if extension.endswith("json"):
            record = json.loads(text)
            found = record if isinstance(record, dict) else {}
            keys = (key, "text") if plain else (key,)
            texts = [found[name] for name in keys if name in found]
            empty = bool(texts) and all(x in ("", None) for x in texts)  # null means no caption
            text = "" if empty else next((x for x in texts if x), None)
        str(text).encode()  # JSON can smuggle in half a surrogate pair, on which tokenizers fail
    except UnicodeError:
        raise BadSample(sample, f"its .{extension} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _undecodable(sample, extension, error) from None
    if not isinstance(text, str):
        where = "'caption' or 'text'" if plain else repr(key)
        has = ", ".join(name for name, value in found.items() if value and isinstance(value, str))
        also = f", only {has[:80]}: see data.caption_key" if has else ""
        raise BadSample(sample, f"its .{extension} has no text under {where}{also}")
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8
        raise BadSample(sample, f"its .{extension} is not UTF-8, or holds characters of number 0")
    return text.strip()


def latent(sample: dict) -> Tensor:
    """The latents, float32 [C, h, w], of a video [C, T, h, w], from `.latent.npy`.

    Raises BadSample unless they are finite floats in 3-D or 4-D.
    """
    extension = _pick(sample, LATENTS, "latents")
    array = _array(sample, extension)
    if array.ndim not in (3, 4) or array.dtype.kind != "f":
        raise BadSample(
            sample, f"its .{extension} is {array.dtype} {list(array.shape)}, not floats [C, h, w]"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and is refused below
        x = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not torch.isfinite(x).all():
        raise BadSample(sample, f"its .{extension} holds nan or inf")
    return x


def latent_size(sample: dict) -> tuple[int, int]:
    """Width and height of the latents, from the first bytes.

    Raises BadSample if these do not suffice.
    """
    extension = _pick(sample, LATENTS, "latents")
    file = io.BytesIO(_bytes(sample, extension))
    try:
        np.lib.format.read_magic(file)
        _, *_, height, width = np.lib.format.read_array_header_1_0(file)[0]
        assert width * height > 0, "it is empty"
        assert max(width, height) < 2**31, "no latents are so large"
    except Exception as error:
        raise _undecodable(sample, extension, error) from None
    return width, height


def embedding(sample: dict, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embedded caption, one `.npy` per tensor in `like`, of the same shapes without the first
    dimension.

    In half precision, as stored. Raises BadSample for a missing tensor, another shape, or values
    that are not finite.
    """
    found = {}
    for name in (name for name in EMBEDDED if name in like):
        array, shape = (
            _array(sample, _pick(sample, (f"{name}.npy",), "embedding")),
            list(like[name].shape[1:]),
        )
        if array.dtype != np.float16 or list(array.shape) != shape or not np.isfinite(array).all():
            what = (
                f"is {array.dtype} {list(array.shape)}, not finite float16 {shape} as the empty"
                " caption's"
            )
            raise BadSample(sample, f"its .{name}.npy {what}")
        found[name] = torch.from_numpy(array.copy())
    return found


def beside(sample: dict, sides: Sequence[int]) -> Tensor:
    """What an editing model reads beside the latents, float32 [C, h, w], from `.image.npy`.

    Raises BadSample unless they are finite floats of these sides, (h, w).
    """
    array = _array(sample, _pick(sample, ("image.npy",), "source latents"))
    right = array.ndim == 3 and array.dtype == np.float16 and array.shape[1:] == tuple(sides)
    if not right or not np.isfinite(array).all():
        wanted = f"not finite float16 [C, {', '.join(map(str, sides))}] as its latents"
        raise BadSample(sample, f"its .image.npy is {array.dtype} {list(array.shape)}, {wanted}")
    return torch.from_numpy(array.astype(np.float32))


def _array(sample: dict, extension: str) -> np.ndarray:
    data = io.BytesIO(_bytes(sample, extension))
    try:
        return np.lib.format.read_array(data, allow_pickle=False)
    except Exception as error:  # a damaged header may raise anything, MemoryError too
        raise _undecodable(sample, extension, error) from None


def _bytes(sample: dict, extension: str) -> bytes:
    """A file of the sample; raises BadSample for one that was too large to be read."""
    found = sample[extension]
    if isinstance(found, Unread):
        raise BadSample(sample, f"its .{extension} {found.reason}")
    return found


def _image(sample: dict, part: str = "") -> str:
    """The extension of the sample's image, or of the one named `part`."""
    ends = formats.suffixes()
    if part:
        return _pick(sample, tuple(f"{part}.{end}" for end in ends), f"{part} picture")
    extension = next((end for end in ends if end in sample), None)
    if extension:
        return extension
    there = _there(sample)
    hint = ""
    if any("." in end and end.rpartition(".")[2] in ends for end in sample):
        hint = f"; {DOTTED}"
    elif other := [end for end in sample if formats.is_unreadable(end)]:
        hint = f"; {formats.advice(other)}"
    raise BadSample(sample, f"it has no image ({formats.suffix_list()}), only {there}{hint}")


def _pick(sample: dict, extensions: tuple[str, ...], what: str) -> str:
    for extension in extensions:
        if extension in sample:
            return extension
    raise BadSample(sample, f"it has no {what} ({', '.join(extensions)}), only {_there(sample)}")


def _there(sample: dict) -> str:
    return ", ".join(sorted(key for key in sample if not key.startswith("__"))) or "nothing"


def _undecodable(sample: dict, extension: str, error: BaseException) -> BadSample:
    said = IN_MEMORY.sub("", first_line(error, 200))[:120]
    why = said if _bytes(sample, extension) else "it is empty, of 0 bytes"
    return BadSample(sample, f"its .{extension} does not decode ({why})")
