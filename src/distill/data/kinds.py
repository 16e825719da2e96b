"""Which samples data hold, by the names of their files alone: pictures, latents, edit pairs, or
pairs of a preference. Nothing here imports torch.
"""

import os
from collections.abc import Callable, Collection, Iterable

from distill.data import folder as folders
from distill.data import stores
from distill.data.bad import BadSample
from distill.data.folder import Index
from distill.data.named import expand, folder_of_pictures, tables_at
from distill.data.raw import LATENTS
from distill.data.shards import index_tar
from distill.storage import formats

PARTS = ("source", "target")
SIDES = ("winner", "loser")
EDIT_PAIR = "an edit pair is <key>.source.png, <key>.target.png and <key>.txt in a shard"
PREFERENCE = "a pair is <key>.winner.png, <key>.loser.png and <key>.txt in a shard"
Holds = Callable[[Iterable[str]], bool]  # whether a sample of these extensions is one of a kind


def check_holds_pairs(path: str) -> None:
    """Raise as `check_pairs` for a folder or shards on this disk. Shards are read up to the first
    pair.
    """
    if index := _index_without(path, _is_edit):
        check_pairs(path, index)


def check_pairs(path: str, index: Index) -> None:
    """Raise ValueError if no sample has both pictures of an edit pair."""
    if any(_is_edit(places) for _, places in index):
        return
    if any(is_latents(places) for _, places in index):
        raise _none_of(path, index, "a source picture", "read cached latents by data=latents")
    source_there = any(_has(places, "source") for _, places in index)
    lacks = "a target picture" if source_there else "a source picture"
    raise _none_of(path, index, lacks, EDIT_PAIR)


def check_holds_preferences(path: str) -> None:
    """Raise ValueError for a folder of pictures, and for shards on this disk without a winner and
    its loser. They are read up to the first pair.
    """
    if not stores.is_url(path) and folder_of_pictures(os.path.expanduser(path)):
        refuse_folder(path)
    if index := _index_without(path, _is_preference):
        winner_there = any(_has(places, "winner") for _, places in index)
        raise _none_of(path, index, "a loser" if winner_there else "a winner", PREFERENCE)


def refuse_folder(path: str) -> None:
    """Raise ValueError for a folder of pictures in the place of pairs of a preference."""
    what = "is a folder of pictures, and pairs are read from shards"
    how = "write <key>.winner.png, <key>.loser.png and <key>.txt into a tar"
    raise ValueError(f"data.path={path}: {what}; {how}")


def without_side(path: str) -> ValueError:
    """The error for pictures of a preference without a side."""
    what = "holds pictures; give their side in pixels, or data.buckets"
    return ValueError(f"data.size=null: data.path={path} {what}")


def check_holds_latents(path: str) -> None:
    """Raise ValueError for shards on this disk without latents. They are read up to the first
    ones.
    """
    if not (index := _index_without(path, is_latents)):
        return
    how = "make them by distill.cache"
    for option, holds in OPTIONS.items():
        if any(holds(places) for _, places in index):
            how = f"read these by data={option}"
    raise _none_of(path, index, "latents", how)


def _none_of(path: str, index: Index, what: str, how: str) -> ValueError:
    return ValueError(f"data.path={path}: none of its {len(index)} samples has {what}; {how}")


def _index_without(path: str, holds: Holds) -> Index:
    """The samples of a folder or of shards on this disk; [] if one of them is of this kind, or if
    they are not known yet.
    """
    index: Index = []
    if stores.is_url(path) or tables_at(path):
        return index
    found = folder_of_pictures(os.path.expanduser(path))
    if found:
        index = folders.of(found).index
    for shard in [] if found else expand(path):
        inside = list(index_tar(shard, until=holds).items())
        if any(holds(places) for _, places in inside):
            return []
        index += inside
    return index


def _has(ends: Iterable[str], part: str, kinds: Collection[str] | None = None) -> bool:
    """Whether there is a picture of this name before its suffix."""
    wanted = {f"{part}.{kind}" for kind in kinds or formats.suffixes()}
    return not wanted.isdisjoint(ends)


def _is_image(ends: Iterable[str]) -> bool:
    return not set(formats.suffixes()).isdisjoint(ends)


def is_latents(ends: Iterable[str]) -> bool:
    """Whether a sample of these extensions, or a winner or loser, is latents."""
    return not set(LATENTS).isdisjoint(ends)


def _is_edit(ends: Iterable[str]) -> bool:
    names = set(ends)
    return all(_has(names, part) for part in PARTS)


def _is_preference(ends: Iterable[str]) -> bool:
    names, kinds = set(ends), (*formats.suffixes(), *LATENTS)
    return all(_has(names, side, kinds) for side in SIDES)


def side_of(sample: dict, name: str) -> dict:
    """The files of the winner or the loser as a sample; raises BadSample if there are none."""
    start = f"{name}."
    found = {end.removeprefix(start): data for end, data in sample.items() if end.startswith(start)}
    if not found:
        there = ", ".join(sorted(end for end in sample if not end.startswith("__"))) or "nothing"
        what = f"it has no {name} ({start}png, {start}npy or the like), only {there}"
        raise BadSample(sample, what)
    return found | {key: sample[key] for key in ("__key__", "__url__")}


OPTIONS: dict[str, Holds] = {"images": _is_image, "preference": _is_preference, "pairs": _is_edit}
