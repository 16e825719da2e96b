"""Shards that stay open between reads: opening a file again for every sample is slow, above all on
a network's file system.
"""

import errno
import os
from functools import lru_cache
from typing import Any

try:
    import resource
except ImportError:  # Windows, where files do not stay open
    resource = None  # type: ignore[assignment]

# Ours: shards open at the same time, few beside the usual limit of 1024 files a process.
MOST_OPEN = 128
SHARE = 4  # ours: shards get at most a quarter of that limit where it is lower, as on macOS
FULL = (errno.EMFILE, errno.ENFILE)  # too many open files, of the process or of the system
# Reads at a position, so that threads and forks can share an open file. Windows has no such call,
# and would not let anyone remove a file that is open.
POSITIONED = hasattr(os, "pread")


def most_open() -> int:
    """Number of shards that may stay open in this process, at least 1."""
    if resource is None:
        return MOST_OPEN
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = limit == resource.RLIM_INFINITY
    return MOST_OPEN if unlimited else max(1, min(MOST_OPEN, limit // SHARE))


class KeptOpen:
    """The files that were read last, at most `most_open` of them, open in this process.

    A file whose handle breaks, as on a server that was restarted, is opened again. A copy of this
    object, as in a loader's worker that is no fork, starts without open files.
    """

    def __init__(self) -> None:
        self._opened = lru_cache(most_open())(_Opened)

    def __reduce__(self) -> Any:
        return KeptOpen, ()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer at the end of the file.

        Raises OSError, and ValueError if the file must be opened again and is another one by then.
        """
        if not POSITIONED:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        opened = self._open(path)
        try:
            return opened.handle.read(offset, size)
        except OSError as error:  # ESTALE, EIO: of the handle, so that a new one may serve
            if error.errno == errno.EBADF:  # closed by others; the number may be reused
                opened.handle.number = -1
            opened.renew()
            return opened.handle.read(offset, size)

    def _open(self, path: str) -> "_Opened":
        try:
            return self._opened(path)
        except OSError as error:
            if error.errno not in FULL:
                raise
            self._opened.cache_clear()
            return self._opened(path)


class _Opened:
    """A file and its open handle, which `renew` replaces."""

    def __init__(self, path: str) -> None:
        self.path, self.handle = path, _Handle(path)

    def renew(self) -> None:
        """Open the file again. Raises ValueError if it is another: its positions are unknown."""
        handle = _Handle(self.path)
        if handle.state != self.handle.state:
            what = "has been replaced by another since it was opened: give the command again"
            raise ValueError(f"The file {self.path!r} {what}.")
        self.handle = handle


class _Handle:
    """An open file, closed when nobody has it any more: another thread may be reading."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)
        found = os.fstat(self.number)
        self.state = found.st_size, found.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0:
            part = os.pread(self.number, size, offset)
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
