"""Random access to samples in uncompressed tar shards (WebDataset layout) or in a plain folder of images.

A sample is the set of files that share a path up to the first dot of the file name: `a/7.png`, `a/7.txt` -> key `a/7`,
extensions `png`, `txt`. Tar headers are read once, giving every file's place in its shard; samples are then read by
position. Nothing is ever extracted, so a hostile name can at most become an odd key.
"""

import glob
import hashlib
import logging
import os
import re
import tarfile

from braceexpand import braceexpand

log = logging.getLogger(__name__)
IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
Places = dict[
    str, tuple[str, int, int]
]  # lower-case extension -> where it lies: file, offset, size (-1: all of it)
ENDS = (
    *map(str.upper, CAPTIONS),
    *CAPTIONS,
)  # of captions in a folder; of two that differ in case alone the last
_NAME = re.compile(
    r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL
)  # WebDataset's: key, then all after the first dot


class Shards:
    """Samples by index: of tar shards in sorted order, in tar order within each, or of a folder of images without any.

    Raises ValueError and FileNotFoundError as `expand`, `index_tar` and `index_folder` do, or if there is no sample.
    """

    def __init__(self, path: str):
        folder = os.path.expanduser(path)
        if os.path.isdir(folder) and not any(name.endswith(".tar") for name in os.listdir(folder)):
            self._index = [(key, folder, places) for key, places in index_folder(folder).items()]
        else:
            self._index = [
                (key, shard, files)
                for shard in expand(path)
                for key, files in index_tar(shard).items()
            ]
        if not self._index:
            raise ValueError(
                f"The shards at {path!r} hold no samples: files must be named <key>.<extension>."
            )

    def __len__(self) -> int:
        return len(self._index)

    def digest(self) -> str:
        """A hash of the keys of all samples, and of the extensions, places and sizes of their files."""
        found = hashlib.sha256()
        for key, _, places in self._index:
            found.update(repr((key, [(end, *place[1:]) for end, place in places.items()])).encode())
        return found.hexdigest()

    def read(self, i: int, at_most: int = -1) -> dict[str, str | bytes]:
        """Sample i as {extension: bytes}, with `__key__` and `__url__` (shard or folder) as str.

        With `at_most` only so many bytes of each file. No file stays open, so any process may read. Raises ValueError
        if the shard has become shorter.
        """
        key, url, places = self._index[i]
        sample: dict[str, str | bytes] = {}
        for extension, (path, offset, size) in places.items():
            size = size if at_most < 0 else min(at_most, size) if size >= 0 else at_most
            with open(path, "rb") as file:
                file.seek(offset)
                sample[extension] = data = file.read(size)
            if len(data) < size and at_most < 0:
                raise ValueError(
                    f"The shard {path!r} has shrunk since it was opened (sample {key!r})."
                )
        return sample | {"__key__": key, "__url__": url}  # last: no file may pose as these


def check_path(path: str) -> None:
    """Raise, as `Shards` does, where no shard and no picture is: its errors, without reading any of them."""
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder) or any(name.endswith(".tar") for name in os.listdir(folder)):
        expand(path)
    elif not any(_is_picture(name) for _, _, names in os.walk(folder) for name in names):
        raise _nothing_in(folder)


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1][1:].lower() in IMAGES


def _nothing_in(folder: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"The folder {folder!r} has neither .tar shards nor images ({', '.join(IMAGES)})."
    )


def expand(path: str) -> list[str]:
    """The shards that `path` names, sorted and without repeats.

    `path` is a folder of `*.tar`, one file, a brace pattern (`shards-{000000..000003}.tar`), a glob, or both mixed.
    Raises ValueError for a malformed pattern or a URL, FileNotFoundError when a named shard is missing or none matches.
    """
    path = os.path.expanduser(path)
    if os.altsep:  # Windows: braces and globs take a backslash for something else
        path = path.replace(os.sep, "/")
    if not path or path.startswith("pipe:") or "://" in path:
        raise ValueError(
            f"data.path={path!r}: must be a folder of .tar shards, one .tar or a pattern, on a local disk"
        )
    if os.path.isdir(path):
        names = [os.path.join(glob.escape(path), "*.tar")]
    else:
        try:
            names = [path] if os.path.isfile(path) else list(braceexpand(path))
        except ValueError:
            raise ValueError(
                f"data.path={path!r}: its braces do not pair; write, say, x-{{000..003}}.tar"
            ) from None
    found = set()
    for name in names:
        matches = (
            [name]
            if os.path.isfile(name)
            else [m for m in glob.glob(name, recursive=True) if os.path.isfile(m)]
        )
        if not matches and not glob.has_magic(name):  # a missing shard is a mistake, not fewer data
            raise FileNotFoundError(
                f"There is no shard {name!r}, named by data.path={path!r}: check it."
            )
        found.update(matches)
    if not found:
        raise FileNotFoundError(
            f"No file matches data.path={path!r}: check the folder and the pattern."
        )
    return sorted(found)


def index_tar(path: str) -> dict[str, Places]:
    """Where the files of each sample lie, by its key, from the headers alone.

    Links, devices, folders and sparse files are passed over, as are hidden files and names without extension.
    Raises ValueError if the file is no plain tar, ends early, or holds the same file twice.
    """
    index: dict[str, Places] = {}
    with open(path, "rb") as file:
        try:
            # backslashreplace: a key must always be printable, whatever bytes the name has
            with tarfile.open(
                fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
            ) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it keeps every one: gigabytes for a large set
                    match = _NAME.match(member.name)
                    if not member.isreg() or member.issparse() or not match:
                        continue
                    key, extension = match[1], match[2].lower()
                    if extension in index.setdefault(key, {}):
                        raise ValueError(
                            f"The shard {path!r} holds {key}.{extension} twice: each needs its own key."
                        )
                    index[key][extension] = path, member.offset_data, member.size
            # tarfile stops without a word at a damaged header or a cut between two members: ask for the end mark.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
        except tarfile.TarError as error:
            what = f"is cut short or damaged, or no plain tar ({error})"
            raise ValueError(f"The shard {path!r} {what}: write or fetch it anew.") from None
    return index


def index_folder(path: str) -> dict[str, Places]:
    """Images below a folder by their path in it, sorted, each with the `.txt` and `.json` of the same stem.

    One with neither has an empty caption, of which the log is told. Raises FileNotFoundError if there is none.
    """
    here = (
        (folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if not name.startswith(".")
    )
    paths = (os.path.relpath(os.path.join(folder, name), path) for folder, name in here)
    files = {name.replace(os.sep, "/") for name in paths}  # keys are the same on all systems
    index = {}
    for key in sorted(files):
        stem, extension = os.path.splitext(key)
        if (image := extension[1:].lower()) in IMAGES:
            texts = {
                e.lower(): os.path.join(path, f"{stem}.{e}") for e in ENDS if f"{stem}.{e}" in files
            }
            there = {image: os.path.join(path, key), **(texts or {"txt": os.devnull})}
            index[key] = {end: (file, 0, -1) for end, file in there.items()}
    if not index:
        raise _nothing_in(path)
    if bare := [key for key, there in index.items() if os.devnull in there.get("txt", ())]:
        what = "no .txt or .json beside them, and count as pictures of the empty caption"
        log.warning(
            "%d of %d pictures in %s, %s for one, have %s",
            len(bare),
            len(index),
            path,
            bare[0],
            what,
        )
    return index
