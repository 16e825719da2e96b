"""The data of a run: a data set, and the order of its batches.

The order is endless and a function of (seed, step, rank) alone. Sample positions count through all
steps: position p = step * global_batch + i is in epoch p // N, and every epoch is a permutation
seeded by (seed, epoch). Resuming needs the step alone, and the number of workers does not matter. W
processes with batch B together read what one process with batch W * B reads.

With buckets the same holds, and the global batch of a step is of one bucket. Each bucket has such
an order. Round e takes floor((e + 1) n / G) - floor(e n / G) global batches of it, where n is the
number of its samples and G the global batch. The batches of a round are in an order seeded by
(seed, round). So the share of a bucket is that of its samples.
"""

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.core.types import FILL
from distill.data.cache import USUAL_GB
from distill.data.datasets import (
    Found,
    ImageShards,
    LatentShards,
    Samples,
    collate,
)
from distill.data.drawn import Drawn, Reader
from distill.data.edit_pairs import EditPairs
from distill.data.masks import Masks, masks_of
from distill.data.pairs import Pairs
from distill.data.prompts import Prompts
from distill.data.shards import MAX_EMPTY
from distill.machine.hardware import cores
from distill.machine.memory import to_shared_memory
from distill.machine.signals import init_loader_worker


@dataclass(frozen=True)
class Order:
    """For each step from `start` on, this rank's `batch_size` indices below `length`.

    It divides the data among `world` ranks itself; no DistributedSampler may be added. Raises
    ValueError unless `length` and `batch_size` are at least 1, `start` at least 0, `rank` in [0,
    world).
    """

    length: int
    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.length, self.batch_size) < 1
            or self.start < 0
            or not 0 <= self.rank < self.world
        ):
            raise ValueError(
                f"{self}: length and batch_size must be 1 or more, start 0 or more, rank in [0,"
                " world)"
            )

    def __iter__(self) -> Iterator[list[int]]:
        shuffled = Shuffled(self.length, self.seed)
        for step in itertools.count(self.start):
            first = (step * self.world + self.rank) * self.batch_size
            yield [shuffled[position] for position in range(first, first + self.batch_size)]


@dataclass(frozen=True)
class BucketOrder:
    """As `Order`, for `groups`: bucket -> its indices, none empty.

    All ranks have the same bucket in a step.
    """

    groups: Mapping[int, Sequence[int]]
    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1
    start: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        global_batch = self.batch_size * self.world
        sizes = {bucket: len(group) for bucket, group in self.groups.items()}
        shuffled = {bucket: Shuffled(n, f"{self.seed}/{bucket}") for bucket, n in sizes.items()}

        def before(epoch: int) -> int:
            return sum(epoch * n // global_batch for n in sizes.values())

        last = (self.start + len(sizes) + 1) * global_batch // sum(sizes.values()) + 2
        for epoch in itertools.count(bisect.bisect_right(range(last), self.start, key=before) - 1):
            rounds = {
                bucket: range(epoch * n // global_batch, (epoch + 1) * n // global_batch)
                for bucket, n in sizes.items()
            }
            numbers = {k: iter(r) for k, r in rounds.items()}
            buckets = [k for k, r in rounds.items() for _ in r]
            shuffle = permutation(len(buckets), f"{self.seed}/round", epoch).tolist()
            for step, bucket in enumerate((buckets[i] for i in shuffle), before(epoch)):
                first = (next(numbers[bucket]) * self.world + self.rank) * self.batch_size
                if step >= self.start:
                    positions = range(first, first + self.batch_size)
                    yield [self.groups[bucket][shuffled[bucket][p]] for p in positions]


class Shuffled:
    """An endless sequence of the indices below `length`, each once per epoch."""

    def __init__(self, length: int, seed: int | str):
        self.length, self.seed = length, seed
        self._epoch, self._permuted = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._permuted = epoch, permutation(self.length, self.seed, epoch)
        return int(self._permuted[offset])


def permutation(length: int, seed: int | str, epoch: int) -> Tensor:
    """The order of one epoch, int64 [length]. The seed is hashed, so that neighbouring seeds are
    independent.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.randperm(
        length, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    )


class Loader(DataLoader):
    """Endless batches. Workers return the bad samples, which the data set counts in the main
    process.
    """

    dataset: Samples
    masks: Masks | None = None

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]  # a plain iterator suffices
        order: Order | BucketOrder = self.batch_sampler  # type: ignore[assignment]
        self.dataset.prepare(order.batch_size)
        for step, (batch, good, skipped) in enumerate(super().__iter__(), order.start):
            self.dataset.account(good, skipped)
            self.dataset.account_captions(batch["caption"])
            if self.masks is not None:
                first = (step * order.world + order.rank) * order.batch_size
                positions = range(first, first + order.batch_size)
                batch[FILL] = self.masks(order.seed, positions, batch["pixels"].shape[-2:])
            yield batch


@dataclass(frozen=True)
class Source:
    """`batch_size` samples per process and micro-batch, read ahead by `num_workers` processes.

    With `masks` each picture has one, `fill` [B, 1, H, W].
    """

    dataset: Samples
    batch_size: int
    num_workers: int = 0
    masks: Masks | None = None

    def loader(self, *, seed: int, rank: int = 0, world: int = 1, start: int = 0) -> Loader:
        """The endless stream of batches from batch `start` on; tensors [B, ...], everything else in
        lists.
        """
        order, groups = (seed, self.batch_size, rank, world, start), self.dataset.groups
        loader = Loader(
            self.dataset,
            batch_sampler=(
                BucketOrder(groups, *order) if groups else Order(len(self.dataset), *order)
            ),
            collate_fn=collate,
            num_workers=self.workers,
            worker_init_fn=init_loader_worker,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A DataLoader draws its workers' seed from the global generator, against exact resume.
            generator=torch.Generator().manual_seed(seed),
        )
        loader.masks = self.masks
        return loader

    @property
    def workers(self) -> int:
        """Number of reading processes: at most one per core, above which torch warns."""
        return min(self.num_workers, cores())

    def once(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Found]]:
        """For each batch of indices the items; bad samples are neither replaced nor counted."""
        data = DataLoader(
            Once(self.dataset),
            batch_sampler=batches,
            collate_fn=to_shared_memory,
            num_workers=self.workers,
            worker_init_fn=init_loader_worker,
        )
        return iter(data)

    def batches(self, indices: Sequence[int]) -> list[list[int]]:
        """The indices in batches, each of one bucket."""
        by_bucket: dict[int, list[int]] = {}
        for i in indices:
            by_bucket.setdefault(
                self.dataset.bucket_of[i] if self.dataset.groups else 0, []
            ).append(i)
        return [
            group[k : k + self.batch_size]
            for _, group in sorted(by_bucket.items())
            for k in range(0, len(group), self.batch_size)
        ]


@dataclass(frozen=True)
class Once(Dataset):
    """The item at an index, without replacement."""

    samples: Samples

    def __getitem__(self, i: int) -> Found:
        return self.samples.find(i, most=1)


def latents(
    path: str,
    *,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    max_bad_share: float = 0.1,
    seeded: bool = False,
    buckets: Sequence[Sequence[int]] | None = None,
    embed_once: bool = False,
    cache_dir: str | None = None,
    cache_gb: float = USUAL_GB,
) -> Source:
    """Cached latents with captions, embedded or not: a folder or pattern of WebDataset shards."""
    options = {
        "cache_dir": cache_dir,
        "cache_gb": cache_gb,
        "limit": limit,
        "max_bad_share": max_bad_share,
        "buckets": buckets,
    }
    data = LatentShards(path, seeded=seeded, embed_once=embed_once, **options)
    return Source(data, batch_size, num_workers)


def prompts(
    path: str,
    *,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    column: str | None = None,
) -> Source:
    """Captions alone: a text file with one per line, or a column of a table."""
    return Source(Prompts(path, limit=limit, column=column), batch_size, num_workers)


def images(
    path: str,
    *,
    size: int,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    max_bad_share: float = 0.1,
    buckets: Sequence[Sequence[int]] | None = None,
    caption_key: str = "caption",
    max_empty_share: float = MAX_EMPTY,
    repeats: bool = True,
    masks: bool | Mapping[str, float] = False,
    cache_dir: str | None = None,
    cache_gb: float = USUAL_GB,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Source:
    """Images with captions: WebDataset shards, Parquet tables, or a folder in one of the layouts of
    `folder`. With `masks`, for an inpainting teacher, a mask is drawn for each: true, or odds of
    `Masks`.
    """
    options = {
        "image_column": image_column,
        "caption_column": caption_column,
        "cache_dir": cache_dir,
        "cache_gb": cache_gb,
        "max_empty_share": max_empty_share,
        "repeats": repeats,
        "limit": limit,
        "max_bad_share": max_bad_share,
        "buckets": buckets,
        "caption_key": caption_key,
    }
    return Source(ImageShards(path, size=size, **options), batch_size, num_workers, masks_of(masks))


def pairs(
    path: str,
    *,
    size: int,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    max_bad_share: float = 0.1,
    buckets: Sequence[Sequence[int]] | None = None,
    caption_key: str = "caption",
    max_empty_share: float = MAX_EMPTY,
    cache_dir: str | None = None,
    cache_gb: float = USUAL_GB,
) -> Source:
    """Edit pairs with instructions: WebDataset shards of a source and a target picture each."""
    options = {
        "cache_dir": cache_dir,
        "cache_gb": cache_gb,
        "max_empty_share": max_empty_share,
        "limit": limit,
        "max_bad_share": max_bad_share,
        "buckets": buckets,
        "caption_key": caption_key,
    }
    return Source(EditPairs(path, size=size, **options), batch_size, num_workers)


def drawn(
    reader: Reader,
    *,
    size: int | None = None,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    seeded: bool = False,
    pairs: bool = False,
    masks: bool | Mapping[str, float] = False,
) -> Source:
    """Pictures with captions that `reader` renders, by default at the teacher's size."""
    data = Drawn(reader, size=size, seeded=seeded, pairs=pairs, limit=limit)
    return Source(data, batch_size, num_workers, masks_of(masks))


def preferences(
    path: str,
    *,
    batch_size: int,
    size: int | None = None,
    num_workers: int = 0,
    limit: int | None = None,
    max_bad_share: float = 0.1,
    buckets: Sequence[Sequence[int]] | None = None,
    caption_key: str = "caption",
    cache_dir: str | None = None,
    cache_gb: float = USUAL_GB,
) -> Source:
    """Pairs of a winner and a loser with one caption, pictures or latents: WebDataset shards."""
    options = {
        "cache_dir": cache_dir,
        "cache_gb": cache_gb,
        "limit": limit,
        "max_bad_share": max_bad_share,
        "buckets": buckets,
    }
    data = Pairs(path, size=size, caption_key=caption_key, **options)
    return Source(data, batch_size, num_workers)
