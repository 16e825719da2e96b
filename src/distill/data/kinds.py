"""Whether data hold edit pairs, by the names of files alone. Nothing here imports torch."""

import os

from distill.data import folder as folders
from distill.data import stores
from distill.data.folder import Index
from distill.data.named import expand, folder_of_pictures, tables_at
from distill.data.shards import index_tar
from distill.storage import formats

PARTS = ("source", "target")


def check_holds_pairs(path: str) -> None:
    """Raise as `check_pairs` for a folder or shards on this disk. Shards are read up to the first
    pair.
    """
    if stores.is_url(path) or tables_at(path):
        return
    index: Index = []
    if found := folder_of_pictures(os.path.expanduser(path)):
        index = folders.of(found).index
    for shard in [] if found else expand(path):
        inside = list(index_tar(shard).items())
        if any(len(parts) == len(PARTS) for parts in _parts(inside)):
            return
        index += inside
    if index:
        check_pairs(path, index)


def check_pairs(path: str, index: Index) -> None:
    """Raise ValueError if no sample has both pictures of an edit pair."""
    has = _parts(index)
    if any(len(parts) == len(PARTS) for parts in has):
        return
    lacks = "target" if any("source" in parts for parts in has) else "source"
    raise ValueError(
        f"data.path={path}: none of its {len(index)} samples has a {lacks} picture; an edit pair is"
        " <key>.source.png, <key>.target.png and <key>.txt in a shard"
    )


def _parts(index: Index) -> list[set[str]]:
    """The parts of an edit pair that each sample has."""
    ends = formats.suffixes()
    return [{part for part in PARTS if any(f"{part}.{e}" in p for e in ends)} for _, p in index]
