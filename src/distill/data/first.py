"""Whether data can be read at all: by the names of their files, and by the first samples. Nothing
here imports torch, so that commands can look before they wait for it.

Only data on this disk are read, and of shards the first one. Where its first samples are all bad,
so many are tried in all shards as for one item of a run.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from distill.data import raw, stores
from distill.data.bad import BadSample, none_usable
from distill.data.buckets import nearest
from distill.data.folder import CAPTIONS, Index, caption_of
from distill.data.kinds import PARTS, SIDES, is_latents, side_of, without_side
from distill.data.named import expand, folder_of_pictures, tables_at
from distill.data.shards import Shards, check_captions
from distill.data.write import EDIT_PAIRS, MANIFEST, PICTURES
from distill.storage.bounded import mapping_of

MAX_IN_A_ROW = 50  # samples tried for one item
Check = Callable[[dict], None]  # raises BadSample
Explain = Callable[[str, Index], None]


@cache
def stride(n: int) -> int:
    """A step length that passes through all of n positions, with the next one far from the last."""
    return next(k for k in itertools.count(int(0.618 * n) + 1) if math.gcd(k, n) == 1)


def made_as(path: str) -> str | None:
    """What `distill.cache` says beside these shards that it encoded, "" for shards of others; None
    if that is not known yet.
    """
    if stores.is_url(path):
        return None
    manifest = Path(expand(path)[0]).parent / MANIFEST
    try:
        found = mapping_of(manifest) if manifest.is_file() else {}
    except ValueError:  # said with its remedy when the data are opened
        return None
    what = found.get("what")
    return what if isinstance(what, str) else ""


def check_seeded(path: str, made: str | None) -> None:
    """Raise ValueError for latents that were encoded and not generated, where their noise is
    needed.
    """
    if made in (PICTURES, EDIT_PAIRS):
        what = "holds pictures, of which no noise is known; use data=latents"
        raise ValueError(f"data.path={path}: {what}")


def check_first(
    path: str, data: Mapping[str, Any], check: Check, explain: Explain | None = None
) -> None:
    """Raise ValueError if none of the first samples passes `check`. `explain` may first raise an
    error that says more, by the names of all files.
    """
    if stores.is_url(path) or tables_at(path):
        return
    is_folder = folder_of_pictures(os.path.expanduser(path)) is not None
    first = Shards(path if is_folder else expand(path)[0], parts=PARTS + SIDES, tells=False)
    if _any_passes(first, range(min(len(first), MAX_IN_A_ROW)), check, {}):
        return
    every = first if is_folder else Shards(path, parts=PARTS + SIDES, tells=False)
    count = min(data.get("limit") or len(every), len(every))
    tried = [k * stride(count) % count for k in range(min(count, MAX_IN_A_ROW))]
    bad: dict[str, str] = {}
    if _any_passes(every, tried, check, bad):
        return
    if explain is not None:
        explain(path, every.index)
    if "max_empty_share" in data:  # without captions, this says how to give them
        key, share = data.get("caption_key", "caption"), data["max_empty_share"]
        check_captions(path, every.index, key, share, in_folder=is_folder)
    raise none_usable(path, bad)


def _any_passes(shards: Shards, numbers: Iterable[int], check: Check, bad: dict[str, str]) -> bool:
    """Whether a sample passes; those before it are added to `bad`, name -> reason."""
    for i in numbers:
        try:
            check(shards.read(i))
        except BadSample as error:
            bad[error.name] = error.reason
        else:
            return True
    return False


def image_check(data: Mapping[str, Any]) -> Check:
    """Check of a picture with a caption."""

    def check(sample: dict) -> None:
        _check_size(sample, raw.image_size(sample), data)
        _check_caption(sample, data)

    return check


def edit_check(data: Mapping[str, Any]) -> Check:
    """Check of an edit pair."""

    def check(sample: dict) -> None:
        source, target = (raw.image_size(sample, part) for part in PARTS)
        raw.check_same_size(sample, source, target)
        _check_size(sample, target, data)
        _check_caption(sample, data)

    return check


def preference_check(data: Mapping[str, Any]) -> Check:
    """Check of a winner and a loser, pictures or latents."""

    def check(sample: dict) -> None:
        for name in SIDES:
            part = side_of(sample, name)
            if is_latents(part):
                raw.latent_size(part)
                continue
            if not data.get("size") and not data.get("buckets"):
                raise without_side(str(data["path"]))
            _check_size(part, raw.image_size(part), data)
        raw.caption(sample, data.get("caption_key", "caption"))

    return check


def latent_check(data: Mapping[str, Any]) -> Check:
    """Check of latents with a caption."""

    def check(sample: dict) -> None:
        raw.latent_size(sample)
        raw.caption(sample)

    return check


def _check_size(sample: dict, has: tuple[int, int], data: Mapping[str, Any]) -> None:
    sizes = [(width, height) for width, height in data.get("buckets") or ()]
    wanted = sizes[nearest(sizes, has)] if sizes else (data["size"],)
    raw.check_large(sample, has, *wanted)


def _check_caption(sample: dict, data: Mapping[str, Any]) -> None:
    key = data.get("caption_key", "caption")
    ends: Collection[str] = CAPTIONS if key == "caption" else ("json",)
    if data.get("max_empty_share") != 1 or caption_of(sample, ends) is not None:
        raw.caption(sample, key)
