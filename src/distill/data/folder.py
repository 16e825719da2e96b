"""Captioned pictures in a plain folder, in the layouts of common tools. Nothing here imports torch.

x.txt, x.png.txt, x.caption, x.json  beside the picture x.png; the first in this order is read
metadata.jsonl, metadata.csv         a record for each picture, by its file_name (Hugging Face)
10_words/x.png                       each picture ten times, caption "words" without another (kohya)
"""

import csv
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, AnyStr

from distill.data.walk import Below
from distill.storage import formats

CAPTIONS = ("txt", "caption", "json")  # best first
# Where bytes lie: file, offset, size (-1: all of it); or they themselves.
Place = tuple[str, int, int] | bytes
Places = dict[str, Place]  # lower-case extension -> where it lies
Index = list[tuple[str, Places]]
RECORDS = ("metadata.jsonl", "metadata.csv")
KOHYA = re.compile(r"([1-9]\d{0,2})_([^/]+)/[^/]+")  # neither 01_ nor 2024_
DEEPER = re.compile(rf"(.+)/{KOHYA.pattern}")
TABLES = ("parquet", "arrow")
PACKED = ("tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "zip", "7z", "rar")
HOW = "docs/look_up/troubleshooting_data.md"
MOST_CAPTION = 4 * 2**20  # ours: bytes of a caption's file, or of a line of records


@dataclass
class Pictures:
    """The samples of a folder, and sentences on what its owner may not expect."""

    index: Index
    said: list[str] = field(default_factory=list)


def pictures(found: Below, *, repeats: bool = True) -> Pictures:
    """The pictures among files, sorted by name, each with the place of its caption.

    With `repeats` pictures in kohya's layout come as often as the folder's name says: all of them
    once, then those with repeats left, and so on. Raises ValueError for records that cannot be
    read.
    """
    names = [name for name in found.files if suffix(name) in formats.suffixes()]
    beside, several = _beside(found.files)
    records, said = _records(found, set(names))
    made = Pictures([], [*_unread(found), *said])
    counts = _kohya(names) if repeats and not records else {}
    worded = 0
    for name in names:
        files = _own(beside, name)
        own: Places = {end: (found.path(files[end]), 0, -1) for end in CAPTIONS if end in files}
        words = KOHYA.fullmatch(name) if counts else None
        if not own and words:
            own, worded = {"txt": words[2].encode()}, worded + 1
        for record in records.get(name) or [{}]:
            image: Places = {suffix(name): (found.path(name), 0, -1)}
            made.index.append((name, {**image, **({**record, **own} or {"txt": b""})}))
    both = [name for name in names if name in records and _own(beside, name)]
    made.said += _about_captions(beside, several, both, names)
    if counts:
        made.said.append(_about_kohya(names, worded))
        made.index = list(_repeated(made.index, counts))
    elif odd := [name for name in names if repeats and KOHYA.fullmatch(name)]:
        made.said.append(
            f"{odd[0].partition('/')[0]} is named as kohya's folders are, and others are not: "
            "each picture is read once"
        )
    elif deeper := [match for name in names if repeats and (match := DEEPER.fullmatch(name))]:
        above, times, words = deeper[0].groups()
        made.said.append(
            f"{above}/{times}_{words} is named as kohya's folders are, and lies deeper than those: "
            f"each picture is read once; give {found.path(above)} for its repeats and words"
        )
    return made


def suffix(name: str) -> str:
    """The lower-case suffix of a file name, without its dot; "" if there is none."""
    return posixpath.splitext(name)[1][1:].lower()


def caption_of(extensions: Iterable[str], ends: tuple[str, ...] = CAPTIONS) -> str | None:
    """The extension of a sample with its caption, the first of `ends`: png.txt before txt; else
    None.
    """
    for end in ends:
        own = [e for e in extensions if e == end or _of_picture(e, end)]
        if own:
            return max(own, key=len)
    return None


def _of_picture(extension: str, end: str) -> bool:
    """Whether an extension is a picture's suffix followed by `end`: png.txt."""
    before, _, last = extension.rpartition(".")
    return last == end and before in formats.FORMAT_OF


def uncaptioned(index: Index, ends: tuple[str, ...] = CAPTIONS) -> list[str]:
    """The samples without such a file, or with an empty one."""
    bare = []
    for key, places in index:
        end = caption_of(places, ends)
        there = places[end] if end else b""
        if not there or there[2:] == (0,):
            bare.append(key)
    return bare


def holds(files: list[str]) -> str:
    """Counts of files by suffix, most first: "900 .heic, 3 .parquet"; "nothing" if none."""
    ends = Counter(f".{packed(name) or suffix(name)}" for name in files)
    counted = [f"{n} {end}" for end, n in sorted(ends.items(), key=lambda x: (-x[1], x[0]))]
    return ", ".join(counted[:6]) or "nothing"


def packed(name: str) -> str | None:
    """The suffix of an archive that must be unpacked first, or None."""
    return next((end for end in PACKED if name.lower().endswith(f".{end}")), None)


def remedy(files: list[str]) -> str:
    """What to do with files of which none can be read; "" if unknown."""
    ends = {suffix(name) for name in files}
    if ends & set(TABLES):
        return f"tables are not read; write their pictures into a folder first, as {HOW} shows"
    if archives := [name for name in files if packed(name)]:
        return f"archives are not read compressed; unpack {archives[0]}, or gunzip a .tar.gz"
    if pictured := sorted(end for end in ends if formats.is_unreadable(end)):
        return f"these are not read here; {formats.advice(pictured)}"
    return ""


# -- captions beside pictures ----------------------------------------------------------------------


def _beside(files: list[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Name without the caption's suffix -> {suffix: file}; and ignored files, whose names differ in
    case alone.
    """
    beside: dict[str, dict[str, str]] = {}
    twice = []
    for name in files:  # sorted: capitals come first, so that x.txt wins over x.TXT
        if (end := suffix(name)) in CAPTIONS:
            own = beside.setdefault(posixpath.splitext(name)[0], {})
            if end in own:
                twice.append(own[end])
            own[end] = name
    return beside, twice


def _own(beside: dict[str, dict[str, str]], name: str) -> dict[str, str]:
    """The captions of a picture by suffix: x.png.txt is of x.png alone, x.txt of every x."""
    return {**beside.get(posixpath.splitext(name)[0], {}), **beside.get(name, {})}


def _about_captions(
    beside: dict[str, dict[str, str]], twice: list[str], both: list[str], names: list[str]
) -> list[str]:
    said = []
    if twice:
        said.append(f"{_many(twice, 'caption')} of a name that differs in case alone: not read")
    if both:
        said.append(
            f"{_many(both, 'picture')} with a record and a file beside it: the file is read"
        )
    stems = Counter(posixpath.splitext(name)[0] for name in names)
    shared = [stem for stem, n in stems.items() if n > 1 and stem in beside]
    if shared:
        said.append(f"{_many(shared, 'name')} of several pictures, which share the caption")
    choices = [x for x, ends in beside.items() if x in stems and {"txt", "caption"} <= ends.keys()]
    if choices:
        said.append(f"{_many(choices, 'picture')} with two captions: the .txt is read")
    return said


# -- records of all pictures -----------------------------------------------------------------------


def _records(found: Below, names: set[str]) -> tuple[dict[str, list[Places]], list[str]]:
    """Picture -> its records, each of which is a sample; and a sentence on other records."""
    records: dict[str, list[Places]] = {}
    lost: list[str] = []
    files = [name for name in found.files if posixpath.basename(name) in RECORDS]
    folders = Counter(map(posixpath.dirname, files))
    for name in files:
        folder = posixpath.dirname(name)
        if folders[folder] > 1:
            raise ValueError(
                f"data.path={found.root}: has {' and '.join(RECORDS)} in one folder; keep one"
            )
        read = _of_jsonl if name.endswith("jsonl") else _of_csv
        for file_name, place in read(found.path(name)):
            # Only looked up among the files that were found: a name with .. in it leads nowhere
            # else.
            key = posixpath.normpath(posixpath.join(folder, file_name.replace("\\", "/")))
            if key in names:
                records.setdefault(key, []).append({"json": place})
            else:
                lost.append(file_name)
    said = [f"{_many(lost, 'record')} of a picture that is not there or not read"] if lost else []
    return records, said


def _of_jsonl(path: str) -> Iterator[tuple[str, Place]]:
    """For each line the picture's name, and the place of the line."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(_lines(file, path), 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise ValueError(
                    f"data.path: {path}: its line {number} is no JSON object; repair it"
                )
            yield _file_name(record, f"{path}: its line {number}"), (path, start, len(line))


def _of_csv(path: str) -> Iterator[tuple[str, Place]]:
    """For each row the picture's name, and the row as JSON."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(_lines(file, path)):
                record = {key: value for key, value in row.items() if key and value is not None}
                yield _file_name(record, f"{path}: a row"), json.dumps(record).encode()
    except (csv.Error, UnicodeError) as error:
        what = "cannot be read as CSV in UTF-8"
        raise ValueError(f"data.path: {path}: {what} ({error}); repair it") from None


def _lines(file: IO[AnyStr], path: str) -> Iterator[AnyStr]:
    """The lines of a file of records; ValueError for one that is too long."""
    while line := file.readline(MOST_CAPTION + 1):
        if len(line) > MOST_CAPTION:
            raise ValueError(f"data.path: {path}: has a line of more than 4 MiB; repair it")
        yield line


def _file_name(record: dict, where: str) -> str:
    name = record.get("file_name")
    if not isinstance(name, str):
        there = ", ".join(map(str, list(record)[:6])) or "nothing"
        raise ValueError(f"data.path: {where} has no file_name, only {there}; name its picture so")
    return name


# -- kohya's folders -------------------------------------------------------------------------------


def _kohya(names: list[str]) -> dict[str, int]:
    """Repeats of each picture, if all are in folders such as 10_words; else {}."""
    found = {name: KOHYA.fullmatch(name) for name in names}
    if not all(found.values()):
        return {}
    return {name: int(match[1]) for name, match in found.items() if match}


def _repeated(index: Index, counts: dict[str, int]) -> Iterator[tuple[str, Places]]:
    for time in range(max(counts.values())):
        yield from ((key, places) for key, places in index if time < counts[key])


def _about_kohya(names: list[str], worded: int) -> str:
    folders = Counter(name.partition("/")[0] for name in names)
    some = ", ".join(f"{n} in {folder}" for folder, n in sorted(folders.items())[:4])
    words = f"; without a caption, {worded} have their folder's words" if worded else ""
    return (
        f"pictures come as often as their folders' names say ({some}){words}: "
        "data.repeats=false reads each once"
    )


# -- what is not read ------------------------------------------------------------------------------


def _unread(found: Below) -> list[str]:
    """Sentences on pictures that are not read, on links, and on shards among pictures."""
    said = []
    if other := [name for name in found.files if formats.is_unreadable(suffix(name))]:
        advice = formats.advice({suffix(name) for name in other})
        said.append(f"{holds(other)} are not read, {other[0]} for one: {advice}")
    ends = formats.suffixes() + CAPTIONS
    if broken := [name for name in found.broken if suffix(name) in ends]:
        said.append(f"{_many(broken, 'link')} to nothing: not read")
    if found.again:
        said.append(f"{_many(found.again, 'linked folder')} of pictures that are read anyway")
    boxes = [name for name in found.files if packed(name) or suffix(name) in ("tar", *TABLES)]
    if boxes:
        said.append(f"{holds(boxes)} beside the pictures are not read, {boxes[0]} for one")
    return said


def _many(names: list[str], what: str) -> str:
    """For example: 3 links, a/x.png for one,; or 1 link, a/x.png,."""
    return (
        f"1 {what}, {names[0]},"
        if len(names) == 1
        else f"{len(names)} {what}s, {names[0]} for one,"
    )


def of(found: Below, *, repeats: bool = True) -> Pictures:
    """As `pictures`. Raises FileNotFoundError if there is none, with what there is."""
    made = pictures(found, repeats=repeats)
    if not made.index:
        raise nothing_in(found.root, found.files)
    return made


def nothing_in(root: str, files: list[str]) -> FileNotFoundError:
    """The error for a folder without readable files."""
    what = f"data.path={root}: has neither .tar shards nor images ({formats.suffix_list()})"
    if not files:
        return FileNotFoundError(f"{what}; check the path")
    return FileNotFoundError(f"{what}, but {holds(files)}; {remedy(files) or 'check the path'}")
