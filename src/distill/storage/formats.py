"""Which files are pictures that are read, and what to do with those that are not. Nothing here
imports torch.

What a file holds decides, not its suffix: only the formats named here are tried. Pillow knows more,
among them some that start other programs (EPS).
"""

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import IO

from PIL import Image, features

from distill.storage import headers

# Suffix -> Pillow's format. Of several pictures in one sample of a shard the first by this order is
# read.
FORMAT_OF = {
    "jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "avif": "AVIF", "jxl": "JXL",
    "heic": "HEIF", "heif": "HEIF", "tif": "TIFF", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF",
    "jfif": "JPEG", "jpe": "JPEG", "apng": "PNG", "jp2": "JPEG2000", "j2k": "JPEG2000",
    "ppm": "PPM", "pgm": "PPM", "pnm": "PPM", "qoi": "QOI", "tga": "TGA",
}  # fmt: skip
# What Pillow reads only if it was built so, and its name for that.
BUILT = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000", "JPEG": "jpg", "PNG": "zlib"}
# What another package has Pillow read: its module, and what pip calls it.
PLUGINS = {"JXL": ("pillow_jxl", "pillow-jxl-plugin"), "HEIF": ("pillow_heif", "pillow-heif")}
# A file of this format has no mark at its start, so that damaged ones of others could pass for it.
UNMARKED = "TGA"
# Pictures, and films, that a person may take for data and that are never read.
OTHERS = (
    "psd", "svg", "eps", "pdf", "ico", "dds", "exr", "hdr", "pcx", "sgi", "raw", "dng", "cr2",
    "cr3", "nef", "arw", "orf", "rw2", "raf", "hif", "mp4", "mov", "webm", "mkv", "avi",
)  # fmt: skip
# Ours: 8192 x 8192, which take 256 MiB decoded and as much again for each step of making them RGB.
MOST_PIXELS = 2**26
# Folders of thumbnails and of what an archive of macOS adds: pictures in them are nobody's data.
SYSTEM = ("__MACOSX", "@eaDir")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's and not the user's: ._x.jpg, .cache,
    @eaDir.
    """
    return name.startswith(".") or name in SYSTEM


@cache
def readable_formats() -> frozenset[str]:
    """The formats of `FORMAT_OF` that Pillow reads here, with the plugins that are installed."""
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
    """The lower-case suffixes of pictures that are read here, best first."""
    return tuple(suffix for suffix, name in FORMAT_OF.items() if name in readable_formats())


def formats_of(suffix: str) -> tuple[str, ...]:
    """The formats that a file of this suffix may be of."""
    own = FORMAT_OF.get(suffix.rpartition(".")[2])
    return tuple(sorted(name for name in readable_formats() if name != UNMARKED or own == UNMARKED))


def open_picture(file: Path | IO[bytes], suffix: str) -> Image.Image:
    """The picture in a file that may be read again, by its header: only formats that are read here,
    and within bounds.

    Raises ValueError for one of too many pixels, and whatever Pillow does for what is none. Most
    formats, AVIF and HEIF among them, are decoded later, when pixels are asked for; of the others
    the size is looked at before.
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
    """Raise ValueError for a picture, of which its header alone is read, that would take gigabytes
    when it is decoded.

    A JPEG is spared that can be decoded smaller, see `reduced`.
    """
    width, height = picture.size
    if width * height > most and _scale(picture, most) is None:
        raise _too_large((width, height), most)


def reduced(picture: Image.Image) -> Image.Image:
    """The picture, of which its header alone is read: a JPEG of more than MOST_PIXELS is decoded at
    half, or less.

    Raises ValueError for any other of so many.
    """
    check_pixels(picture)
    width, height = picture.size
    scale = _scale(picture, MOST_PIXELS)
    if width * height > MOST_PIXELS and scale:
        picture.draft(picture.mode, (width // scale, height // scale))
    return picture


def _scale(picture: Image.Image, most: int) -> int | None:
    """By how much a JPEG has to be decoded smaller; None for what cannot be, as one that is kept
    whole in between.
    """
    width, height = picture.size
    if picture.format not in ("JPEG", "MPO") or picture.info.get("progressive"):
        return None
    return next((k for k in (1, 2, 4, 8) if width * height <= most * k * k), None)


def is_unreadable(suffix: str) -> bool:
    """Whether files of this lower-case suffix are pictures or films that are not read here."""
    return suffix in OTHERS or (suffix in FORMAT_OF and suffix not in suffixes())


def advice(ends: Iterable[str]) -> str:
    """What to do with pictures of these suffixes, none of which is read here."""
    wanted = {FORMAT_OF[end] for end in ends if end in FORMAT_OF}
    packages = sorted(PLUGINS[name][1] for name in wanted if name in PLUGINS)
    convert = "convert them to .png or .jpg"
    return f"`pip install {' '.join(packages)}`, or {convert}" if packages else convert


def suffix_list() -> str:
    """The suffixes that are read here, the most usual by name."""
    return ", ".join([*suffixes()[:6], "..."])
