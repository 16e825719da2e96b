"""Files and folders that are there only when whole: written beside, under a name of their writer's
own, and renamed.

    metrics.csv.3fa2-4711-09ab12cd.part     <name>.<machine>-<process>-<random>.part

Two writers never share such a name. What a killed one leaves is known by it, and the next writer
takes it away.
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

from distill.machine.alive import alive, host_mark

PART = re.compile(r".+\.(?P<machine>[0-9a-f]{4})-(?P<pid>\d+)-[0-9a-f]{8}\.part", re.DOTALL)
# What versions before this one left.
EARLIER = re.compile(
    r"((step_\d{6,}|best)\.ckpt|student\w*|[\w.]+\.safetensors|latents-\d{6}\.tar\.\d+)\.part"
)
LONGEST = 200  # ours: bytes of a name in that of its part; file systems take 255
OLD = 24 * 3600.0  # ours: seconds after which another machine's part is nobody's any more


def aside(path: Path) -> Path:
    """Where this process writes what becomes `path`: beside it, under a name that nobody else
    has.
    """
    name = os.fsencode(path.name)[:LONGEST].decode("utf-8", "ignore")
    return path.with_name(f"{name}.{host_mark()}-{os.getpid()}-{secrets.token_hex(4)}.part")


@contextmanager
def opened_aside(path: Path, *, flush: bool = False) -> Iterator[BinaryIO]:
    """A file to write bytes into, which becomes `path` when the block ends, and goes if it fails.

    Several processes, of several machines too, may write the same one. flush: what was written is
    on the disk before it has the name.
    """
    part = aside(path)
    try:
        with part.open("wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # of a full disk


def put(path: Path, content: bytes) -> None:
    """A small file, there only when whole."""
    with opened_aside(path) as file:
        file.write(content)


def put_text(path: Path, text: str) -> None:
    """`put` of a text in UTF-8; what it has no bytes for stands there as an escape."""
    put(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends: in a folder of its own, which goes
    with all in it.

    For libraries that write beside the file first, under names of their own, as safetensors does.
    """
    part = aside(path)
    part.mkdir(parents=True)
    try:
        yield part / path.name
        _readable_as_usual(part)
        (part / path.name).replace(path)
    finally:
        remove(part)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` when the block ends, and goes
    if it fails.
    """
    part = aside(folder)
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        put_in_place(part, folder)
    finally:
        remove(part)


def put_in_place(part: Path, folder: Path) -> Path:
    """Give a whole folder its name, which replaces what has it; returns the path."""
    _readable_as_usual(part)
    if not folder.exists():
        return part.replace(folder)
    before = aside(folder)
    folder.replace(before)  # two renames: for no more than a moment there is neither
    try:
        part.replace(folder)
    except OSError:
        before.replace(folder)
        raise
    remove(before)
    return folder


def _readable_as_usual(folder: Path) -> None:
    """Give all files below the permissions of any new file: safetensors gives its own to their
    owner alone.
    """
    probe = aside(folder / "new")
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for where, _, files in os.walk(folder):
        for file in (Path(where, name) for name in files):
            if not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600 != usual:
                file.chmod(usual)


def remove(path: Path) -> None:
    """Remove a file or a folder, or nothing if neither is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def duplicate(path: Path, to: Path) -> None:
    """Give a file or folder a second name, which replaces what has it; without using room where
    files can be linked.
    """
    part = aside(to)
    if path.is_dir():
        shutil.copytree(path, part, copy_function=_link)
    else:
        _link(path, part)
    if to.is_dir() or path.is_dir():
        put_in_place(part, to)
    else:
        part.replace(to)


def _link(path: str | Path, to: str | Path) -> None:
    try:
        Path(to).hardlink_to(path)
    except (OSError, NotImplementedError):  # exFAT, for one, has no links
        shutil.copyfile(path, to)


def sweep(folder: Path, *, deep: bool = False, of: str | None = None) -> int:
    """Remove what killed writers have left in a folder, and count it; `deep`: below it too; `of`:
    of this name alone.

    A part whose process runs stays, and so does what does not fit the pattern: it is not ours.
    """
    count = 0
    for path in list(_entries(folder, deep)):
        if (of is None or path.name.startswith(f"{of}.")) and _left(path):
            with suppress(OSError):  # another one has just done it, or may
                remove(path)
                count += 1
    return count


def _entries(folder: Path, deep: bool) -> Iterator[Path]:
    for where, folders, files in os.walk(folder):
        yield from (Path(where, name) for name in (*folders, *files))
        if not deep:
            return
        folders[:] = [name for name in folders if not name.endswith(".part")]


def _left(path: Path) -> bool:
    """Whether this is a part that nobody writes any more."""
    found = PART.fullmatch(path.name)
    if not found:
        return EARLIER.fullmatch(path.name) is not None
    if found["machine"] == host_mark():
        return not alive(int(found["pid"]))
    try:
        return time.time() - path.stat().st_mtime > OLD
    except OSError:
        return False
