"""Random access to samples in uncompressed tar shards (WebDataset layout) or in a plain folder of
images.

A sample is the set of files with one path up to the first dot of the file name: `a/7.png`,
`a/7.txt` -> key `a/7`, extensions `png`, `txt`. Tar headers are read once, for the position of
every file; samples are then read by position. Nothing is extracted, so a hostile name is at most an
odd key. Folders: see `folder`.
"""

import hashlib
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection

from distill.data import folder as folders
from distill.data import stores
from distill.data.bad import MOST_FILES, MOST_TOGETHER, BadSample, Unread, most_of
from distill.data.cache import Cache, Fetched, fetch
from distill.data.folder import CAPTIONS, Index, Places, uncaptioned
from distill.data.kept_open import KeptOpen
from distill.data.named import beside_shards, expand, folder_of_pictures, stored_shards, tables_at
from distill.data.tables import as_shards, check_tables
from distill.data.tar import members
from distill.storage import formats
from distill.storage.formats import is_hidden
from distill.terminal.shown import shown

log = logging.getLogger(__name__)
MAX_EMPTY = 0.5  # ours: the share of pictures without a caption above which a set is refused
DOTTED = "a key ends at the first dot of a file's name: write names with no other dot"
# First bytes of files that are mistaken for shards, and the remedy.
MAGIC = {
    b"\x1f\x8b": "is compressed by gzip, and samples are read by position; gunzip it first",
    b"BZh": "is compressed by bzip2, and samples are read by position; bunzip2 it first",
    b"\xfd7zXZ": "is compressed by xz, and samples are read by position; unxz it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd, and samples are read by position; unzstd it first",
    b"PK\x03\x04": "is a zip archive; unpack it and give its folder",
    b"PAR1": "is a Parquet table; name it .parquet",
    b"ARROW1": f"is an Arrow table; write its pictures into a folder first, as {folders.HOW} shows",
    b"\x89PNG": "is a picture; give the folder that it is in",
    b"\xff\xd8\xff": "is a picture; give the folder that it is in",
}
# Suffixes of files that are mistaken for data.
RECORDED = (*CAPTIONS, "jsonl", "csv")
# First parts of extensions of pairs, and how these are read.
PAIRED = {
    "source.": "read edit pairs by data=pairs",
    "winner.": "read pairs of a preference by data=preference",
}
# WebDataset's rule: the key, then everything after the first dot.
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$", re.DOTALL)


class Shards:
    """Samples by index: of tar shards in sorted order, in tar order within each, or of a folder of
    images.

    `of_folder`: whether it is a folder of images. `said`: sentences on what the owner may not
    expect, which are also logged if it `tells`. Raises ValueError and FileNotFoundError as
    `expand`, `index_tar` and `folder.of`, or if there is no sample. `parts` are the names before
    the suffixes of pictures that the caller reads itself: `winner` of `7.winner.png`.
    """

    def __init__(
        self,
        path: str,
        *,
        repeats: bool = True,
        parts: Collection[str] = (),
        cache: Cache | None = None,
        columns: tuple[str | None, ...] = (),
        tells: bool = True,
    ):
        cache = cache or Cache.of()
        folder = os.path.expanduser(path)
        found = folder_of_pictures(folder)
        self._kept, self._fetched = KeptOpen(), Fetched([])
        self.of_folder = found is not None
        self._index: list[tuple[str, str, Places]]
        if tables := tables_at(path):
            made = as_shards(tables, cache, *columns)
            self._index = [(k, shard, p) for shard in made for k, p in index_tar(shard).items()]
            self.said = []
        elif stores.is_url(path):
            self._fetched = fetch(stored_shards(path), cache, index_tar)
            self._index = [
                (key, url, files)
                for url, places in self._fetched.indexes
                for key, files in places.items()
            ]
            self._fetched.indexes = []  # workers get a copy of the index, not two
            self.said = _about_keys(self.index, parts)
        elif found:
            listed = folders.of(found, repeats=repeats)
            self._index = [(key, folder, places) for key, places in listed.index]
            self.said = listed.said
        else:
            shards = expand(path)
            self._index = [
                (key, shard, files) for shard in shards for key, files in index_tar(shard).items()
            ]
            self.said = [*beside_shards(folder), *_about_keys(self.index, parts)]
        if not self._index:
            raise ValueError(
                f"data.path={path}: its shards hold no samples; name files <key>.<extension>"
            )
        if tells:
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

    def read(
        self, i: int, at_most: int = -1, only: Collection[str] | None = None
    ) -> dict[str, str | bytes]:
        """Sample i as {extension: bytes}, with `__key__` and `__url__` (shard or folder) as str.

        With `at_most` only that many bytes of each file, with `only` only files whose names end on
        one of these extensions. A file that is too large is `Unread`. Any
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
            if only is not None and extension.rpartition(".")[2] not in only:
                continue
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
                    f"data.path: the file {path!r} has shrunk since it was opened (sample {key!r});"
                    " leave data alone while they are read"
                )
        return sample | names  # last: no file may replace these

    def _bytes(self, place: tuple[str, int, int], size: int) -> bytes:
        """The first `size` bytes at a place. Shards stay open, and files of a folder do not."""
        path, offset, in_shard = place
        if stores.is_url(path):
            return self._fetched.read(self._kept.read, path, offset, size)
        if in_shard >= 0:
            return self._kept.read(path, offset, size)
        with open(path, "rb") as file:
            return file.read(size)


def check_pictures(
    path: str,
    *,
    repeats: bool = True,
    caption_key: str = "caption",
    max_empty_share: float = 1.0,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> None:
    """Raise as `Shards` for a path without shards and pictures, and as `check_captions` for a
    folder.

    It opens no shard and no picture, so that commands can call it first.
    """
    if tables := tables_at(path):
        check_tables(tables, image_column, caption_column)
    elif found := folder_of_pictures(os.path.expanduser(path)):
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


def check_captions(
    path: str, index: Index, key: str, most: float, *, in_folder: bool = True
) -> str | None:
    """Raise ValueError if more than this share of samples lack a caption; a sentence if some do.
    `in_folder`: whether records beside pictures may have them.
    """
    bare = uncaptioned(index, CAPTIONS if key == "caption" else ("json",))
    if not bare:
        return None
    what = f"{len(bare)} of {len(index)} pictures in {path}, {bare[0]} for one, have no caption"
    if len(bare) <= most * len(index):
        return f"{what}, and count as pictures of the empty one"
    beside = " or ".join(f".{end}" for end in (CAPTIONS if key == "caption" else ("json",)))
    how = f"give each a {beside} of its name" + (", or metadata.jsonl" if in_folder else "")
    raise ValueError(
        f"data.path={path}: {len(bare)} of {len(index)} pictures have no caption, {bare[0]} for"
        f" one; {how}, or take them so by data.max_empty_share=1"
    )


def check_images(path: str, index: Index) -> None:
    """Raise ValueError if no sample has an image."""
    ends = set(formats.suffixes())
    if any(ends & places.keys() for _, places in index):
        return
    there = Counter(end for _, places in index for end in places)
    some = ", ".join(f"{n} .{end}" for end, n in there.most_common(4))
    what = f"data.path={path}: none of its {len(index)} samples has an image, only {some}"
    for start, how in PAIRED.items():
        if any(end.startswith(start) for end in there):
            raise ValueError(f"{what}; {how}")
    if any(end.rpartition(".")[2] in ends for end in there):
        raise ValueError(f"{what}; {DOTTED}")
    if any(end.endswith("npy") for end in there):
        raise ValueError(f"{what}; read cached latents by data=latents")
    unread = [end for end in there if formats.is_unreadable(end)]
    raise ValueError(f"{what}; {formats.advice(unread) if unread else 'check the path'}")


def _about_keys(index: Index, parts: Collection[str]) -> list[str]:
    """Sentences on names that WebDataset's rule may split in another way than the owner expects."""
    ends = formats.suffixes()
    dotted = [
        (key, end)
        for key, places in index
        for end in places
        if "." in end and end.rpartition(".")[2] in ends and end.partition(".")[0] not in parts
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


def index_tar(
    path: str, name: str | None = None, until: Callable[[Places], bool] | None = None
) -> dict[str, Places]:
    """Positions of the files of each sample, by key, from the headers alone. Errors call the shard
    `name`, if it is not its path. It is read up to the first sample for which `until` holds.

    Links, devices, folders, sparse files, hidden files and folders, and names without extension are
    ignored. Raises ValueError if the file is no plain tar, is cut short, or holds a file twice.
    """
    index: dict[str, Places] = {}
    called = repr(name or path)
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
                        f"data.path: the shard {called} holds {key}.{extension} twice; give each"
                        " sample its own key"
                    )
                index[key][extension] = path, member.offset_data, member.size
                if until is not None and until(index[key]):
                    break
        except tarfile.TarError as error:
            file.seek(0)
            start = file.read(8)  # only now: a tar may start with a file named BZhang
            for mark, said in MAGIC.items():
                if start.startswith(mark):
                    raise ValueError(f"data.path: the shard {called} {said}") from None
            if folders.suffix(path) in RECORDED:
                what = "holds captions or records of pictures; give the folder that they are in"
                raise ValueError(f"data.path: the shard {called} {what}") from None
            what = f"is cut short or damaged, or no plain tar ({error})"
            raise ValueError(
                f"data.path: the shard {called} {what}; write or fetch it anew"
            ) from None
    return index
