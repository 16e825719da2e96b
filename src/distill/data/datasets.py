"""Latents and images by index, with replacement of bad samples.

A sample that does not decode is replaced by a distant one, because bad samples are often adjacent.
The replacement is fixed, so the order stays a function of (seed, step, rank). Bad samples are
counted, with names and reasons. If there are too many, the run stops.

With buckets every sample belongs to the bucket of its shape. Its replacement comes from the same
bucket, so that batches can be stacked.
"""

from __future__ import annotations

import bisect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.core.limits import check_samples
from distill.data import decode, raw
from distill.data.bad import BadSample, none_usable, reasons_of
from distill.data.buckets import Size, nearest
from distill.data.cache import USUAL_GB, Cache
from distill.data.first import MAX_IN_A_ROW, check_seeded, stride
from distill.data.folder import CAPTIONS, caption_of
from distill.data.lines import Lines
from distill.data.made import made_of, null_of
from distill.data.shards import MAX_EMPTY, Shards, check_captions, check_images
from distill.data.write import EDIT_PAIRS, NULL
from distill.machine.memory import to_shared_memory
from distill.terminal.secret import masked

log = logging.getLogger(__name__)
MIN_TRIED = 20  # with fewer, one bad sample would be a large share
Skipped = list[tuple[str, str]]  # names of bad samples, and the reasons
Found = tuple[dict | None, Skipped]  # an item or None, and the bad samples before it


class Samples(Dataset, ABC):
    """Items {"caption": str, "key": str} and those of `tensors`, from shards, a folder of images or
    prompts.

    `bad` maps names of unusable samples to reasons. `groups` maps each bucket that has any to its
    samples; for it the first bytes of every sample are read once. Raises ValueError if `limit`, the
    number of samples to use, is below 1, for malformed `buckets`, and whatever `Shards` raises.
    """

    max_empty_share = 1.0

    def __init__(
        self,
        path: str,
        *,
        limit: int | None = None,
        max_bad_share: float = 0.1,
        buckets: Sequence[Sequence[int]] | None = None,
        caption_key: str = "caption",
        cache_dir: str | None = None,
        cache_gb: float = USUAL_GB,
    ):
        check_samples(limit, max_bad_share, buckets)
        self.path = path
        self.cache = Cache.of(cache_dir, cache_gb)
        self.shards = self.open(path)
        self.max_bad_share, self.caption_key = max_bad_share, caption_key
        self.length = min(limit or len(self.shards), len(self.shards))
        self.buckets: list[Size] = [(w, h) for w, h in buckets or ()]
        self.bucket_of, self.groups = self._sorted()
        self.bad: dict[str, str] = {}
        self.tried = self.failed = 0  # draws: a bad sample counts each time
        self.captioned = self.empty = 0  # captions of draws

    def open(self, path: str) -> Shards | Lines:
        """The reader of raw samples by index."""
        return Shards(path, cache=self.cache)

    def caption(self, sample: dict) -> str:
        """The caption of a raw sample; raises BadSample."""
        return raw.caption(sample, self.caption_key)

    @abstractmethod
    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        """The tensors of a raw sample of this bucket; raises BadSample."""

    def size_of(self, sample: dict) -> Size:
        """Width and height of a raw sample from its first bytes; raises BadSample."""
        raise BadSample(sample, "it has no size")

    def measure(self, i: int) -> Size | None:
        """Width and height of sample i, from its first bytes if these suffice; None if it
        is bad.
        """
        for at_most in (raw.HEAD, -1):
            with suppress(BadSample):
                return self.size_of(self.shards.read(i, at_most))
        return None

    def _sorted(self) -> tuple[list[int], dict[int, list[int]]]:
        """The bucket of every sample, and the samples of every bucket. A bad sample goes to the
        first bucket.
        """
        if not self.buckets:
            return [], {}
        bucket_of = [
            nearest(self.buckets, self.measure(i) or self.buckets[0]) for i in range(self.length)
        ]
        groups: dict[int, list[int]] = {}
        for i, bucket in enumerate(bucket_of):
            groups.setdefault(bucket, []).append(i)
        return bucket_of, dict(sorted(groups.items()))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.length:
            raise IndexError(f"The index must lie in [0, {self.length}), got {i}.")
        item, skipped = self.find(i)
        self.account(int(item is not None), skipped)
        return item

    def __getitems__(self, indices: list[int]) -> list[Found]:
        """Items for a loader's worker; its copy of the data set counts nothing."""
        return [self.find(i) for i in indices]

    def find(self, i: int, most: int = MAX_IN_A_ROW) -> Found:
        """Item i or its replacement, None after `most` tries; and the bad samples on the way."""
        bucket = self.buckets[self.bucket_of[i]] if self.groups else None
        peers = self.groups[self.bucket_of[i]] if self.groups else range(self.length)
        start = bisect.bisect_left(peers, i)
        skipped: Skipped = []
        for ahead in range(min(most, len(peers))):
            try:
                sample = self.shards.read(peers[(start + ahead * stride(len(peers))) % len(peers)])
                found = self.tensors(sample, bucket)
                item = {**found, "caption": self.caption(sample), "key": sample["__key__"]}
                return item, skipped
            except BadSample as error:
                skipped.append((error.name, error.reason))
        return None, skipped

    def prepare(self, batch_size: int) -> None:
        """Called before a loader's workers start and the first batch is read."""

    def some(self, count: int) -> list[dict]:
        """Up to `count` items with different captions, evenly spaced; always the same ones.

        An empty caption is included only where there are no others.
        """
        several = min(count, self.length)
        found: dict[str, dict] = {}
        for i in range(several):
            item, _ = self.find(i * self.length // several)
            if item is not None:
                found.setdefault(item["caption"], item)
        captioned = [item for caption, item in found.items() if caption]
        return captioned or list(found.values())

    def account(self, good: int, skipped: Skipped, *, needed: bool = True) -> None:
        """Count samples. Raises ValueError for too many bad ones, or for none `good` where one is
        `needed`.
        """
        for name, reason in skipped:
            if name not in self.bad:
                log.warning("skipped a bad sample, %s: %s", name, reason)
            self.bad[name] = reason
        self.tried += good + len(skipped)
        self.failed += len(skipped)
        enough = good or not needed
        most = self._most(self.max_bad_share, self.tried, needed)
        if enough and (self.tried < MIN_TRIED or self.failed <= most):
            return
        what = f"the last {len(skipped)} in a row; repair the data"
        if enough:
            most_bad = f"data.max_bad_share={self.max_bad_share:g}"
            what = f"more than {most_bad}; repair the data, or raise the share"
        raise ValueError(
            f"data.path={masked(self.path)}: {self.failed} of {self.tried} samples tried are bad,"
            f" {what}. {reasons_of(self.bad)}"
        )

    def _most(self, share: float, tried: int, drawn: bool) -> float:
        """The permitted number of bad ones. For random draws four standard deviations are added."""
        if not drawn:
            return share * len(self)
        return share * tried + 4 * math.sqrt(share * (1 - share) * tried)

    def account_captions(self, captions: Sequence[str], *, drawn: bool = True) -> None:
        """Count captions of good samples. Raises ValueError if more than `max_empty_share` are
        empty.
        """
        self.captioned += len(captions)
        self.empty += sum(not caption for caption in captions)
        most = self._most(self.max_empty_share, self.captioned, drawn)
        if self.empty > most and (self.captioned >= MIN_TRIED or not drawn):
            share = f"data.max_empty_share={self.max_empty_share:g}"
            raise ValueError(
                f"data.path={masked(self.path)}: {self.empty} of {self.captioned} captions are"
                f" empty, more than {share}; write them, or raise the share"
            )


def _cache_of(options: Mapping[str, Any]) -> Cache:
    return Cache.of(options.get("cache_dir"), options.get("cache_gb", USUAL_GB))


class LatentShards(Samples):
    """Cached latents `x0`, float32 [C, h, w], all of the first good one's `shape`.

    Raises ValueError if there is none. With `seeded` each item has the `noise` [C, h, w] from which
    its teacher generated it: the key is the seed. Shards of `distill.cache` or `distill.synthesize`
    also have `null`, the embedded empty caption; each item then has `tokens`, `pooled` and `mask`
    in half precision. `made` is their manifest: the buckets, [w, h] in latents, and the teacher.
    With `embed_once` captions of other shards are embedded before training (`training.captions`).
    """

    shape = None

    def __init__(
        self,
        path: str,
        *,
        seeded: bool = False,
        buckets: Sequence[Sequence[int]] | None = None,
        embed_once: bool = False,
        **options: Any,
    ):
        folder, self.made = made_of(path, _cache_of(options))
        if seeded:
            check_seeded(path, self.made.get("what"))
        own = self.made.get("buckets")
        if buckets and own and not {tuple(b) for b in own} <= {tuple(b) for b in buckets}:
            what = f"are widths and heights in latents here, and these were made in {own}"
            raise ValueError(f"data.buckets={[list(b) for b in buckets]}: {what}; leave it out")
        buckets = buckets or (own and [*dict.fromkeys(map(tuple, own))])
        self.null: dict[str, Tensor] = {}
        if (folder / NULL).is_file():
            self.null = null_of(folder / NULL, path)
            floats = {name: x for name, x in self.null.items() if x.is_floating_point()}
            if broken := [name for name, x in floats.items() if not x.isfinite().all()]:
                what = f"{NULL} holds numbers that are not finite in its {broken[0]}"
                raise ValueError(f"data.path={path}: {what}; make the shards anew")
        super().__init__(path, buckets=buckets, **options)
        self.seeded = seeded
        self.embed_once = embed_once and not self.null
        self.embedder: Callable[[LatentShards, int], None] | None = None
        self._embedded: dict[str, Tensor] = {}  # rows of embeddings, by the name in a Cond
        self._row_of: dict[str, int] = {}  # caption -> its row
        first, skipped = self.find(0)
        if first is None:
            raise none_usable(path, dict(skipped))
        self.shape = tuple(first["x0"].shape)

    def size_of(self, sample: dict) -> Size:
        return raw.latent_size(sample)

    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        x0 = decode.latent(sample)
        shape = self.shape
        if shape and bucket:
            shape = (*shape[:-2], *reversed(bucket))
        if shape and tuple(x0.shape) != shape:
            wanted = (
                f"its bucket's {list(shape)}" if bucket else f"the first sample's {list(shape)}"
            )
            raise BadSample(sample, f"its latents are {list(x0.shape)}, {wanted}")
        found = {"x0": x0, **decode.embedding(sample, self.null)}
        if self.made.get("what") == EDIT_PAIRS:
            found["image"] = decode.beside(sample, x0.shape[-2:])
        if self._embedded:
            row = self._row_of[self.caption(sample)]
            found |= {name: rows[row] for name, rows in self._embedded.items()}
        if not self.seeded:
            return found
        try:
            seed = int(sample["__key__"].rpartition("/")[2])
        except ValueError:
            raise BadSample(sample, "its key is no seed, as data.seeded=true has it") from None
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
        return {**found, "noise": noise}

    def embed_by(self, embedder: Callable[[LatentShards, int], None]) -> None:
        """Have `embedder` called with this and the batch size before the first batch is read.

        Present embeddings are dropped: those of another training may be of another teacher.
        """
        self.embedder, self._embedded = embedder, {}

    def prepare(self, batch_size: int) -> None:
        if self.embedder is not None and not self._embedded:
            self.embedder(self, batch_size)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "embedder": None}  # it has the networks, which no worker needs

    def captions(self) -> list[str]:
        """The different captions of all samples, in the order of the shards."""
        found: dict[str, None] = {}
        for i in range(self.length):
            with suppress(BadSample):
                found[self.caption(self.shards.read(i, only=CAPTIONS))] = None
        return list(found)

    def add_embeddings(self, captions: Sequence[str], embedded: Mapping[str, Tensor]) -> None:
        """Give every item the embedding of its caption; rows [N, ...] of all N `captions`."""
        self._row_of = {caption: row for row, caption in enumerate(captions)}
        self._embedded = dict(embedded)


class ImageShards(Samples):
    """Images `pixels` in [-1, 1], [3, size, size] or those of `buckets`; ValueError if `size` is
    below 1.

    With `repeats` folders in kohya's layout are repeated as in kohya's scripts. Raises ValueError
    if no sample is an image, or if more than `max_empty_share` have no caption; 1 accepts any
    number.
    """

    def __init__(
        self,
        path: str,
        *,
        size: int,
        repeats: bool = True,
        max_empty_share: float = MAX_EMPTY,
        image_column: str | None = None,
        caption_column: str | None = None,
        **options: Any,
    ):
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"data.size={size}: must be pixels a side; other shapes are"
                " data.buckets=[[width,height]]"
            )
        check_samples(None, 0.0, None, max_empty_share)
        self.repeats, self.max_empty_share = repeats, max_empty_share
        self.columns = (image_column, caption_column)  # of Parquet tables
        super().__init__(path, **options)
        self.size = size
        self.check_pictures(path)
        in_folder = self.shards.of_folder
        share = max_empty_share
        said = check_captions(path, self.shards.index, self.caption_key, share, in_folder=in_folder)
        # In shards, and with another key, a sample without a caption is bad, unless permitted.
        taken = max_empty_share == 1 or (self.shards.of_folder and self.caption_key == "caption")
        if said and taken:
            log.warning("%s", said)

    def open(self, path: str) -> Shards:
        options = {"repeats": self.repeats, "columns": self.columns}
        return Shards(path, cache=self.cache, **options)

    def check_pictures(self, path: str) -> None:
        """Raise ValueError if no sample has what is read."""
        check_images(path, self.shards.index)

    def caption(self, sample: dict) -> str:
        ends = CAPTIONS if self.caption_key == "caption" else ("json",)
        if self.max_empty_share == 1 and caption_of(sample, ends) is None:
            return ""
        return super().caption(sample)

    def size_of(self, sample: dict) -> Size:
        return raw.image_size(sample)

    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        return {"pixels": decode.image(sample, *(bucket or (self.size,)))}


def collate(found: list[Found]) -> tuple[dict, int, Skipped]:
    """Items -> (batch of tensors [B, ...] and lists, its size, bad samples); size 0 if an item is
    missing.
    """
    items, skipped = [item for item, _ in found], [pair for _, pairs in found for pair in pairs]
    if None in items:
        return {}, 0, skipped
    columns = {key: [item[key] for item in items] for key in items[0]}
    batch = {key: torch.stack(x) if isinstance(x[0], Tensor) else x for key, x in columns.items()}
    return to_shared_memory(batch), len(items), skipped
