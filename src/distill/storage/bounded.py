"""Files that a stranger may have written, read within bounds: these are known before anything is
parsed.

    json_of(file), mapping_of(file)  JSON
    yaml_of(file)                    the text of a YAML file, for OmegaConf.load or yaml.safe_load
    check_archive(file)              an archive of torch's or NumPy's, before they read it

Nothing here imports a library that takes long.
"""

import io
import json
import math
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distill.terminal.shown import shown

MIB = 2**20
# All ours, and far above what such files have: a run's files and a model's settings take kilobytes.
TEXT = 16 * MIB  # bytes of a file of JSON, of a card, of captions' records of one picture
YAML = 4 * MIB  # bytes
YAML_NODES = 100_000  # values, each counted as often as aliases name it
YAML_DEPTH = 64  # values inside of values
LINES = 1024 * MIB  # bytes of a list of prompts, ten million of them
LARGEST = 10**15  # of a whole number: no float holds the largest that JSON may have
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def text_of(file: Path, most: int = TEXT, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a file of at most this many bytes.

    Raises ValueError, naming it, for any other, and OSError.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file}: is no plain file; give one")
    if found.st_size > most:
        raise too_large(file, found.st_size, most)
    with file.open("rb") as opened:
        data = opened.read(most + 1)  # no more, should it grow meanwhile
    if len(data) > most:
        raise too_large(file, len(data), most)
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text (byte {error.start}); repair it") from None


def too_large(file: Path | str, size: int, most: int) -> ValueError:
    """What is said of a file of more bytes than its kind may have."""
    what = f"has {in_bytes(size)}, and such a file may have {in_bytes(most)}"
    return ValueError(f"{file}: {what}; look at what it holds")


def in_bytes(size: int) -> str:
    """As a person says it: `300 bytes`, `1.4 GiB`."""
    for unit, name in ((2**30, "GiB"), (MIB, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size // unit}{'.5' * (size % unit * 2 >= unit)} {name}"
    return f"{size} bytes"


def json_of(file: Path, most: int = TEXT) -> Any:
    """What a file of JSON holds.

    Raises ValueError, naming it, where it cannot be read, and OSError.
    """
    return parsed(text_of(file, most), str(file))


def parsed(text: str, where: str) -> Any:
    """What a text of JSON holds.

    Raises ValueError, beginning with `where`, where it cannot be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply to be read; repair it") from None
    except ValueError as error:  # of numbers of thousands of digits too
        raise ValueError(f"{where}: is no JSON ({error}); repair it or fetch it anew") from None


def mapping_of(file: Path, most: int = TEXT) -> dict[str, Any]:
    """The same of a JSON object. Raises ValueError, naming the file, for anything else."""
    return parsed_mapping(text_of(file, most), str(file))


def parsed_mapping(text: str, where: str) -> dict[str, Any]:
    """The same as `parsed` of a JSON object, and ValueError for anything else."""
    found = parsed(text, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where}: is no JSON object; repair it or fetch it anew")
    return found


def number_of(found: Mapping[str, Any], key: str, where: str) -> float | None:
    """The number of this key, NaN and infinity among them; None where there is none. ValueError,
    after `where`, for anything else."""
    value = found.get(key)
    if value is None:
        return None
    whole = type(value) is int and abs(value) <= LARGEST
    if not whole and not isinstance(value, float):
        said = shown(value, 60)
        raise ValueError(f"{where} says {key}={said}, which must be a number; make it anew")
    return value


def is_number(value: Any) -> bool:
    """Whether this is a finite number below LARGEST; True and False are none."""
    return type(value) in (int, float) and abs(value) < LARGEST


class Named(io.StringIO):
    """A text, and the file that it is of, which errors name."""

    name: str


def yaml_of(file: Path) -> Named:
    """The text of a YAML file that stays small when it is read: OmegaConf and PyYAML have no bounds
    of their own.

    Raises OSError, and ValueError, naming the file, for one that is damaged, too large or nested
    too deeply, or whose aliases make it so.
    """
    text = text_of(file, YAML)
    try:
        check_yaml(text, str(file))
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{file}: is no YAML ({why}); repair it or fetch it anew") from None
    found = Named(text)
    found.name = str(file)
    return found


def configuration_of(file: Path) -> dict[Any, Any]:
    """What the config.yaml of a run holds.

    Raises ValueError or YAMLError for what is no configuration.
    """
    found = yaml.safe_load(yaml_of(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file}: is no configuration; fetch the run anew")
    return found


def check_yaml(text: str, where: str) -> None:
    """Raise ValueError, beginning with `where`, for YAML of too many values or too deep; aliases
    count in full.
    """
    sizes: dict[str, int] = {}  # of what an anchor names
    depths: dict[str, int] = {}
    open_ones: list[
        list[Any]
    ] = []  # anchor, values, and how deep they go, of each collection begun
    total = 0
    for event in yaml.parse(text, Loader=LOADER):
        size, depth, anchor = 1, 1, None
        if isinstance(event, yaml.CollectionStartEvent):
            open_ones.append([event.anchor, 1, 1])
            if len(open_ones) > YAML_DEPTH:
                raise _too_much(where)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size, depth = open_ones.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor = event.anchor
        elif isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor, YAML_NODES)  # what it names may be around it
            depth = depths.get(event.anchor, YAML_DEPTH)
        else:
            continue
        if anchor:
            sizes[anchor], depths[anchor] = size, depth
        if open_ones:
            around = open_ones[-1]
            around[1] += size
            around[2] = max(around[2], depth + 1)
        total = max(total, size)
        if total > YAML_NODES or depth + len(open_ones) > YAML_DEPTH:
            raise _too_much(where)


def _too_much(where: str) -> ValueError:
    what = f"holds more than {YAML_NODES:,} values, or values nested more than {YAML_DEPTH} deep"
    return ValueError(f"{where}: {what}, its aliases counted in full; write it plainly")


def check_archive(file: Path, most: float = math.inf) -> None:
    """Raise ValueError for a zip archive, as torch and NumPy write them, that would be larger than
    it is.

    Both store what they write as it is: what is compressed may be of any size. `most` is of bytes
    of all that is in it. What is no such archive is for others to refuse.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (
        Exception
    ):  # a damaged directory raises nearly anything; who reads the file says what is wrong
        return
    declared = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError(f"{file}: holds compressed parts, which may be of any size; save it anew")
    if declared > min(most, file.stat().st_size):
        what = f"its parts declare {in_bytes(declared)}"
        raise ValueError(f"{file}: {what}, more than may be; save it anew")
