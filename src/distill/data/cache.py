"""Shards of a store on this disk: `data.cache_dir`, with at most `data.cache_gb`.

The headers of every shard are read once, from the whole file. It is kept where there is room, and
otherwise dropped: its samples are then fetched one by one. To make room, shards of other data are
removed, those first that were used longest ago. A run that still reads them fetches their samples
too. Shards that were made from tables (`tables`) stay.

    <hash>-x.tar        a shard, written aside and renamed
    <hash>-x.tar.json   the positions of its files
    <hash>-x.tar.lock   locked while it is fetched: ranks and other runs wait
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from distill.data import stores
from distill.data.folder import Places
from distill.data.stores import Stored
from distill.storage.atomic import write_atomic
from distill.terminal.progress import track
from distill.terminal.secret import masked

try:
    import fcntl
except ImportError:  # Windows: two processes may fetch the same shard, and both are whole
    fcntl = None  # type: ignore[assignment]

USUAL_GB = 100.0  # ours: about a hundred shards of img2dataset
GB = 10**9
FETCHED = 4  # ours: shards at the same time
PART = ".part"
OF_TABLE = re.compile(r"-\d{5}\.tar$")
OURS = re.compile(r"[0-9a-f]{24}-.+(?<!\.json)(?<!\.lock)(?<!\.part)", re.DOTALL)


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/distill/shards`, or `~/.cache/distill/shards`."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "distill" / "shards"


@dataclass(frozen=True)
class Cache:
    """A folder on this disk, and the bytes that it may hold."""

    folder: Path
    most: int

    @classmethod
    def of(cls, cache_dir: str | None = None, cache_gb: float = USUAL_GB) -> Cache:
        """From the keys of the configuration. Raises ValueError for a negative size."""
        number = isinstance(cache_gb, int | float) and not isinstance(cache_gb, bool)
        if not number or not 0 <= cache_gb < math.inf:
            raise ValueError(f"data.cache_gb={cache_gb}: must be a finite number of at least 0")
        folder = Path(os.path.expanduser(cache_dir)) if cache_dir else default_folder()
        return cls(folder, int(cache_gb * GB))

    def make(self) -> None:
        """Make the folder. Raises ValueError if that cannot be done."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"cannot be made ({error.strerror})"
            raise ValueError(f"data.cache_dir={self.folder}: {what}; name another folder") from None

    def file(self, stored: Stored) -> Path:
        """The place of a shard; another version of it has another place."""
        of = hashlib.sha256(f"{stored.url}\n{stored.size}\n{stored.mark}".encode()).hexdigest()
        return self.folder / f"{of[:24]}-{stores.name_of(stored.url)[-80:]}"

    def room(self, size: int, mine: Collection[Path]) -> bool:
        """Whether a shard of `size` bytes fits; shards that are not `mine` may be removed."""
        with suppress(OSError):
            kept = [(path, path.stat()) for path in self.folder.glob("*") if _is_content(path)]
            total = sum(about.st_size for _, about in kept) + size
            if size > self.most:
                return False
            for path, about in sorted(kept, key=lambda pair: pair[1].st_atime):
                if total <= self.most:
                    break
                if path not in mine and not _of_table(path):
                    path.unlink(missing_ok=True)
                    total -= about.st_size
            return total <= self.most
        return False


def _is_content(path: Path) -> bool:
    """Whether this file is a shard of ours: nothing else is ever removed."""
    return OURS.fullmatch(path.name) is not None and path.is_file()


def _of_table(path: Path) -> bool:
    """Whether this shard was made from a table: a run that reads it could not fetch its samples."""
    stem = OF_TABLE.sub("", path.name)
    return stem != path.name and path.with_name(f"{stem}.done.json").exists()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file; others wait. The system releases it if the process dies."""
    with path.open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class Fetched:
    """The shards of a store: the positions of their files, and reading at a position.

    `local` maps the URL of each shard on this disk to its file.
    """

    indexes: list[tuple[str, dict[str, Places]]]
    local: dict[str, str] = field(default_factory=dict)

    def read(self, opened: Callable[[str, int, int], bytes], url: str, at: int, size: int) -> bytes:
        """Up to `size` bytes of a shard, by `opened(path, offset, size)` where it is on this disk.

        Raises OSError if the store does not answer.
        """
        if url in self.local:
            with suppress(FileNotFoundError):  # removed for another run's
                return opened(self.local[url], at, size)
        try:
            return stores.read(url, at, size)
        except stores.Refused as error:  # what a run could read before is a fault of the store
            raise stores.Unreachable(str(error)) from None


def fetch(
    shards: Sequence[Stored], cache: Cache, index: Callable[[str, str], dict[str, Places]]
) -> Fetched:
    """Read the headers of all shards, by `index(path, url)`, and keep the shards that fit.

    Raises ValueError for a folder that cannot be written, and as `stores.ask`.
    """
    cache.make()
    mine = {cache.file(stored) for stored in shards}
    making = threading.Lock()

    def one(stored: Stored) -> tuple[dict[str, Places], str | None]:
        return _one(stored, cache, mine, making, index)

    found = Fetched([])
    with ThreadPoolExecutor(FETCHED) as together:
        done = together.map(one, shards)
        try:
            for stored, (places, kept) in zip(
                shards, track(done, "fetching shards", unit="shard", total=len(shards)), strict=True
            ):
                found.indexes.append((stored.url, places))
                if kept:
                    found.local[stored.url] = kept
        except BaseException:
            together.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _one(
    stored: Stored,
    cache: Cache,
    mine: Collection[Path],
    making: threading.Lock,
    index: Callable[[str, str], dict[str, Places]],
) -> tuple[dict[str, Places], str | None]:
    """The positions in a shard, and its file on this disk or None."""
    file = cache.file(stored)
    note = file.with_name(f"{file.name}.json")
    with locked(file.with_name(f"{file.name}.lock")):
        known = _read_note(note, stored.url)
        if file.is_file() and file.stat().st_size == stored.size and known is not None:
            os.utime(file)  # used now
            return known, str(file)
        with making:
            room = cache.room(stored.size, mine)
        if known is not None and not room:
            return known, None
        part = file.with_name(f"{file.name}{PART}")
        try:
            with part.open("wb") as written:
                for block in stores.blocks(stored):
                    written.write(block)
            places = _indexed(index, part, stored)
            found: dict[str, Places] = {
                key: {end: _at(place, stored.url) for end, place in of.items()}
                for key, of in places.items()
            }
            _write_note(note, found)
            with making:
                room = cache.room(stored.size, mine)  # others have been fetched meanwhile
                if room:
                    part.replace(file)
        finally:
            part.unlink(missing_ok=True)
        return found, str(file) if room else None


def _indexed(
    index: Callable[[str, str], dict[str, Places]], part: Path, stored: Stored
) -> dict[str, Places]:
    """The positions in a shard that was fetched whole, by the size that its store says."""
    try:
        return index(str(part), masked(stored.url))
    except ValueError as error:
        size = f"its store says that it has {stored.size:,} bytes"
        what = f"{size}; if it has more, copy it to a disk and give that"
        raise ValueError(f"{error} ({what})") from None


def _at(place: object, url: str) -> tuple[str, int, int]:
    _, offset, size = place  # type: ignore[misc]
    return url, offset, size


def _write_note(note: Path, places: dict[str, Places]) -> None:
    short = {key: {end: list(place[1:]) for end, place in of.items()} for key, of in places.items()}
    write_atomic(note, json.dumps(short).encode())


def _read_note(note: Path, url: str) -> dict[str, Places] | None:
    """The positions that were noted; None if there are none, or if the note is damaged."""
    try:
        found = json.loads(note.read_bytes())
        return {
            str(key): {str(end): (url, int(at), int(size)) for end, (at, size) in of.items()}
            for key, of in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def mirrored(folder: str, names: Collection[str], cache: Cache, most: int) -> Path:
    """A folder on this disk with the small files of these names that a folder of a store has."""
    place = cache.folder / f"{hashlib.sha256(folder.encode()).hexdigest()[:24]}-beside"
    cache.make()
    place.mkdir(exist_ok=True)
    for name in names:
        content = stores.whole(f"{folder.rstrip('/')}/{name}", most)
        if content is None:
            (place / name).unlink(missing_ok=True)
        elif not (place / name).is_file() or (place / name).read_bytes() != content:
            write_atomic(place / name, content)
    return place
