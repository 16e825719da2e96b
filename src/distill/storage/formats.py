"""Picture formats that are read, and advice for others. Nothing here imports torch.

The content of a file decides its format, not its suffix. Only the formats below are tried: for some
others, such as EPS, Pillow starts another program.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, features

from distill.core import limits
from distill.storage import headers

# Suffix -> Pillow's format. If a sample of a shard has several pictures, the first in this order is
# read.
FORMAT_OF = {
    "jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "avif": "AVIF", "jxl": "JXL",
    "heic": "HEIF", "heif": "HEIF", "tif": "TIFF", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF",
    "jfif": "JPEG", "jpe": "JPEG", "apng": "PNG", "jp2": "JPEG2000", "j2k": "JPEG2000",
    "ppm": "PPM", "pgm": "PPM", "pnm": "PPM", "qoi": "QOI", "tga": "TGA",
}  # fmt: skip
# Formats that are optional in builds of Pillow -> name of the feature.
BUILT = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000", "JPEG": "jpg", "PNG": "zlib"}
# Formats that a plugin of Pillow reads -> its module, and its name for pip.
PLUGINS = {"JXL": ("pillow_jxl", "pillow-jxl-plugin"), "HEIF": ("pillow_heif", "pillow-heif")}
# This format has no signature, so damaged files of other formats could be read as it.
UNMARKED = "TGA"
# Pictures and videos that a user may give as data, but that are never read.
OTHERS = (
    "psd", "svg", "eps", "pdf", "ico", "dds", "exr", "hdr", "pcx", "sgi", "raw", "dng", "cr2",
    "cr3", "nef", "arw", "orf", "rw2", "raf", "hif", "mp4", "mov", "webm", "mkv", "avi",
)  # fmt: skip
# Its pictures take 256 MiB decoded, and as much for each step of conversion to RGB.
MOST_PIXELS = limits.MOST_PIXELS
# Folders of thumbnails and of macOS metadata: pictures in them are not data.
SYSTEM = ("__MACOSX", "@eaDir")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or the system's: ._x.jpg, .cache, @eaDir."""
    return name.startswith(".") or name in SYSTEM


@cache
def readable_formats() -> frozenset[str]:
    """The formats of `FORMAT_OF` that Pillow and installed plugins can read."""
    for module, _ in PLUGINS.values():
        if importlib.util.find_spec(module):
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()
    Image.init()
    built = features.modules | features.codecs
    there = {name for name, part in BUILT.items() if part in built and features.check(part)}
    return frozenset(
        name
        for name in FORMAT_OF.values()
        if name in Image.OPEN and (name in there or name not in BUILT)
    )


@cache
def suffixes() -> tuple[str, ...]:
    """The lower-case suffixes of readable pictures, preferred ones first."""
    return tuple(suffix for suffix, name in FORMAT_OF.items() if name in readable_formats())


def formats_of(suffix: str) -> tuple[str, ...]:
    """The formats that are tried for a file of this suffix."""
    own = FORMAT_OF.get(suffix.rpartition(".")[2])
    return tuple(sorted(name for name in readable_formats() if name != UNMARKED or own == UNMARKED))


def open_picture(file: Path | IO[bytes], suffix: str) -> Image.Image:
    """Open a picture in one of the allowed formats; `file` is a path or a seekable file.

    Most formats are decoded later, when pixels are read. For those that are decoded at once the
    size is checked before. Raises ValueError for too many pixels, and errors of Pillow for other
    files.
    """
    if isinstance(file, Path):
        with file.open("rb") as first:
            size = headers.size_of(first)
    else:
        size = headers.size_of(file)
    if size is not None and size[0] * size[1] > MOST_PIXELS:
        raise _too_large(size, MOST_PIXELS)
    return Image.open(file, formats=formats_of(suffix))


def _too_large(size: tuple[int, int], most: int) -> ValueError:
    what = f"it has {size[0]} x {size[1]} pixels, and at most {most // 10**6} million are decoded"
    return ValueError(f"{what}; make it smaller")


def check_pixels(picture: Image.Image, most: int = MOST_PIXELS) -> None:
    """Raise ValueError for a picture, not decoded yet, of too many pixels.

    A JPEG that can be decoded smaller is allowed, see `reduced`.
    """
    width, height = picture.size
    if width * height > most and _scale(picture, most) is None:
        raise _too_large((width, height), most)


def reduced(picture: Image.Image) -> Image.Image:
    """The picture, not decoded yet; a JPEG of more than MOST_PIXELS will be decoded at 1/2 or less.

    Raises ValueError for other pictures of so many pixels.
    """
    check_pixels(picture)
    width, height = picture.size
    scale = _scale(picture, MOST_PIXELS)
    if width * height > MOST_PIXELS and scale:
        picture.draft(picture.mode, (width // scale, height // scale))
    return picture


def _scale(picture: Image.Image, most: int) -> int | None:
    """The factor by which a JPEG must be decoded smaller; None if it cannot be.

    A progressive JPEG is decoded at full size first.
    """
    width, height = picture.size
    if picture.format not in ("JPEG", "MPO") or picture.info.get("progressive"):
        return None
    return next((k for k in (1, 2, 4, 8) if width * height <= most * k * k), None)


def upright(picture: Image.Image) -> Image.Image:
    """The picture decoded, rotated by its EXIF, with grey of more than 8 bits scaled to 8 bits.

    Raises ValueError for too many pixels (see `reduced`), and for pixels without a known white:
    floats, and integers of more than 16 bits.
    """
    written_as = picture.format  # rotating forgets it
    picture = ImageOps.exif_transpose(reduced(picture))
    picture.load()
    if picture.mode == "F":  # Pillow would clip it, to black where it lies in [0, 1]
        raise ValueError("its pixels are floats; save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture
    import numpy as np  # most pictures need none

    grey = np.asarray(picture)  # Pillow would clip it to white
    if grey.size and (grey.min() < 0 or grey.max() >= 2**16):
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits")
    # Programs write 8 bits as 32 without scaling them. A PGM of 16 bits has this mode too, but its
    # values are scaled.
    of_8_bits = picture.mode == "I" and written_as != "PPM" and grey.max(initial=0) < 2**8
    return Image.fromarray((grey if of_8_bits else grey // 2**8).astype(np.uint8))


def is_unreadable(suffix: str) -> bool:
    """Whether files of this lower-case suffix are pictures or videos that cannot be read."""
    return suffix in OTHERS or (suffix in FORMAT_OF and suffix not in suffixes())


def advice(ends: Iterable[str]) -> str:
    """What to do with pictures of these suffixes, which cannot be read."""
    wanted = {FORMAT_OF[end] for end in ends if end in FORMAT_OF}
    packages = sorted(PLUGINS[name][1] for name in wanted if name in PLUGINS)
    convert = "convert them to .png or .jpg"
    return f"`pip install {' '.join(packages)}`, or {convert}" if packages else convert


def suffix_list() -> str:
    """The most usual readable suffixes as text."""
    return ", ".join([*suffixes()[:6], "..."])
