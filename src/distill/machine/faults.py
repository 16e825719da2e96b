"""Sentences for faults of the machine: a full disk or memory, a process that has died.

Libraries raise exceptions of many classes for them, and few name the file.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.machine.ranks import world_size

HINT = "hint"  # attribute of an exception: how to resume
RERUN = "give the same command again, which goes on where it stopped"
RESTART = "give the same command again, which begins anew: no shard is whole yet"
SHARED = Path("/dev/shm")  # shared memory, by which DataLoader workers return batches
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*FULL, errno.EROFS, errno.EIO)
# Messages of torch, safetensors and their C++ code for the same errors.
SAID = re.compile(
    "no space left on device|disk quota exceeded|read-only file system|file too large"
    r"|PytorchStreamWriter failed|inline_container\S* \. unexpected pos|iostream error",
    re.IGNORECASE,
)
IN_SHARED = re.compile(
    "(allocate|open|resize|write)[a-z ]* shared memory|shared memory limit|torch_shm|Bus error"
)
PEERS = re.compile(
    r"(connection (closed|reset|refused)( by peer)?|socket closed|broken pipe|remote process exited"
    "|watchdog|timed out waiting)",
    re.IGNORECASE,
)
BACKEND = re.compile("gloo|nccl|ProcessGroup|TCPStore|c10d|DistBackend", re.IGNORECASE)
NAMES = ("filename", "path", "file", "fp", "f", "save_directory", "name", "out", "folder")
PART = re.compile(r"(\.[0-9a-f]{4}-\d+-[0-9a-f]{8})?\.part(?=/|$)")  # of temporary names


@contextmanager
def hint_on_failure(hint: Callable[[], str]) -> Iterator[None]:
    """Attach a hint how to resume to any exception from inside; `hint` is called then."""
    try:
        yield
    except BaseException as error:
        if not hasattr(error, HINT):
            setattr(error, HINT, hint())
        raise


def sentence(error: BaseException, cause: BaseException) -> str | None:
    """The fault of the machine, with file and hint; None for other errors. `cause` is its root."""
    if isinstance(cause, (BrokenPipeError, ConnectionError)) and not world_size() > 1:
        return None
    if (text := _peer_failure(cause)) or (text := _shared_memory_full(cause)):
        return text
    if not (why := write_error(cause)):
        return None
    file = getattr(cause, "filename2", None) or getattr(cause, "filename", None) or _written(cause)
    where = f"{PART.sub('', str(file))}: " if file else ""
    hint = getattr(error, HINT, None) or "give the command again"
    full = "read-only" not in why.lower()
    return f"{where}{why}; {'make room' if full else 'make it writable'}, then {hint}"


def is_peer_failure(cause: BaseException) -> bool:
    """Whether this error only means that another process of the command has died."""
    return _peer_failure(cause) is not None


def _peer_failure(cause: BaseException) -> str | None:
    if world_size() == 1 or not isinstance(cause, (RuntimeError, ConnectionError, TimeoutError)):
        return None
    text = f"{type(cause).__name__} {cause}"
    found = PEERS.search(text)
    if found and BACKEND.search(text):
        return f"another process has ended ({found[0].lower()}); the first that failed says why"
    return None


def _shared_memory_full(cause: BaseException) -> str | None:
    if not isinstance(cause, RuntimeError) or not IN_SHARED.search(str(cause)):
        return None
    size = ""
    if SHARED.is_dir():
        size = f" has {shutil.disk_usage(SHARED).total / 2**20:,.0f} MB and"
    more = "data.num_workers=0 needs none of it, a container gets more by --shm-size=8g"
    return f"{SHARED}{size} is too small for the batches of DataLoader workers; {more}"


def write_error(cause: BaseException) -> str | None:
    """Why a disk cannot be written; None for other errors."""
    if isinstance(cause, OSError) and cause.errno is not None:
        return os.strerror(cause.errno) if cause.errno in UNWRITABLE else None
    if isinstance(cause, RuntimeError) or type(cause).__name__ == "SafetensorError":
        found = SAID.search(str(cause))
        if found:
            clear = re.match("no space|disk|read-only|file too", found[0], re.IGNORECASE)
            return found[0] if clear else "the disk cannot be written"
    return None


def _written(cause: BaseException) -> str | None:
    """The file that the innermost function was writing: an open file, or a path in its locals."""
    known: list[Any] = []
    step = cause.__traceback__
    while step:
        values = step.tb_frame.f_locals
        known = [*(values[name] for name in NAMES if name in values), *values.values(), *known]
        step = step.tb_next
    for kind in (_opened, _path):
        for value in known:
            if file := kind(value):
                return file
    return None


def _opened(value: Any) -> str | None:
    """The path of a file, or of an archive, that is open for writing."""
    try:
        writes = value.writable() if hasattr(value, "writable") else hasattr(value, "addfile")
        name = value.name if writes else None
        return name if isinstance(name, str) and os.path.isdir(os.path.dirname(name)) else None
    except Exception:  # an object of any library
        return None


def _path(value: Any) -> str | None:
    if isinstance(value, str) and not os.path.isabs(value):
        return None  # a relative path could be any text
    if not isinstance(value, (str, os.PathLike)):
        return None
    path = os.fspath(value)
    return path if isinstance(path, str) and os.path.isdir(os.path.dirname(path)) else None


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an error, or its class name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class _Quiet:
    """Who suppresses log records now, in any thread, and what was suppressed before."""

    def __init__(self) -> None:
        self._lock, self._count, self._before = threading.Lock(), 0, 0

    def enter(self) -> None:
        with self._lock:
            if not self._count:
                self._before = logging.root.manager.disable
                logging.disable(logging.ERROR)
            self._count += 1

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                logging.disable(self._before)


_quiet = _Quiet()


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Suppress log records below CRITICAL inside: the caller reports errors in one sentence.

    Records are heard again when the last thread has left.
    """
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()
