"""Random access to samples in uncompressed tar shards (WebDataset layout) or in a plain folder of
images.

A sample is the set of files with one path up to the first dot of the file name: `a/7.png`,
`a/7.txt` -> key `a/7`, extensions `png`, `txt`. Tar headers are read once, for the position of
every file; samples are then read by position. Nothing is extracted, so a hostile name is at most an
odd key. Folders: see `folder`.
"""

import glob
import hashlib
import logging
import os
import re
import tarfile
from collections import Counter
from pathlib import Path

from braceexpand import braceexpand

from distill.data import folder as folders
from distill.data.bad import MOST_FILES, MOST_TOGETHER, BadSample, Unread, most_of
from distill.data.folder import CAPTIONS, Index, Places, uncaptioned
from distill.data.kept_open import KeptOpen
from distill.data.tar import members
from distill.data.walk import Below, below
from distill.storage import formats
from distill.storage.formats import is_hidden
from distill.terminal.shown import shown

log = logging.getLogger(__name__)
MAX_EMPTY = 0.5  # ours: the share of pictures without a caption above which a set is refused
DOTTED = "a key ends at the first dot of a file's name: write names with no other dot"
# First bytes of files that are mistaken for shards, and the remedy.
MAGIC = {
    b"\x1f\x8b": "is compressed by gzip, and samples are read by position: gunzip it first",
    b"BZh": "is compressed by bzip2, and samples are read by position: bunzip2 it first",
    b"\xfd7zXZ": "is compressed by xz, and samples are read by position: unxz it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd, and samples are read by position: unzstd it first",
    b"PK\x03\x04": "is a zip archive: unpack it and give its folder",
    b"PAR1": f"is a Parquet table: write its pictures into a folder first, as {folders.HOW} shows",
    b"ARROW1": f"is an Arrow table: write its pictures into a folder first, as {folders.HOW} shows",
    b"\x89PNG": "is a picture: give the folder that it is in",
    b"\xff\xd8\xff": "is a picture: give the folder that it is in",
}
BEGUN = "making.yaml"  # settings of a shard job, beside its shards
MADE = re.compile(r"latents-\d{6}\.tar")
# Suffixes of files that are mistaken for data.
RECORDED = (*CAPTIONS, "jsonl", "csv")
# WebDataset's rule: the key, then everything after the first dot.
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)


class Shards:
    """Samples by index: of tar shards in sorted order, in tar order within each, or of a folder of
    images.

    `of_folder`: whether it is a folder of images. `said`: sentences on what the owner may not
    expect, which are also logged. Raises ValueError and FileNotFoundError as `expand`, `index_tar`
    and `folder.of`, or if there is no sample.
    """

    def __init__(self, path: str, *, repeats: bool = True):
        folder = os.path.expanduser(path)
        found = folder_of_pictures(folder)
        self._kept = KeptOpen()
        self.of_folder = found is not None
        if found:
            made = folders.of(found, repeats=repeats)
            self._index = [(key, folder, places) for key, places in made.index]
            self.said = made.said
        else:
            shards = expand(path)
            self._index = [
                (key, shard, files) for shard in shards for key, files in index_tar(shard).items()
            ]
            self.said = [*beside_shards(folder), *_about_keys(self.index)]
        if not self._index:
            raise ValueError(
                f"The shards at {path!r} hold no samples: files must be named <key>.<extension>."
            )
        tell(path, self.said)

    @property
    def index(self) -> Index:
        """Key and file positions of every sample."""
        return [(key, places) for key, _, places in self._index]

    def __len__(self) -> int:
        return len(self._index)

    def name(self, i: int) -> str:
        """Name of sample i in messages: shard or folder, and key."""
        key, url, _ = self._index[i]
        return shown(f"{url}:{key}")

    def digest(self) -> str:
        """Hash of all keys, and of the extensions, positions and sizes of the files."""
        found = hashlib.sha256()
        for key, _, places in self._index:
            where = [
                (end, place) if isinstance(place, bytes) else (end, *place[1:])
                for end, place in places.items()
            ]
            found.update(repr((key, where)).encode())
        return found.hexdigest()

    def read(self, i: int, at_most: int = -1) -> dict[str, str | bytes]:
        """Sample i as {extension: bytes}, with `__key__` and `__url__` (shard or folder) as str.

        With `at_most` only that many bytes of each file. A file that is too large is `Unread`. Any
        process and thread may read. Raises BadSample for too many files, and
        ValueError if the shard has shrunk.
        """
        key, url, places = self._index[i]
        sample: dict[str, str | bytes] = {}
        names = {"__key__": key, "__url__": url}
        if len(places) > MOST_FILES:
            raise BadSample(names, f"it has {len(places)} files, more than {MOST_FILES}")
        left = MOST_TOGETHER
        for extension, place in places.items():
            if isinstance(place, bytes):
                sample[extension] = place
                continue
            path, offset, size = place
            size = size if size >= 0 else os.path.getsize(path)
            most = min(most_of(extension), left)
            if at_most < 0 and size > most:
                sample[extension] = Unread.of(size, most)
                continue
            size = size if at_most < 0 else min(at_most, size)
            left -= size
            sample[extension] = data = self._bytes(place, size)
            if len(data) < size and at_most < 0:
                raise ValueError(
                    f"The file {path!r} has shrunk since it was opened (sample {key!r})."
                )
        return sample | names  # last: no file may replace these

    def _bytes(self, place: tuple[str, int, int], size: int) -> bytes:
        """The first `size` bytes at a place. Shards stay open, and files of a folder do not."""
        path, offset, in_shard = place
        if in_shard >= 0:
            return self._kept.read(path, offset, size)
        with open(path, "rb") as file:
            return file.read(size)


def check_pictures(
    path: str, *, repeats: bool = True, caption_key: str = "caption", max_empty_share: float = 1.0
) -> None:
    """Raise as `Shards` for a path without shards and pictures, and as `check_captions` for a
    folder.

    It opens no shard and no picture, so that commands can call it first.
    """
    if found := folder_of_pictures(os.path.expanduser(path)):
        made = folders.of(found, repeats=repeats)
        try:
            check_captions(path, made.index, caption_key, max_empty_share)
        except ValueError:  # these sentences may name the reason
            tell(path, made.said)
            raise
    else:
        expand(path)


def tell(path: str, said: list[str]) -> None:
    """Log sentences on the data at `path` that the owner may not expect."""
    for sentence in said:
        log.warning("%s: %s", path, sentence)


def check_captions(path: str, index: Index, key: str, most: float) -> str | None:
    """Raise ValueError if more than this share of samples lack a caption; a sentence if some do."""
    bare = uncaptioned(index, CAPTIONS if key == "caption" else ("json",))
    if not bare:
        return None
    what = f"{len(bare)} of {len(index)} pictures in {path}, {bare[0]} for one, have no caption"
    if len(bare) <= most * len(index):
        return f"{what}, and count as pictures of the empty one"
    beside = " or ".join(f".{end}" for end in (CAPTIONS if key == "caption" else ("json",)))
    raise ValueError(
        f"data.path={path}: {len(bare)} of {len(index)} pictures have no caption, {bare[0]} for"
        f" one; give each a {beside} of its name, or metadata.jsonl, or take them so by"
        " data.max_empty_share=1"
    )


def check_images(path: str, index: Index) -> None:
    """Raise ValueError if no sample has an image."""
    ends = set(formats.suffixes())
    if any(ends & places.keys() for _, places in index):
        return
    there = Counter(end for _, places in index for end in places)
    some = ", ".join(f"{n} .{end}" for end, n in there.most_common(4))
    what = f"data.path={path}: none of its {len(index)} samples has an image, only {some}"
    if any(end.rpartition(".")[2] in ends for end in there):
        raise ValueError(f"{what}; {DOTTED}")
    if any(end.endswith("npy") for end in there):
        raise ValueError(f"{what}; read cached latents by data=latents")
    unread = [end for end in there if formats.is_unreadable(end)]
    raise ValueError(f"{what}; {formats.advice(unread) if unread else 'check the path'}")


def folder_of_pictures(folder: str) -> Below | None:
    """The files of a folder that is read as pictures: with pictures and no shard at its top, or
    with neither.
    """
    if not os.path.isdir(folder) or _shards_in(folder):
        return None
    found = below(folder)
    ends = {folders.suffix(name) for name in found.files}
    return found if ends & set(formats.suffixes()) or "tar" not in ends else None


def _shards_in(folder: str) -> list[str]:
    """The shards at the top of a folder, sorted, .TAR included."""
    names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    return [
        os.path.join(folder, name)
        for name in names
        if folders.suffix(name) == "tar"
        and os.path.isfile(os.path.join(folder, name))
        and not copied(os.path.join(folder, name))
    ]


def shards_in(folder: Path) -> list[Path]:
    """The shards of a shard job in a folder, in order; files with other names are not its own."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(folder / name for name in names if MADE.fullmatch(name))


def copied(path: str) -> bool:
    """Whether this shard is in the folder of a shard job but has not one of its names: a copy."""
    folder, name = os.path.split(path)
    return not MADE.fullmatch(name) and os.path.isfile(os.path.join(folder, BEGUN))


def _shards_below(folder: str) -> list[str]:
    """The shards at the top of a folder, or if there is none, those in all of its folders."""
    found = below(folder)
    deep = [found.path(name) for name in found.files if folders.suffix(name) == "tar"]
    return _shards_in(folder) or [path for path in deep if not copied(path)]


def beside_shards(folder: str) -> list[str]:
    """Sentences on files in a folder of shards that are not read; [] for other paths."""
    if not os.path.isdir(folder):
        return []
    files = below(folder).files
    ends = formats.suffixes()
    top = bool(_shards_in(folder))
    kinds = {
        "pictures beside the shards": [n for n in files if folders.suffix(n) in ends],
        "shards of other names than distill gives": [
            n for n in files if folders.suffix(n) == "tar" and copied(os.path.join(folder, n))
        ],
        "compressed shards": [n for n in files if folders.packed(n)],
        "shards in subfolders": [
            n for n in files if folders.suffix(n) == "tar" and top and "/" in n
        ],
    }
    return [
        f"{what} are not read ({len(names)}, {names[0]} for one): {ADVICE[what]}"
        for what, names in kinds.items()
        if names
    ]


ADVICE = {
    "pictures beside the shards": "give them a folder of their own, or put them into a shard",
    "shards of other names than distill gives": "move copies elsewhere",
    "compressed shards": "gunzip or unpack them",
    "shards in subfolders": "give them as a pattern: data.path='folder/**/*.tar'",
}


def _about_keys(index: Index) -> list[str]:
    """Sentences on names that WebDataset's rule may split in another way than the owner expects."""
    ends = formats.suffixes()
    dotted = [
        (key, end)
        for key, places in index
        for end in places
        if "." in end and end.rpartition(".")[2] in ends
    ]
    several = [(key, has) for key, has in ((k, [e for e in p if e in ends]) for k, p in index)]
    several = [(key, has) for key, has in several if len(has) > 1]
    said = []
    if dotted:
        key, end = dotted[0]
        said.append(f"pictures as {key}.{end} are not read ({len(dotted)}); {DOTTED}")
    if several:
        key, has = several[0]
        best = min(has, key=ends.index)
        said.append(
            f"of samples with several pictures ({len(several)}, {key} for one: {', '.join(has)}) "
            f"one is read, there the .{best}"
        )
    return said


def expand(path: str) -> list[str]:
    """The shards that `path` names, sorted and without repeats.

    `path` is a folder of `*.tar`, at its top or else below it; one file; a brace pattern
    (`shards-{000000..000003}.tar`); a glob; or both mixed. Raises ValueError for a malformed
    pattern or a URL, FileNotFoundError if a named shard is missing or none matches.
    """
    path = os.path.expanduser(path)
    if os.altsep:  # Windows: a backslash has another meaning in braces and globs
        path = path.replace(os.sep, "/")
    if not path or path.startswith("pipe:") or "://" in path:
        raise ValueError(
            f"data.path={path!r}: must be a folder of .tar shards, one .tar or a pattern, on a"
            " local disk"
        )
    if os.path.isdir(path):
        if shards := _shards_below(path):
            return shards
        raise _no_shards_in(path)
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
        if not matches and not glob.has_magic(name):  # a missing shard is an error
            raise FileNotFoundError(
                f"There is no shard {name!r}, named by data.path={path!r}: check it."
            )
        found.update(matches)
    if not found:
        raise FileNotFoundError(
            f"No file matches data.path={path!r}: check the folder and the pattern."
        )
    return sorted(found)


def _no_shards_in(path: str) -> FileNotFoundError:
    files = below(path).files
    what = f"No file matches data.path={path!r}: it is a folder without shards (.tar)"
    if any(folders.suffix(name) in formats.suffixes() for name in files):
        return FileNotFoundError(f"{what} and with pictures; read those by data=images")
    advice = folders.remedy(files) or "check the folder"
    return FileNotFoundError(f"{what} that holds {folders.holds(files)}; {advice}")


def index_tar(path: str) -> dict[str, Places]:
    """Positions of the files of each sample, by key, from the headers alone.

    Links, devices, folders, sparse files, hidden files and folders, and names without extension are
    ignored. Raises ValueError if the file is no plain tar, is cut short, or holds a file twice.
    """
    index: dict[str, Places] = {}
    with open(path, "rb") as file:
        try:
            for member in members(file):
                match = _NAME.match(member.name)
                if not member.isreg() or member.issparse() or not match:
                    continue
                key, extension = match[1], match[2].lower()
                if any(is_hidden(part) for part in key.split("/")[:-1] if part.strip(".")):
                    continue  # thumbnails, and macOS's own files
                if extension in index.setdefault(key, {}):
                    raise ValueError(
                        f"The shard {path!r} holds {key}.{extension} twice: each needs its own key."
                    )
                index[key][extension] = path, member.offset_data, member.size
        except tarfile.TarError as error:
            file.seek(0)
            start = file.read(8)  # only now: a tar may start with a file named BZhang
            for mark, said in MAGIC.items():
                if start.startswith(mark):
                    raise ValueError(f"The shard {path!r} {said}.") from None
            if folders.suffix(path) in RECORDED:
                what = "holds captions or records of pictures: give the folder that they are in"
                raise ValueError(f"The shard {path!r} {what}.") from None
            what = f"is cut short or damaged, or no plain tar ({error})"
            raise ValueError(f"The shard {path!r} {what}: write or fetch it anew.") from None
    return index
