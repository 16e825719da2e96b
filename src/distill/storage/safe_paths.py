"""Names in a folder that are written: where somebody else has made it, none may lead out of it or
hang.

A link at such a name has what it points to written over, or a whole folder beside the run written
into and swept. A pipe waits for ever. The folder itself may be a link, say to a larger disk, and
links at names that nothing writes are left alone. Nothing here imports a library that takes long.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

TRUST_RUN = "DISTILL_TRUST_RUN"
# Files that are opened as they lie. All others are written aside and renamed, which replaces a
# link.
FILES = re.compile(
    r"run\.log|metrics\.csv|alarms\.jsonl|hparams\.yaml|study\.db(-\w+)?|config\.yaml|run\.json"
    r"|evaluation\.json|events\.out\.tfevents\..*"
)
# Folders that are written into; of a student only names that a rename replaces.
DEEP = ("checkpoints", "samples", "evaluation", "inspect", "processes", "train", "models")
FOLDERS = (*DEEP, "student", "vae", "clip", "tokenizer")
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither


def is_trusted_run(file: Path) -> bool:
    """Whether the user has said that the runs of a folder which this file lies in are their own."""
    folders = [word for word in os.environ.get(TRUST_RUN, "").split(os.pathsep) if word]
    return any(file.resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def check_written_paths(folder: Path, key: str) -> None:
    """Raise ValueError, beginning with `key`, if a name that is written in this folder leads out of
    it.

    So too for what is neither a file nor a folder. Links of one's own folder, by `is_own`, may be
    there.
    """
    own = is_trusted_run(folder)
    for path in _written(folder):
        if path.is_symlink():
            if own or _is_inside(path, folder):
                continue
            what = "is a link out of the folder, and would be written through"
            way = f"put there what it points to, or set {TRUST_RUN}={folder} if the link is yours"
            raise ValueError(f"{key}={folder}: {path} {what}; {way}")
        if not path.is_dir():
            check_regular_file(path, f"{key}={folder}")


def check_regular_file(path: Path, what: str) -> None:
    """Raise ValueError, beginning with `what`, for a path at which there is something, and no file
    of its own.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
        raise ValueError(f"{what}: {path} is {kind}, and is to be written; remove it")


def open_regular_file(path: Path, what: str, flags: int = 0) -> int:
    """A file opened to be read and written, and never what a link points to.

    Raises ValueError as `check_plain`.
    """
    check_regular_file(path, what)
    return os.open(path, os.O_RDWR | NOFOLLOW | flags, 0o644)


def _written(folder: Path) -> Iterator[Path]:
    """What is there at names that are written."""
    for path in _entries(folder):
        if path.name in FOLDERS or FILES.fullmatch(path.name):
            yield path
        if path.name in DEEP and path.is_dir() and not path.is_symlink():
            for where, folders, files in os.walk(path):
                yield from (Path(where, name) for name in (*folders, *files))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # there is none yet
        return []


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a ring
        return False
