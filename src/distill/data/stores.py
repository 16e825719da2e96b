"""Files in stores that fsspec reads: s3://, gs://, hf://, http://, https://, memory://.

Every question to a store ends within `SECONDS`, and is asked again after a wait, except where the
store refuses. A file system of fsspec belongs to one process: workers and ranks open their own.
"""

from __future__ import annotations

import glob
import logging
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from distill.data.braces import names_of
from distill.machine.faults import first_line
from distill.terminal.secret import masked

log = logging.getLogger(__name__)
# Loggers with a line for every read: Google's warn of a missing login, also of a public bucket.
GOOGLE = ("gcsfs", "google.auth")
CHATTY = {"gs": GOOGLE, "gcs": GOOGLE, "hf": ("httpx", "httpx2")}
T = TypeVar("T")
# Scheme -> how to install what reads it; None: with distill.
SCHEMES = {
    "s3": "pip install 'distill[s3]'",
    "gs": "pip install 'distill[gcs]'",
    "gcs": "pip install 'distill[gcs]'",
    "hf": None,
    "http": None,
    "https": None,
    "memory": None,
}
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
SECONDS = 60.0  # ours: for an answer, or for a block
WAITS = (1.0, 4.0, 10.0, 30.0)  # ours: seconds before each further try during a run
FIRST_WAITS = (1.0,)  # ours: before it begins, where somebody waits for the answer
REFUSED = (401, 403, 404, 410)
BLOCK = 2**23  # ours: bytes that are fetched at once
# What identifies a version of a file, in fsspec's many stores.
MARKS = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "last_modified", "created")
AT_ONCE = 8  # ours: questions to a store at the same time


class Refused(ValueError):
    """The store refuses a file, or has none of this name."""


class Unreachable(OSError):
    """The store does not answer, after all tries."""


@dataclass(frozen=True)
class Stored:
    """A file in a store: its URL, its bytes, and a mark of its version."""

    url: str
    size: int
    mark: str


def is_url(path: str) -> bool:
    return URL.match(path) is not None


def check_url(path: str, key: str = "data.path") -> None:
    """Raise ValueError for a scheme that is not read, or whose package is not installed."""
    scheme = URL.match(path)[1].lower()  # type: ignore[index]
    if scheme not in SCHEMES or "::" in path:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        what = "is no address that is read; there are"
        raise ValueError(f"{key}={masked(path)}: {what} {known}, and paths of a local disk")
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        how = SCHEMES[scheme] or f"pip install {getattr(error, 'name', None) or 'fsspec[http]'}"
        what = f"the package that reads {scheme}:// is not installed"
        raise ValueError(f"{key}={masked(path)}: {what}; {how}") from None


def filesystem(url: str) -> Any:
    """The file system of a URL, in this process, with fsspec's configuration of the user."""
    import fsspec

    scheme, options = URL.match(url)[1].lower(), {}  # type: ignore[index]
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, connect=15, sock_read=SECONDS / 2)
        options = {"client_kwargs": {"timeout": limits}}
    elif scheme == "s3":
        options = {
            "config_kwargs": {
                "connect_timeout": 10,
                "read_timeout": SECONDS / 2,
                "retries": {"max_attempts": 1},
            }
        }
    for name in CHATTY.get(scheme, ()):
        _quieten(name)
    return fsspec.filesystem(scheme, **options)


def _quieten(name: str) -> None:
    """Leave out what a library logs, if nobody has asked for it: `ask` says what failed."""
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def within(seconds: float, task: Callable[[], T]) -> T:
    """The result of `task`. Raises TimeoutError if it takes longer; it may then still run."""
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(task())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return found[0]


def ask(
    url: str, task: Callable[[Any], T], waits: Iterable[float] | None = None, key: str = "data.path"
) -> T:
    """The result of `task` with the file system of a URL, tried again after each of the waits.

    Raises Refused and Unreachable, in a sentence that starts with `key`.
    """
    begun, waits = time.monotonic(), list(WAITS if waits is None else waits)
    named = f"{key}: {masked(url)}"
    for number, wait in enumerate([*waits, None]):
        try:
            return within(SECONDS, lambda: task(filesystem(url)))
        except Exception as found:  # stores raise nearly anything
            error = _cause_of(found)
            said = masked(first_line(error, 160)).rstrip(".") or type(error).__name__
            if status := _refusal(error):
                raise Refused(f"{named}: {_advice(status)} ({said})") from None
            if wait is None:
                spent = f"{number + 1} tries in {time.monotonic() - begun:.0f} s"
                what = f"cannot be read from its store, {spent} ({said})"
                raise Unreachable(f"{named}: {what}; check the network and the address") from None
        if number == 0:
            log.warning("%s: %s; trying again", named, said)
        time.sleep(wait)
    raise AssertionError


def _cause_of(error: BaseException) -> BaseException:
    """The error itself; fsspec's HTTP says of every failure that the file does not exist."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and cause is not None else error


def _refusal(error: BaseException) -> int | None:
    """The status by which a store refuses for good; None for other errors."""
    given = next((s for s in map(_status, (error, error.__cause__)) if s), None)
    status = int(given) if str(given).isdigit() and int(given) in REFUSED else None
    names = {cls.__name__ for cls in type(error).__mro__}
    if status is None and names & {"PermissionError", "NoCredentialsError", "GatedRepoError"}:
        return 403
    if status is None and str(error).startswith("Forbidden: "):  # gcsfs's, which has no status
        return 403
    if status is None and names & {"FileNotFoundError", "RepositoryNotFoundError"}:
        return 404
    return status


def _status(error: BaseException | None) -> Any:
    """What an error of a store has as the status of HTTP, if it has one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's, which s3fs gives as the cause
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    given = getattr(error, "status", None) or getattr(response, "status_code", None)
    return given or getattr(error, "code", None)  # Google's


def _advice(status: int) -> str:
    if status in (404, 410):
        return "there is nothing at this address; check it"
    return "the store refuses to show it; log in there, or check the address"


def found_at(
    path: str, ends: tuple[str, ...], waits: Iterable[float] | None = None
) -> list[Stored]:
    """The files that a URL names, sorted by URL: one file, a folder of files with one of these
    suffixes, at its top or else below it, or a pattern with braces or `*`.

    Raises ValueError if there is none, Refused and Unreachable.
    """
    check_url(path)
    found: dict[str, Stored] = {}
    waits = None if waits is None else tuple(waits)
    single: list[str] = []
    for name in names_of(path):
        if _is_pattern(name):
            listed = ask(name, lambda fs, name=name: fs.glob(name, detail=True), waits)
        elif _place(name).endswith(ends):
            single.append(name)
            continue
        else:
            listed = ask(name, lambda fs, name=name: _listed(fs, name, ends), waits)
        fs = filesystem(name)
        found |= {(one := _stored(fs.unstrip_protocol(p), i)).url: one for p, i in listed.items()}
    with ThreadPoolExecutor(AT_ONCE) as together:
        about = together.map(lambda name: _info(name, waits), single)
        found |= {one.url: one for one in about}
    if not found:
        what = f"holds no {' or '.join(ends)} file"
        raise ValueError(f"data.path={masked(path)}: {what}; check the address and the pattern")
    return [found[url] for url in sorted(found)]


@lru_cache(64)
def listed(path: str, ends: tuple[str, ...]) -> tuple[Stored, ...]:
    """As `found_at`, asked once in this process, without long waits."""
    return tuple(found_at(path, ends, FIRST_WAITS))


def _is_pattern(name: str) -> bool:
    """Whether a URL has a glob's letters; the ? of http starts a query."""
    if name.lower().startswith("http"):
        return "*" in _place(name)
    return glob.has_magic(name)


def _place(url: str) -> str:
    """The path of a URL, without the query of http."""
    return urlsplit(url).path if url.lower().startswith("http") else url


def _listed(fs: Any, folder: str, ends: tuple[str, ...]) -> dict[str, Any]:
    """The files of a folder by path: at its top, or if there is none, in all of its folders."""
    top = {str(i["name"]): i for i in fs.ls(folder, detail=True) if i.get("type") != "directory"}
    kept = {name: i for name, i in top.items() if _place(name).endswith(ends)}
    if kept or not hasattr(fs, "find"):
        return kept
    below = fs.find(folder, detail=True)
    return {name: i for name, i in below.items() if _place(name).endswith(ends)}


def _stored(url: str, info: dict[str, Any]) -> Stored:
    size = info.get("size")
    if not isinstance(size, int):  # a listing of http, or a server that hides it
        return _info(url, None)
    return Stored(url, size, next((str(info[k]) for k in MARKS if info.get(k)), ""))


def _info(url: str, waits: Iterable[float] | None) -> Stored:
    info = ask(url, lambda fs: fs.info(url), waits)
    if not isinstance(info.get("size"), int):
        what = "its store does not say how large it is"
        raise Refused(f"data.path: {masked(url)}: {what}; copy it to a disk first")
    return _stored(url, info)


def name_of(url: str) -> str:
    """The name of the file at a URL."""
    return posixpath.basename(_place(url))


def read(url: str, offset: int, size: int, waits: Iterable[float] | None = None) -> bytes:
    """`size` bytes from `offset` on; fewer at the end of the file."""
    if not size:
        return b""
    data = ask(url, lambda fs: fs.cat_file(url, start=offset, end=offset + size), waits)
    return data if len(data) <= size else data[offset : offset + size]  # no ranges: all of it


def exists(url: str) -> bool:
    """Whether there is a file at a URL. Raises Unreachable."""
    try:
        _info(url, FIRST_WAITS)
    except Refused as error:  # many stores say 403 for what is not there
        log.debug("%s", error)
        return False
    return True


def whole(url: str, most: int, waits: Iterable[float] = FIRST_WAITS) -> bytes | None:
    """A small file; None if there is none. Raises ValueError if it has more than `most` bytes."""
    try:
        found = _info(url, waits)
    except Refused as error:  # many stores say 403 for what is not there
        log.debug("%s", error)
        return None
    if found.size > most:
        raise ValueError(f"data.path: {masked(url)}: is larger than {most} bytes; check it")
    return read(url, 0, found.size, waits)


def blocks(stored: Stored) -> Iterable[bytes]:
    """The content of a file in order. Raises Unreachable if it is not as large as it was said."""
    at = 0
    while at < stored.size:
        size = min(BLOCK, stored.size - at)
        start = at
        data = ask(
            stored.url, lambda fs, a=start, b=start + size: fs.cat_file(stored.url, start=a, end=b)
        )
        if len(data) == stored.size and not start:  # a server without ranges sends all of it
            size = len(data)
        if len(data) != size:
            what = f"says that it has {stored.size} bytes, and sent {len(data)} at byte {start}"
            what = f"{masked(stored.url)}: its store {what} instead of {size}"
            raise Unreachable(f"data.path: {what}; try again, or copy it to a disk and give that")
        yield data
        at += size
