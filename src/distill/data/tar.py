"""Headers of a tar that is not trusted: declared sizes are checked before memory is allocated."""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MOST_HEADER = 2**20  # ours: bytes of the headers before a member, with names and attributes
# Ours: longer runs of digits are refused. Older versions of Python parse them in quadratic time.
_DIGITS = re.compile(rb"\d{256}")


class Headers:
    """A file for `tarfile`, which bounds the bytes of the headers before a member."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._left = MOST_HEADER

    def renew(self) -> None:
        """Reset the bound, before each member."""
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
    """The members of a tar, in order; `offset_data` is the position of a member's bytes.

    Raises TarError for invalid headers, and for a tar without an end mark.
    """
    headers, end = Headers(file), -1
    # backslashreplace: a name must always be printable, whatever bytes it has
    options: dict[str, Any] = {"mode": "r:", "encoding": "utf-8", "errors": "backslashreplace"}
    tar = _guarded(lambda: tarfile.open(fileobj=headers, **options), end)  # noqa: SIM115
    while True:
        headers.renew()
        member = _guarded(tar.next, end)
        if member is None:
            break
        if member.size < 0 or tar.offset <= end:  # reading would not end
            raise tarfile.ReadError(f"a member of {member.size} bytes at byte {member.offset}")
        tar.members = []  # it keeps all: gigabytes for a large set
        end = tar.offset
        yield member
    # tarfile stops without an error at a damaged header or a cut between members: check the end
    # mark.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _guarded(read: Callable[[], Any], end: int) -> Any:
    """The result of `read`; any exception becomes a TarError.

    `end` is the byte up to which the tar was valid.
    """
    try:
        return read()
    except tarfile.TarError:
        raise
    except Exception as error:  # unbounded numbers or chains of headers may raise anything
        what = f"a header after byte {max(end, 0)} that cannot be read"
        raise tarfile.ReadError(f"{what} ({type(error).__name__})") from None
