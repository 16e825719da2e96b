"""From a raw sample's bytes to values: pixels in [-1, 1], captions, latents, embeddings. The rest is a `BadSample`.

A raw sample is what `shards` reads: {extension: bytes} with `__key__` and `__url__`. The bytes come from anywhere, so
nothing here unpickles, and only the image formats named in `FORMATS` are tried.
"""

import io
import json
import warnings

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.data.shards import CAPTIONS, IMAGES
from distill.files import first_line, upright
from distill.types import EMBEDDED

FORMATS = ("JPEG", "PNG", "WEBP")
LATENTS = ("latent.npy", "latents.npy", "npy")
HEAD = 2**16  # bytes in which a file says what size it has, nearly always
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


class BadSample(ValueError):
    """A raw sample that cannot be used: `name` is `<shard>:<key>`, `reason` says why."""

    def __init__(self, sample: dict, reason: str):
        self.name, self.reason = f"{sample['__url__']}:{sample['__key__']}", reason
        super().__init__(f"{self.name}: {reason}")


def image(sample: dict, width: int, height: int | None = None) -> Tensor:
    """The largest central part of the sample's image with the shape of width x height (None: a square), resized to it:
    [3, height, width], RGB in [-1, 1].

    EXIF rotation is applied, transparency laid on white. Raises BadSample if there is none, it does not decode, or the
    part is under half as wide: enlarged that much, it would teach blur.
    """
    extension, height = _pick(sample, IMAGES, "image"), height or width
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # harmless oddities, told anew for every image; bombs are errors
            picture = upright(Image.open(io.BytesIO(sample[extension]), formats=FORMATS))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise _undecodable(sample, extension, error) from None
    has = picture.size
    across, down = min(has[0], has[1] * width / height), min(has[1], has[0] * height / width)
    if 2 * across < width:
        wanted = f"{width} a side" if width == height else f"{width} x {height}"
        raise BadSample(sample, f"its image is {has[0]} x {has[1]}, under half of {wanted}")
    left, top = (has[0] - across) / 2, (has[1] - down) / 2
    box = (
        left,
        top,
        left + across,
        top + down,
    )  # cropped while resampling: a strip of 1 x 100,000 stays harmless
    picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return (
        torch.from_numpy(np.array(picture))
        .permute(2, 0, 1)
        .contiguous()
        .float()
        .div(127.5)
        .sub(1.0)
    )


def image_size(sample: dict) -> tuple[int, int]:
    """Width and height in pixels as shown, from the image's first bytes. Raises BadSample if these do not say it."""
    extension = _pick(sample, IMAGES, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(sample[extension]), formats=FORMATS)
            turned = (
                picture.format != "PNG" and picture.getexif().get(0x0112) in SIDEWAYS
            )  # a PNG would be read whole
    except Exception as error:
        raise _undecodable(sample, extension, error) from None
    return picture.size[::-1] if turned else picture.size


def caption(sample: dict, key: str = "caption") -> str:
    """The sample's caption: its `.txt`, else `caption` or `text` of its `.json`; any other `key` of the `.json` alone.

    Raises BadSample if there is none.
    """
    plain = key == "caption"
    extension = _pick(sample, CAPTIONS if plain else ("json",), "caption")
    try:
        text = sample[extension].decode("utf-8-sig")
        if extension == "json":
            record = json.loads(text)
            found = record if isinstance(record, dict) else {}
            text = found.get(key) or (found.get("text") if plain else None)
        str(text).encode()  # JSON can smuggle in half a surrogate pair, on which tokenizers fail
    except UnicodeError:
        raise BadSample(sample, f"its .{extension} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _undecodable(sample, extension, error) from None
    if not isinstance(text, str):
        where = "'caption' or 'text'" if plain else repr(key)
        raise BadSample(sample, f"its .{extension} has no text under {where}")
    return text.strip()


def latent(sample: dict) -> Tensor:
    """The sample's latents, float32 [C, h, w], from its `.latent.npy`. Raises BadSample unless finite floats in 3-D."""
    extension = _pick(sample, LATENTS, "latents")
    array = _array(sample, extension)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise BadSample(
            sample, f"its .{extension} is {array.dtype} {list(array.shape)}, not floats [C, h, w]"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and is refused below
        x = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not torch.isfinite(x).all():
        raise BadSample(sample, f"its .{extension} holds nan or inf")
    return x


def latent_size(sample: dict) -> tuple[int, int]:
    """Width and height of the sample's latents, from the first bytes. Raises BadSample if these do not say it."""
    extension = _pick(sample, LATENTS, "latents")
    try:
        file = io.BytesIO(sample[extension])
        np.lib.format.read_magic(file)
        _, height, width = np.lib.format.read_array_header_1_0(file)[0]
        assert width * height > 0, "it is empty"
    except Exception as error:
        raise _undecodable(sample, extension, error) from None
    return width, height


def embedding(sample: dict, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sample's embedded caption, a `.npy` a tensor: those in `like`, of these shapes but for the first dimension.

    In half precision, as it is kept. Raises BadSample if one is not there, of another shape, or not finite.
    """
    found = {}
    for name in (name for name in EMBEDDED if name in like):
        array, shape = (
            _array(sample, _pick(sample, (f"{name}.npy",), "embedding")),
            list(like[name].shape[1:]),
        )
        if array.dtype != np.float16 or list(array.shape) != shape or not np.isfinite(array).all():
            what = f"is {array.dtype} {list(array.shape)}, not finite float16 {shape} as the empty caption's"
            raise BadSample(sample, f"its .{name}.npy {what}")
        found[name] = torch.from_numpy(array.copy())
    return found


def _array(sample: dict, extension: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(sample[extension]), allow_pickle=False)
    except (
        Exception
    ) as error:  # a damaged header raises nearly anything, and one that claims any size MemoryError
        raise _undecodable(sample, extension, error) from None


def _pick(sample: dict, extensions: tuple[str, ...], what: str) -> str:
    for extension in extensions:
        if extension in sample:
            return extension
    there = ", ".join(sorted(key for key in sample if not key.startswith("__"))) or "nothing"
    raise BadSample(sample, f"it has no {what} ({', '.join(extensions)}), only {there}")


def _undecodable(sample: dict, extension: str, error: BaseException) -> BadSample:
    return BadSample(sample, f"its .{extension} does not decode ({first_line(error, 120)})")
