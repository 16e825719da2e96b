"""What the bytes of a raw sample say: its caption, and the sizes of its picture or latents. Nothing
here imports torch.

A raw sample is what `shards` reads: {extension: bytes} with `__key__` and `__url__`. The bytes are
not trusted: nothing here unpickles, and only the image formats of `formats` are tried.
"""

import io
import json
import re
import warnings

import numpy as np

from distill.data.bad import BadSample, Unread
from distill.data.folder import CAPTIONS, caption_of
from distill.data.shards import DOTTED
from distill.machine.faults import first_line
from distill.storage import formats

LATENTS = ("latent.npy", "latents.npy", "npy")
HEAD = 2**16  # bytes that nearly always include the size
IN_MEMORY = re.compile(r"\s*<_io\.BytesIO object at 0x\w+>")  # Pillow's name for a file in memory
MANY = 4  # ours: extensions, of which only the first is named
SIDEWAYS = range(5, 9)  # EXIF orientations that swap width and height


def image_size(sample: dict, part: str = "") -> tuple[int, int]:
    """Width and height in pixels as displayed, from the image's first bytes.

    Raises BadSample if these do not suffice.
    """
    extension = suffix_of_image(sample, part)
    data = io.BytesIO(bytes_of(sample, extension))
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
        raise undecodable(sample, extension, error) from None
    return picture.size[::-1] if turned else picture.size


def check_same_size(sample: dict, source: tuple[int, int], target: tuple[int, int]) -> None:
    """Raise BadSample for an edit pair of two sizes."""
    if source != target:
        sizes = f"{source[0]} x {source[1]}, its target {target[0]} x {target[1]}"
        raise BadSample(sample, f"its source is {sizes}; a pair must have one size")


def check_large(sample: dict, has: tuple[int, int], width: int, height: int | None = None) -> None:
    """Raise BadSample for a picture of which the crop is less than half as wide: enlarged that
    much, it would teach blur. A `height` is that of a bucket; None is a square of data.size.
    """
    across = min(has[0], has[1] * width / (height or width))
    if 2 * across >= width:
        return
    what = f"its image is {has[0]} x {has[1]}, under half of"
    if height is None:
        largest = int(2 * across)
        raise BadSample(sample, f"{what} data.size={width}; remove it, or make that {largest}")
    what = f"{what} {width} x {height}, the nearest of data.buckets"
    raise BadSample(sample, f"{what}; remove it, or add a smaller one")


def caption(sample: dict, key: str = "caption") -> str:
    """The caption: `.txt`, else `.caption`, else `caption` or `text` of the `.json`.

    Any other `key` is one of the `.json`. Raises BadSample if there is none.
    """
    plain = key == "caption"
    ends = CAPTIONS if plain else ("json",)
    extension = caption_of(sample, ends) or pick(sample, ends, "caption")
    data, found = bytes_of(sample, extension), {}
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
        raise undecodable(sample, extension, error) from None
    if not isinstance(text, str):
        where = "'caption' or 'text'" if plain else repr(key)
        has = ", ".join(name for name, value in found.items() if value and isinstance(value, str))
        also = f", only {has[:80]}: see data.caption_key" if has else ""
        raise BadSample(sample, f"its .{extension} has no text under {where}{also}")
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8
        raise BadSample(sample, f"its .{extension} is not UTF-8, or holds characters of number 0")
    return text.strip()


def latent_size(sample: dict) -> tuple[int, int]:
    """Width and height of the latents, from the first bytes.

    Raises BadSample if these do not suffice.
    """
    extension = pick(sample, LATENTS, "latents")
    file = io.BytesIO(bytes_of(sample, extension))
    try:
        np.lib.format.read_magic(file)
        _, *_, height, width = np.lib.format.read_array_header_1_0(file)[0]
        assert width * height > 0, "it is empty"
        assert max(width, height) < 2**31, "no latents are so large"
    except Exception as error:
        raise undecodable(sample, extension, error) from None
    return width, height


def array_of(sample: dict, extension: str) -> np.ndarray:
    data = io.BytesIO(bytes_of(sample, extension))
    try:
        return np.lib.format.read_array(data, allow_pickle=False)
    except Exception as error:  # a damaged header may raise anything, MemoryError too
        raise undecodable(sample, extension, error) from None


def bytes_of(sample: dict, extension: str) -> bytes:
    """A file of the sample; raises BadSample for one that was too large to be read."""
    found = sample[extension]
    if isinstance(found, Unread):
        raise BadSample(sample, f"its .{extension} {found.reason}")
    return found


def suffix_of_image(sample: dict, part: str = "") -> str:
    """The extension of the sample's image, or of the one named `part`."""
    ends = formats.suffixes()
    if part:
        return pick(sample, tuple(f"{part}.{end}" for end in ends), f"{part} picture")
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


def pick(sample: dict, extensions: tuple[str, ...], what: str) -> str:
    for extension in extensions:
        if extension in sample:
            return extension
    some = extensions if len(extensions) < MANY else (extensions[0], "...")
    raise BadSample(sample, f"it has no {what} ({', '.join(some)}), only {_there(sample)}")


def _there(sample: dict) -> str:
    return ", ".join(sorted(key for key in sample if not key.startswith("__"))) or "nothing"


def undecodable(sample: dict, extension: str, error: BaseException) -> BadSample:
    said = IN_MEMORY.sub("", first_line(error, 200))[:120]
    why = said if bytes_of(sample, extension) else "it is empty, of 0 bytes"
    return BadSample(sample, f"its .{extension} does not decode ({why})")
