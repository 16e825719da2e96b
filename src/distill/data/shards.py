"""Random access to samples in uncompressed tar shards (WebDataset layout) or in a plain folder of images.

A sample is the set of files that share a path up to the first dot of the file name: `a/7.png`, `a/7.txt` -> key `a/7`,
extensions `png`, `txt`. Tar headers are read once, giving every file's place in its shard; samples are then read by
position. Nothing is ever extracted, so a hostile name can at most become an odd key.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections import OrderedDict

IMAGES = ("jpg", "jpeg", "png", "webp")
OPEN_FILES = 64  # per process: far under the usual limit of 1024, with room for many loaders
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)  # WebDataset's: key, then all after the first dot


def expand(path: str) -> list[str]:
    """The shards that `path` names, sorted and without repeats.

    `path` is a folder of `*.tar`, one file, a brace pattern (`shards-{000000..000003}.tar`), a glob, or both mixed.
    Raises ValueError for a malformed pattern or a URL, FileNotFoundError when a named shard is missing or none matches.
    """
    path = os.path.expanduser(os.fspath(path))
    if not path:
        raise ValueError("The data path is empty: set data.path to a folder of .tar shards, one .tar, or a pattern.")
    if path.startswith("pipe:") or "://" in path:
        raise ValueError(f"Shards are read from local disk, but the data path is {path!r}: download them first.")
    if os.path.isdir(path):
        found = [name for name in glob.glob(os.path.join(glob.escape(path), "*.tar")) if os.path.isfile(name)]
        if not found:
            raise FileNotFoundError(f"No .tar shard in the folder {path!r}: point data.path at a folder that has some.")
    else:
        found = [path] if os.path.isfile(path) else _expand_pattern(path)
    return sorted(set(found))


def _expand_pattern(path: str) -> list[str]:
    """Braces first, then globs. A name without wildcard must exist: a missing shard is a mistake, not fewer data."""
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(path))
    except ValueError:
        raise ValueError(f"The braces in the data path {path!r} do not pair: write, say, x-{{000..003}}.tar.") from None
    found = []
    for name in names:
        matches = [name] if os.path.isfile(name) else [m for m in glob.glob(name, recursive=True) if os.path.isfile(m)]
        if not matches and not glob.has_magic(name):
            raise FileNotFoundError(f"There is no shard {name!r}, named by data.path={path!r}: check it.")
        found += matches
    if not found:
        raise FileNotFoundError(f"No file matches data.path={path!r}: check the folder and the pattern.")
    return found


class Shards:
    """Samples of tar shards by index, in sorted shard order and tar order within a shard.

    Raises ValueError, naming the shard, for one that is truncated, compressed or no tar; and when there is no sample.
    Safe in forked and spawned workers: files are opened lazily and read by position, never by a shared cursor.
    """

    def __init__(self, path: str):
        self.paths = expand(path)
        self._index: list[tuple[int, str, dict[str, tuple[int, int]]]] = []  # shard, key, {extension: (offset, size)}
        for number, shard in enumerate(self.paths):
            self._index += [(number, key, files) for key, files in index_tar(shard).items()]
        if not self._index:
            raise ValueError(f"The shards at {path!r} hold no samples: files must be named <key>.<extension>.")
        self._files: OrderedDict[int, _File] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}  # descriptors mean nothing in a spawned process

    def read(self, i: int) -> dict[str, str | bytes]:
        """Sample i as {extension: bytes}, with `__key__` and `__url__` (the shard's path) as str."""
        number, key, files = self._index[i]
        sample: dict[str, str | bytes] = {}
        file = self._open(number)
        for extension, (offset, size) in files.items():
            data = os.pread(file.descriptor, size, offset)
            if len(data) != size:
                raise ValueError(f"The shard {self.paths[number]!r} has shrunk since it was opened (sample {key!r}).")
            sample[extension] = data
        return sample | {"__key__": key, "__url__": self.paths[number]}  # last: no file may pose as these

    def _open(self, number: int) -> _File:
        file = self._files.pop(number, None) or _File(self.paths[number])
        self._files[number] = file  # now the most recent
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)
        return file


class _File:
    """A descriptor that closes with its last reference, so that dropping it from the table cannot break a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def index_tar(path: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Where each file of each sample lies: key -> {lower-case extension: (offset, size)}, from the headers alone.

    Links, devices, folders and sparse files are passed over, as are hidden files and names without extension.
    Raises ValueError if the file is no plain tar, ends early, or holds the same file twice.
    """
    index: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        # backslashreplace: a key must always be printable, whatever bytes the name has
        with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as tar:
            for member in tar:
                _add(index, member, path)
                tar.members = []  # type: ignore[attr-defined]  # it keeps every member: gigabytes for a large set
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(
            f"The shard {path!r} is cut short or no plain tar ({error}): write or fetch it anew."
        ) from None
    with open(path, "rb") as file:
        file.seek(end)
        # tarfile stops without a word at a damaged header or a cut between two members: ask for the end mark.
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"The shard {path!r} is cut short or damaged at byte {end}: write or fetch it anew.")
    return index


def _add(index: dict, member: tarfile.TarInfo, path: str) -> None:
    match = _NAME.match(member.name)
    if not member.isreg() or member.issparse() or not match:
        return
    key, extension = match[1], match[2].lower()
    files = index.setdefault(key, {})
    if extension in files:
        raise ValueError(f"The shard {path!r} holds {key}.{extension} twice: give every sample its own key.")
    files[extension] = (member.offset_data, member.size)


class Folder:
    """Images below a folder, in sorted order, each with the `.txt` of the same stem beside it, if there is one.

    Reads like `Shards`: the key is the path below the folder, the url the folder; without `.txt` the caption is empty.
    """

    def __init__(self, path: str):
        self.path = os.path.expanduser(os.fspath(path))
        self.names = sorted(
            os.path.relpath(os.path.join(folder, name), self.path)
            for folder, _, names in os.walk(self.path)
            for name in names
            if _suffix(name) in IMAGES and not name.startswith(".")
        )
        if not self.names:
            raise FileNotFoundError(f"The folder {path!r} has neither .tar shards nor images ({', '.join(IMAGES)}).")

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> dict[str, str | bytes]:
        """Sample i as {extension: bytes, "txt": bytes}, with `__key__` and `__url__` as str."""
        name = self.names[i]
        image = os.path.join(self.path, name)
        caption = os.path.splitext(image)[0] + ".txt"
        text = _read(caption) if os.path.isfile(caption) else b""
        return {"__key__": name, "__url__": self.path, _suffix(name): _read(image), "txt": text}


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1][1:].lower()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
