"""Shards that stay open between reads: opening a file again for every sample is slow, above all on
a network's file system.
"""

import os
from functools import lru_cache
from typing import Any

# Ours: shards open at the same time, few beside the usual limit of 1024 files a process.
MOST_OPEN = 128
# Reads at a position, so that threads and forks can share an open file. Windows has no such call,
# and would not let anyone remove a file that is open.
POSITIONED = hasattr(os, "pread")


class KeptOpen:
    """The files that were read last, at most MOST_OPEN, open in this process.

    A copy of it, as in a loader's worker that is no fork, starts without open files.
    """

    def __init__(self) -> None:
        self._opened = lru_cache(MOST_OPEN)(_Opened)

    def __reduce__(self) -> Any:
        return KeptOpen, ()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset` on; fewer at the end of the file. Raises OSError."""
        if not POSITIONED:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        opened, parts = self._opened(path), []
        while size > 0:
            part = os.pread(opened.number, size, offset)
            if not part:
                break
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Opened:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)
