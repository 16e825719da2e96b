"""Check a folder before writing into it: an untrusted one may have links out of it, or pipes.

A link at a name that is written would overwrite its target, or have another folder written into and
cleaned. A hard link would be written under its other name too. A pipe would wait for ever. The
folder itself may be a link, for example to a larger disk, and links at other names are ignored.
Nothing here imports a slow library.
"""

import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from distill.storage.atomic import open_atomic

TRUST_RUN = "DISTILL_TRUST_RUN"
# Files that are opened directly. All others are written atomically, which replaces a link.
FILES = re.compile(
    r"run\.log|metrics\.csv|alarms\.jsonl|hparams\.yaml|study\.db(-\w+)?|config\.yaml|run\.json"
    r"|evaluation\.json|events\.out\.tfevents\..*"
)
# Folders that are written into. Below FOLDERS without DEEP, only atomic writes happen.
DEEP = ("checkpoints", "samples", "evaluation", "inspect", "processes", "train", "models")
FOLDERS = (*DEEP, "student", "vae", "clip", "tokenizer")
IN_PLACE = (".log", ".csv", ".jsonl", ".yaml", ".txt", ".db")  # suffixes of what is not replaced
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither


def is_trusted_run(file: Path) -> bool:
    """Whether this file lies in a folder that the user trusts by DISTILL_TRUST_RUN."""
    folders = [name for name in os.environ.get(TRUST_RUN, "").split(os.pathsep) if name]
    return any(file.resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def check_written_paths(folder: Path, key: str) -> None:
    """Raise ValueError, starting with `key`, for a link out of the folder at a written name.

    Also for a path that is neither a file nor a folder. A trusted folder may have such links.
    """
    trusted = is_trusted_run(folder)
    for path in _written(folder):
        if path.is_symlink():
            if trusted or _is_inside(path, folder):
                continue
            what = "is a link out of the folder, whose target would be overwritten"
            hint = f"replace it by its target, or set {TRUST_RUN}={folder} if the link is yours"
            raise ValueError(f"{key}={folder}: {path} {what}; {hint}")
        if not path.is_dir():
            check_regular_file(path, f"{key}={folder}")


def separate_hard_links(folder: Path) -> None:
    """Replace files that are written in place by copies where they are hard links.

    The other name keeps its content: that may be any file in a folder from a stranger, and an
    earlier state in a user's backup of links.
    """
    for path in list(_written(folder)):
        found = path.lstat()
        if path.suffix in IN_PLACE and stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            with open_atomic(path) as copy, path.open("rb") as file:
                shutil.copyfileobj(file, copy)


def check_can_be_written(folder: Path, key: str) -> None:
    """Raise OSError, starting with `key`, if this folder can neither be made nor written into.

    Nothing is written for it: the first folder above that exists decides.
    """
    place = folder.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = f"{place} is no folder, so nothing can be written there"
        raise NotADirectoryError(f"{key}={folder}: {what}; name another place")
    if not os.access(place, os.W_OK | os.X_OK):
        what = f"{place} may not be written to"
        raise PermissionError(f"{key}={folder}: {what}; name another place")


def check_regular_file(path: Path, what: str, *, one_name: bool = False) -> None:
    """Raise ValueError, starting with `what`, if the path exists and is not a regular file.

    With `one_name` also for a hard link, whose content may be wanted under its other name.
    """
    try:
        found = path.lstat()
    except OSError:  # nothing is there
        return
    kind = None if stat.S_ISREG(found.st_mode) else "no regular file"
    if stat.S_ISLNK(found.st_mode):
        kind = "a link"
    elif kind is None and one_name and found.st_nlink > 1:
        kind = "a hard link"
    if kind is not None:
        raise ValueError(f"{what}: {path} is {kind}, and would be written; remove it")


def open_regular_file(path: Path, what: str, flags: int = 0) -> int:
    """Open a file for reading and writing without following a link; returns its descriptor.

    Raises ValueError as `check_regular_file` does, for hard links too.
    """
    check_regular_file(path, what, one_name=True)
    return os.open(path, os.O_RDWR | NOFOLLOW | flags, 0o644)


def is_own(file: Path, folder: Path) -> bool:
    """Whether a file lies in this folder, links resolved, or in the blob store of the hub's cache
    beside it.

    A link in an untrusted folder may lead to any file of this machine, which would be copied or
    shown.
    """
    folder = folder.absolute()
    kept = [parent for parent in folder.parents if parent.name == "snapshots"]
    store = [parent.with_name("blobs") for parent in kept]
    return any(_is_inside(file, root) for root in (folder, *store))


def check_own(file: Path, run: Path) -> None:
    """Raise ValueError for a file of an untrusted run that is a link out of its folder."""
    if not is_own(file, run) and not is_trusted_run(run):
        hint = f"replace it by its target, or set {TRUST_RUN}={run} if the link is yours"
        raise ValueError(f"{file}: is a link out of the run's folder; {hint}")


def _written(folder: Path) -> Iterator[Path]:
    """The existing paths at names that are written."""
    for path in _entries(folder):
        if path.name in FOLDERS or FILES.fullmatch(path.name):
            yield path
        if path.name in DEEP and path.is_dir() and not path.is_symlink():
            for where, folders, files in os.walk(path):
                yield from (Path(where, name) for name in (*folders, *files))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # the folder does not exist yet
        return []


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False
