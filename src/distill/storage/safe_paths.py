"""Check a folder before writing into it: an untrusted one may have links out of it, or pipes.

A link at a name that is written would overwrite its target, or have another folder written into and
cleaned. A pipe would wait for ever. The folder itself may be a link, for example to a larger disk,
and links at other names are ignored. Nothing here imports a slow library.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

TRUST_RUN = "DISTILL_TRUST_RUN"
# Files that are opened directly. All others are written atomically, which replaces a link.
FILES = re.compile(
    r"run\.log|metrics\.csv|alarms\.jsonl|hparams\.yaml|study\.db(-\w+)?|config\.yaml|run\.json"
    r"|evaluation\.json|events\.out\.tfevents\..*"
)
# Folders that are written into. Below FOLDERS without DEEP, only atomic writes happen.
DEEP = ("checkpoints", "samples", "evaluation", "inspect", "processes", "train", "models")
FOLDERS = (*DEEP, "student", "vae", "clip", "tokenizer")
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


def check_regular_file(path: Path, what: str) -> None:
    """Raise ValueError, starting with `what`, if the path exists and is not a regular file."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise ValueError(f"{what}: {path} is {kind}, and would be written; remove it")


def open_regular_file(path: Path, what: str, flags: int = 0) -> int:
    """Open a file for reading and writing without following a link; returns its descriptor.

    Raises ValueError as `check_regular_file` does.
    """
    check_regular_file(path, what)
    return os.open(path, os.O_RDWR | NOFOLLOW | flags, 0o644)


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
