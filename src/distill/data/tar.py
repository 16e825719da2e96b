"""The headers of a tar that anybody may have written: what they declare is doubted before memory is
taken for it.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MOST_HEADER = 2**20  # ours: bytes of all headers before a member, names and attributes included
# Ours: a longer run of digits is no number. Older versions of Python look for one in a way that
# takes the square of it.
_DIGITS = re.compile(rb"\d{256}")


class Headers:
    """A file as `tarfile` reads headers: never more at once than a header may have, wherever it
    points.
    """

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


def members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, in order; `offset_data` is where the bytes of one begin.

    Raises TarError for headers that cannot be right, and for a tar that ends before its end mark.
    """
    headers, end = Headers(file), -1
    # backslashreplace: a name must always be printable, whatever bytes it has
    how: dict[str, Any] = {"mode": "r:", "encoding": "utf-8", "errors": "backslashreplace"}
    tar = _guarded(lambda: tarfile.open(fileobj=headers, **how), end)  # noqa: SIM115
    while True:
        headers.renew()
        member = _guarded(tar.next, end)
        if member is None:
            break
        if member.size < 0 or tar.offset <= end:  # it would be read for ever
            raise tarfile.ReadError(f"a member of {member.size} bytes at byte {member.offset}")
        tar.members = []  # it keeps every one: gigabytes for a large set
        end = tar.offset
        yield member
    # tarfile stops without a word at a damaged header or a cut between two members: ask for the end
    # mark.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _guarded(read: Callable[[], Any], end: int) -> Any:
    """What `read` gives; TarError for all that it raises.

    `end` is the byte up to which all was right.
    """
    try:
        return read()
    except tarfile.TarError:
        raise
    except Exception as error:  # of numbers without bounds, of chains of headers: nearly anything
        what = f"a header after byte {max(end, 0)} that cannot be read"
        raise tarfile.ReadError(f"{what} ({type(error).__name__})") from None
