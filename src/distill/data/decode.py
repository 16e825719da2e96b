"""Raw bytes of a sample -> pixels in [-1, 1], captions, latents, embeddings; otherwise `BadSample`.

What needs no torch is in `raw`. The bytes are not trusted: nothing here unpickles, and only the
image formats of `formats` are tried.
"""

import io
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core.types import EMBEDDED
from distill.data.bad import BadSample
from distill.data.raw import (
    LATENTS,
    array_of,
    bytes_of,
    check_large,
    pick,
    suffix_of_image,
    undecodable,
)
from distill.storage import formats
from distill.storage.pictures import to_rgb


def image(sample: dict, width: int, height: int | None = None, *, part: str = "") -> Tensor:
    """The largest central crop of the image with the shape of width x height, resized: [3, height,
    width].

    RGB in [-1, 1]; height None is a square of data.size. EXIF rotation is applied, transparency
    composited on white, and the first frame taken. Raises BadSample if there is no image, it does
    not decode, or it is too small. `part` names one of several pictures of a sample: `source` reads
    `.source.png`.
    """
    extension = suffix_of_image(sample, part)
    data = io.BytesIO(bytes_of(sample, extension))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # harmless; decompression bombs are errors
            picture = to_rgb(formats.open_picture(data, extension))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise undecodable(sample, extension, error) from None
    has = picture.size
    check_large(sample, has, width, height)
    height = height or width
    across, down = min(has[0], has[1] * width / height), min(has[1], has[0] * height / width)
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


def latent(sample: dict) -> Tensor:
    """The latents, float32 [C, h, w], of a video [C, T, h, w], from `.latent.npy`.

    Raises BadSample unless they are finite floats in 3-D or 4-D.
    """
    extension = pick(sample, LATENTS, "latents")
    array = array_of(sample, extension)
    if array.ndim not in (3, 4) or array.dtype.kind != "f":
        raise BadSample(
            sample, f"its .{extension} is {array.dtype} {list(array.shape)}, not floats [C, h, w]"
        )
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes inf and is refused below
        x = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    if not torch.isfinite(x).all():
        raise BadSample(sample, f"its .{extension} holds nan or inf")
    return x


def embedding(sample: dict, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embedded caption, one `.npy` per tensor in `like`, of the same shapes without the first
    dimension.

    In half precision, as stored. Raises BadSample for a missing tensor, another shape, or values
    that are not finite.
    """
    found = {}
    for name in (name for name in EMBEDDED if name in like):
        array, shape = (
            array_of(sample, pick(sample, (f"{name}.npy",), "embedding")),
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
    array = array_of(sample, pick(sample, ("image.npy",), "source latents"))
    right = array.ndim == 3 and array.dtype == np.float16 and array.shape[1:] == tuple(sides)
    if not right or not np.isfinite(array).all():
        wanted = f"not finite float16 [C, {', '.join(map(str, sides))}] as its latents"
        raise BadSample(sample, f"its .image.npy is {array.dtype} {list(array.shape)}, {wanted}")
    return torch.from_numpy(array.astype(np.float32))
