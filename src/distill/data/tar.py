"""The headers of a tar that anybody may have written: what they declare is doubted before memory is taken for it."""

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

MOST_HEADER = 2**20  # ours: bytes of all headers before a member, names and attributes included
# Ours: a longer run of digits is no number. Older versions of Python look for one in a way that takes the square of it.
_DIGITS = re.compile(rb"\d{256}")


class Headers:
    """A file as `tarfile` reads headers: never more at once than a header may have, wherever it points."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = MOST_HEADER

    def renew(self) -> None:
        """Before each member."""
        self._left = MOST_HEADER

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise tarfile.ReadError(f"a header that declares {size} bytes")
        data = self._file.read(size)
        if size > tarfile.BLOCKSIZE and _DIGITS.search(data):
            raise tarfile.ReadError("a header with a number of 256 digits")
        return data

    def seek(self, offset: int) -> None:
        self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()


def members(tar: tarfile.TarFile, headers: Headers) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar, in order. Raises TarError for headers that cannot be right."""
    before = -1
    while True:
        headers.renew()
        try:
            member = tar.next()
        except tarfile.TarError:
            raise
        except (
            Exception
        ) as error:  # of numbers without bounds, of chains of headers: nearly anything
            what = f"a header after byte {max(before, 0)} that cannot be read"
            raise tarfile.ReadError(f"{what} ({type(error).__name__})") from None
        if member is None:
            return
        end: Any = tar.offset  # type: ignore[attr-defined]
        if member.size < 0 or end <= before:  # it would be read for ever
            raise tarfile.ReadError(f"a member of {member.size} bytes at byte {member.offset}")
        tar.members = []  # type: ignore[attr-defined]  # it keeps every one: gigabytes for a large set
        before = end
        yield member
