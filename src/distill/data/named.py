"""What `data.path` names: shards, tables or a folder of pictures, on this disk or in a store."""

import glob
import os
import re
from pathlib import Path

from distill.data import folder as folders
from distill.data import stores
from distill.data.braces import names_of
from distill.data.walk import Below, below
from distill.storage import formats
from distill.storage.formats import is_hidden

TABLE = ".parquet"
ENDS = (".tar", TABLE)  # of what is read in stores
BEGUN = "making.yaml"  # settings of a shard job, beside its shards
MADE = re.compile(r"latents-\d{6}\.tar")


def folder_of_pictures(folder: str) -> Below | None:
    """The files of a folder that is read as pictures: with pictures and no shard at its top, or
    with neither.
    """
    if not os.path.isdir(folder) or _shards_in(folder):
        return None
    found = below(folder)
    ends = {folders.suffix(name) for name in found.files}
    return found if ends & set(formats.suffixes()) or "tar" not in ends else None


def tables_at(path: str) -> list[str | stores.Stored]:
    """The Parquet tables that `path` names, in order: a folder of them without shards and pictures,
    one table, or a pattern; or a URL of these. [] if it names something else.
    """
    if stores.is_url(path):
        there = stores.listed(path, ENDS)
        return [] if stored_shards(path) else list(there)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        if not _holds_tables(path):
            return []
        found = below(path)
        return [found.path(name) for name in found.files if name.endswith(TABLE)]
    if not path.endswith(TABLE):
        return []
    names = [path] if os.path.isfile(path) else names_of(path)
    matches = {m for name in names for m in ([name] if os.path.isfile(name) else glob.glob(name))}
    if not matches:
        raise _none_at(path)
    return sorted(matches)


def _holds_tables(folder: str) -> bool:
    """Whether there are tables below a folder, and no shards or pictures. Of those, which may be
    millions, the first one decides.
    """
    others, some = {"tar", *formats.suffixes()}, False
    for _, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not is_hidden(name)]
        ends = {folders.suffix(name) for name in names if not is_hidden(name)}
        if ends & others:
            return False
        some = some or TABLE.removeprefix(".") in ends
    return some


def stored_shards(path: str) -> list[stores.Stored]:
    """The shards that a URL names; [] if all files there are tables."""
    there = stores.listed(path, ENDS)
    return [stored for stored in there if not stores.name_of(stored.url).endswith(TABLE)]


def _shards_in(folder: str) -> list[str]:
    """The shards at the top of a folder, sorted, .TAR included."""
    names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    return [
        os.path.join(folder, name)
        for name in names
        if folders.suffix(name) == "tar"
        and os.path.isfile(os.path.join(folder, name))
        and not copied(os.path.join(folder, name))
    ]


def shards_in(folder: Path) -> list[Path]:
    """The shards of a shard job in a folder, in order; files with other names are not its own."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(folder / name for name in names if MADE.fullmatch(name))


def copied(path: str) -> bool:
    """Whether this shard is in the folder of a shard job but has not one of its names: a copy."""
    folder, name = os.path.split(path)
    return not MADE.fullmatch(name) and os.path.isfile(os.path.join(folder, BEGUN))


def _shards_below(folder: str) -> list[str]:
    """The shards at the top of a folder, or if there is none, those in all of its folders."""
    found = below(folder)
    deep = [found.path(name) for name in found.files if folders.suffix(name) == "tar"]
    return _shards_in(folder) or [path for path in deep if not copied(path)]


def beside_shards(folder: str) -> list[str]:
    """Sentences on files in a folder of shards that are not read; [] for other paths."""
    if not os.path.isdir(folder):
        return []
    files = below(folder).files
    ends = formats.suffixes()
    top = bool(_shards_in(folder))
    kinds = {
        "pictures beside the shards": [n for n in files if folders.suffix(n) in ends],
        "shards of other names than distill gives": [
            n for n in files if folders.suffix(n) == "tar" and copied(os.path.join(folder, n))
        ],
        "compressed shards": [n for n in files if folders.packed(n)],
        "shards in subfolders": [
            n for n in files if folders.suffix(n) == "tar" and top and "/" in n
        ],
    }
    return [
        f"{what} are not read ({len(names)}, {names[0]} for one): {ADVICE[what]}"
        for what, names in kinds.items()
        if names
    ]


ADVICE = {
    "pictures beside the shards": "give them a folder of their own, or put them into a shard",
    "shards of other names than distill gives": "move copies elsewhere",
    "compressed shards": "gunzip or unpack them",
    "shards in subfolders": "give them as a pattern: data.path='folder/**/*.tar'",
}


def expand(path: str) -> list[str]:
    """The shards that `path` names, sorted and without repeats.

    `path` is a folder of `*.tar`, at its top or else below it; one file; a brace pattern
    (`shards-{000000..000003}.tar`); a glob; or both mixed; or a URL of these. Raises ValueError for
    a malformed pattern, FileNotFoundError if a named shard is missing or none matches, and as
    `stores.found_at`.
    """
    if stores.is_url(path):
        return [stored.url for stored in stored_shards(path)]
    path = os.path.expanduser(path)
    if os.altsep:  # Windows: a backslash has another meaning in braces and globs
        path = path.replace(os.sep, "/")
    if not path or path.startswith("pipe:"):
        raise ValueError(
            f"data.path={path!r}: must be a folder of .tar shards, one .tar or a pattern"
        )
    if os.path.isdir(path):
        if shards := _shards_below(path):
            return shards
        raise _no_shards_in(path)
    try:
        names = [path] if os.path.isfile(path) else names_of(path)
    except (ValueError, RecursionError):
        raise ValueError(
            f"data.path={path}: its braces do not pair; write, say, x-{{000..003}}.tar"
        ) from None
    found = set()
    for name in names:
        matches = (
            [name]
            if os.path.isfile(name)
            else [m for m in glob.glob(name, recursive=True) if os.path.isfile(m)]
        )
        if not matches and not glob.has_magic(name):  # a missing shard is an error
            raise _none_at(path, name)
        found.update(matches)
    if not found:
        raise _none_at(path)
    return sorted(found)


def _none_at(path: str, name: str | None = None) -> FileNotFoundError:
    """The error for a path that names no file; `name` is one that a pattern's braces stand for."""
    if name not in (None, path):
        what = f"there is no {name}; write only shards that exist"
    elif glob.has_magic(path) or "{" in path:
        what = "no file matches; check the pattern"
    else:
        what = "no such file or folder; check the path"
    return FileNotFoundError(f"data.path={path}: {what}")


def _no_shards_in(path: str) -> FileNotFoundError:
    files = below(path).files
    what = f"data.path={path}: is a folder without shards (.tar)"
    if any(folders.suffix(name) in formats.suffixes() for name in files):
        return FileNotFoundError(f"{what} and with pictures; read those by data=images")
    advice = folders.remedy(files) or "check the folder"
    return FileNotFoundError(f"{what} that holds {folders.holds(files)}; {advice}")
