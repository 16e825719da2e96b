"""Atomic files and folders: written under a temporary name beside the target, then renamed.

    metrics.csv.3fa2-4711-09ab12cd.part     <name>.<machine>-<process>-<random>.part

Every writer has its own temporary name. It identifies the leftovers of killed writers, which the
next writer removes.
"""

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from distill.machine.alive import alive, host_hash

PART = re.compile(r".+\.(?P<machine>[0-9a-f]{4})-(?P<pid>\d+)-[0-9a-f]{8}\.part", re.DOTALL)
# Temporary names of earlier versions.
OLD_PARTS = re.compile(
    r"((step_\d{6,}|best)\.ckpt|student\w*|[\w.]+\.safetensors|latents-\d{6}\.tar\.\d+)\.part"
)
LONGEST = 200  # ours: bytes of the target's name in a temporary name; file systems allow 255
MAX_AGE = 24 * 3600.0  # ours: seconds after which a part of another machine is a leftover


def temporary_path(path: Path) -> Path:
    """A unique temporary path beside `path`, to write what becomes `path`."""
    name = os.fsencode(path.name)[:LONGEST].decode("utf-8", "ignore")
    return path.with_name(f"{name}.{host_hash()}-{os.getpid()}-{secrets.token_hex(4)}.part")


@contextmanager
def open_atomic(path: Path, *, flush: bool = False) -> Iterator[BinaryIO]:
    """A binary file to write to. It becomes `path` when the block ends, and is removed if that
    fails.

    Processes of several machines may write the same file. flush: the content is flushed to disk
    before the file is renamed.
    """
    part = temporary_path(path)
    try:
        with part.open("wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # after an error, such as a full disk


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with open_atomic(path) as file:
        file.write(content)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text in UTF-8 atomically; surrogates are escaped."""
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file becomes `path` when the block ends.

    It lies in a temporary folder, which is removed. This is for libraries that write temporary
    files beside their file, as safetensors does.
    """
    part = temporary_path(path)
    part.mkdir(parents=True)
    try:
        yield part / path.name
        _set_default_permissions(part)
        (part / path.name).replace(path)
    finally:
        remove(part)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into. It replaces `folder` when the block ends, and is removed if
    that fails.
    """
    part = temporary_path(folder)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        replace_folder(part, folder)
    finally:
        remove(part)


def replace_folder(part: Path, folder: Path) -> Path:
    """Rename the complete folder `part` to `folder`, which it replaces; returns the path."""
    _set_default_permissions(part)
    if not folder.exists():
        return part.replace(folder)
    before = temporary_path(folder)
    folder.replace(before)  # two renames: there is no folder of this name for a moment
    try:
        part.replace(folder)
    except OSError:
        before.replace(folder)
        raise
    remove(before)
    return folder


def _set_default_permissions(folder: Path) -> None:
    """Give all files below default permissions: safetensors restricts them to the owner."""
    probe = temporary_path(folder / "new")
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for where, _, files in os.walk(folder):
        for file in (Path(where, name) for name in files):
            if not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600 != usual:
                file.chmod(usual)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def duplicate(path: Path, to: Path) -> None:
    """Copy a file or folder to `to`, which it replaces; by hard links where the file system can."""
    part = temporary_path(to)
    if path.is_dir():
        shutil.copytree(path, part, copy_function=_link)
    else:
        _link(path, part)
    if to.is_dir() or path.is_dir():
        replace_folder(part, to)
    else:
        part.replace(to)


def _link(path: str | Path, to: str | Path) -> None:
    try:
        Path(to).hardlink_to(path)
    except (OSError, NotImplementedError):  # for example exFAT has no links
        shutil.copyfile(path, to)


def remove_leftovers(folder: Path, *, deep: bool = False, of: str | None = None) -> int:
    """Remove the temporary files of killed writers in a folder; returns their number.

    `deep`: also in subfolders. `of`: only those of this target name. Files of a running process and
    all other names stay.
    """
    count = 0
    for path in list(_entries(folder, deep)):
        if (of is None or path.name.startswith(f"{of}.")) and _is_leftover(path):
            with suppress(OSError):  # another process removes it at the same time
                remove(path)
                count += 1
    return count


def _entries(folder: Path, deep: bool) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        yield from (Path(where, name) for name in (*folders, *files))
        if not deep:
            return
        folders[:] = [name for name in folders if not name.endswith(".part")]


def _is_leftover(path: Path) -> bool:
    """Whether this is a temporary path whose writer has ended."""
    found = PART.fullmatch(path.name)
    if not found:
        return OLD_PARTS.fullmatch(path.name) is not None
    if found["machine"] == host_hash():
        return not alive(int(found["pid"]))
    try:
        return time.time() - path.stat().st_mtime > MAX_AGE
    except OSError:
        return False
