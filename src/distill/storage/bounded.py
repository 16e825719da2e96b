"""Read untrusted files within bounds, which are checked before anything is parsed.

    json_of(file), mapping_of(file)  JSON
    yaml_of(file)                    the text of a YAML file, for OmegaConf.load or yaml.safe_load
    check_archive(file)              an archive of torch or NumPy, before they read it
    check_header(file)               the header of a safetensors file, before it is read

Nothing here imports a slow library.
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
# All limits are ours, and far above usual files: those of a run and settings of a model take
# kilobytes.
TEXT = 16 * MIB  # bytes of a JSON file, of a card, or of the caption records of a picture
YAML = 4 * MIB  # bytes
YAML_NODES = 100_000  # values, counted again for every alias
YAML_DEPTH = 64  # nested values
LINES = 1024 * MIB  # bytes of a list of prompts, ten million of them
HEADER = 16 * MIB  # ours: bytes of a safetensors file's header, its metadata included
# Ours: tensors of one file; the largest known models have a tenth. Libraries read 15,000 a second.
TENSORS = 30_000
MOST_DIGITS = 100  # ours: of a whole number in YAML; Python prints at most 4300
LARGEST = 10**15  # of a whole number: those of JSON may be larger than any float
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def text_of(file: Path, most: int = TEXT, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The text of a regular file of at most `most` bytes.

    Raises ValueError, naming the file, for any other, and OSError.
    """
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file}: is no regular file; give one")
    if found.st_size > most:
        raise too_large_error(file, found.st_size, most)
    with file.open("rb") as opened:
        data = opened.read(most + 1)  # bounded, since the file may grow meanwhile
    if len(data) > most:
        raise too_large_error(file, len(data), most)
    try:
        return data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is not UTF-8 text (byte {error.start}); repair it") from None


def too_large_error(file: Path | str, size: int, most: int) -> ValueError:
    """The error for a file that is larger than its limit."""
    what = f"has {format_bytes(size)}, and such a file may have {format_bytes(most)}"
    return ValueError(f"{file}: {what}; check its content")


def format_bytes(size: int) -> str:
    """A size as text: `300 bytes`, `1.5 GiB`."""
    for unit, name in ((2**30, "GiB"), (MIB, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size // unit}{'.5' * (size % unit * 2 >= unit)} {name}"
    return f"{size} bytes"


def json_of(file: Path, most: int = TEXT) -> Any:
    """The content of a JSON file.

    Raises ValueError, naming the file, if it cannot be parsed, and OSError.
    """
    return parse_json(text_of(file, most), str(file))


def parse_json(text: str, where: str) -> Any:
    """The content of a JSON text. Raises ValueError, starting with `where`, for a wrong one."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply to be read; repair it") from None
    except ValueError as error:  # also for numbers with thousands of digits
        raise ValueError(f"{where}: is no JSON ({error}); repair it or fetch it anew") from None


def mapping_of(file: Path, most: int = TEXT) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, for anything else."""
    return parse_json_object(text_of(file, most), str(file))


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a text. Raises ValueError, starting with `where`, for anything else."""
    found = parse_json(text, where)
    if not isinstance(found, dict):
        raise ValueError(f"{where}: is no JSON object; repair it or fetch it anew")
    return found


def number_of(found: Mapping[str, Any], key: str, where: str) -> float | None:
    """The number of this key, which may be NaN or infinity; None if the key is missing.

    Raises ValueError, starting with `where`, for any other value.
    """
    value = found.get(key)
    if value is None:
        return None
    is_integer = type(value) is int and abs(value) <= LARGEST
    if not is_integer and not isinstance(value, float):
        text = shown(value, 60)
        raise ValueError(f"{where} has {key}={text}, which must be a number; write it again")
    return value


def is_number(value: Any) -> bool:
    """Whether this is a finite number below LARGEST, and not a bool."""
    return type(value) in (int, float) and abs(value) < LARGEST


class Named(io.StringIO):
    """A text with the name of its file, which errors of YAML libraries show."""

    name: str


def yaml_of(file: Path) -> Named:
    """The text of a YAML file that stays small when it is parsed: OmegaConf and PyYAML do not limit
    it.

    Raises OSError, and ValueError, naming the file, if it is damaged, too large or nested too
    deeply, also with its aliases expanded.
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
    """The configuration of a run from its config.yaml. Raises ValueError for a damaged one."""
    found = parse_yaml(text_of(file, YAML), str(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file}: is no configuration; fetch the run anew")
    return found


def parse_yaml(text: str, where: str, loader: Any = LOADER) -> Any:
    """The content of a YAML text, which stays small when it is parsed.

    Raises ValueError, starting with `where`, if it is damaged, too large or nested too deeply.
    """
    try:
        check_yaml(text, where)
    except yaml.YAMLError as error:
        raise _no_yaml(where, error) from None
    try:
        tree = yaml.load(text, Loader=loader)
        _check_numbers(tree)
    except yaml.YAMLError as error:
        raise _no_yaml(where, error) from None
    except Exception:  # a tag such as `!!bool x`, on a value that is none, raises nearly anything
        what = "holds a value that is not of its type, or a number that is too large"
        raise ValueError(f"{where}: {what}; copy it again") from None
    return tree


def _no_yaml(where: str, error: yaml.YAMLError) -> ValueError:
    mark = getattr(error, "problem_mark", None)
    line = f" (line {mark.line + 1})" if mark else ""
    return ValueError(f"{where}: is no configuration{line}; copy it again")


def _check_numbers(value: Any) -> None:
    """Raise OverflowError for a whole number that cannot be printed: its digits are limited."""
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise OverflowError
    inner = value.values() if isinstance(value, dict) else value
    for each in inner if isinstance(value, dict | list | tuple | set) else ():
        _check_numbers(each)


def check_yaml(text: str, where: str) -> None:
    """Raise ValueError, starting with `where`, for YAML with too many or too deeply nested values.

    Aliases are counted as if expanded.
    """
    sizes: dict[str, int] = {}  # anchor -> number of values
    depths: dict[str, int] = {}
    open_ones: list[list[Any]] = []  # [anchor, values, depth] of each open collection
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
            size = sizes.get(event.anchor, YAML_NODES)  # unknown: its collection is still open
            depth = depths.get(event.anchor, YAML_DEPTH)
        else:
            continue
        if anchor:
            sizes[anchor], depths[anchor] = size, depth
        if open_ones:
            parent = open_ones[-1]
            parent[1] += size
            parent[2] = max(parent[2], depth + 1)
        total = max(total, size)
        if total > YAML_NODES or depth + len(open_ones) > YAML_DEPTH:
            raise _too_much(where)


def _too_much(where: str) -> ValueError:
    what = f"holds more than {YAML_NODES:,} values, or values nested more than {YAML_DEPTH} deep"
    return ValueError(f"{where}: {what}, with its aliases expanded; write it in a simpler way")


def check_header(file: Path) -> None:
    """Raise ValueError, naming the file, for a safetensors file with so many tensors, or with so
    large a header, that reading it takes minutes. Other and damaged files are ignored.
    """
    if file.suffix != ".safetensors":
        return
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:  # its reader reports it
            return
        if length > HEADER:
            raise too_large_error(f"{file}: its header", length, HEADER)
        count = opened.read(length).count(b'"data_offsets"')
    if count > TENSORS:
        what = f"has {count:,} tensors, and a file of weights may have {TENSORS:,}"
        raise ValueError(f"{file}: {what}; give the weights of one model")


def check_archive(file: Path, most: float = math.inf) -> None:
    """Raise ValueError for a zip archive, as torch and NumPy write them, that would expand.

    Both store data without compression: compressed data may have any size. `most` limits the bytes
    of the content. Other files are ignored.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except Exception:  # a damaged archive raises nearly anything; its reader reports the error
        return
    declared = sum(part.file_size for part in parts)
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise ValueError(f"{file}: holds compressed parts, which may be of any size; save it anew")
    if declared > min(most, file.stat().st_size):
        what = f"its parts declare {format_bytes(declared)}"
        raise ValueError(f"{file}: {what}, more than is allowed; save it again")
