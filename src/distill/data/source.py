"""What a run reads: a data set, and the one order in which its batches come.

The order is endless and a pure function of (seed, step, rank). Sample positions count through all
steps: position p = step * global_batch + i lies in epoch p // N, and every epoch is a permutation
of its own, seeded by (seed, epoch). To resume, nothing is needed but the step; nothing depends on
the number of workers; and W processes with batch B read together what one process with batch W * B
reads.

With buckets all of this holds, and the global batch of a step is of one bucket: each bucket is such
an order of its own, of which round e takes floor((e + 1) n / G) - floor(e n / G) global batches, n
being its samples and G the global batch; the batches of a round come in an order seeded by (seed,
round). So the share of a bucket is that of its samples.
"""

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distill.data.datasets import (
    Found,
    ImageShards,
    LatentShards,
    Prompts,
    Samples,
    collate,
)
from distill.data.drawn import Drawn, Reader
from distill.data.shards import MAX_EMPTY
from distill.machine.hardware import cores
from distill.machine.memory import to_shared_memory
from distill.machine.signals import init_loader_worker


@dataclass(frozen=True)
class Order:
    """For each step from `start` on, the `batch_size` indices below `length` that are this rank's
    part of the batch.

    It shares out the data among `world` ranks itself: no DistributedSampler may be put on top.
    Raises ValueError for numbers out of their ranges: `length` and `batch_size` from 1, `start`
    from 0, `rank` in [0, world).
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

    A step is of one bucket, the same on all ranks.
    """

    groups: Mapping[int, Sequence[int]]
    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1
    start: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        whole = self.batch_size * self.world
        sizes = {bucket: len(group) for bucket, group in self.groups.items()}
        shuffled = {bucket: Shuffled(n, f"{self.seed}/{bucket}") for bucket, n in sizes.items()}

        def before(epoch: int) -> int:
            return sum(epoch * n // whole for n in sizes.values())

        last = (self.start + len(sizes) + 1) * whole // sum(sizes.values()) + 2
        for epoch in itertools.count(bisect.bisect_right(range(last), self.start, key=before) - 1):
            rounds = {
                bucket: range(epoch * n // whole, (epoch + 1) * n // whole)
                for bucket, n in sizes.items()
            }
            numbers, kinds = (
                {k: iter(r) for k, r in rounds.items()},
                [k for k, r in rounds.items() for _ in r],
            )
            shuffle = permutation(len(kinds), f"{self.seed}/round", epoch).tolist()
            for step, bucket in enumerate((kinds[i] for i in shuffle), before(epoch)):
                first = (next(numbers[bucket]) * self.world + self.rank) * self.batch_size
                if step >= self.start:
                    places = range(first, first + self.batch_size)
                    yield [self.groups[bucket][shuffled[bucket][place]] for place in places]


class Shuffled:
    """An endless sequence of the indices below `length`, each of them once an epoch."""

    def __init__(self, length: int, seed: int | str):
        self.length, self.seed = length, seed
        self._epoch, self._permuted = -1, torch.empty(0)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._permuted = epoch, permutation(self.length, self.seed, epoch)
        return int(self._permuted[place])


def permutation(length: int, seed: int | str, epoch: int) -> Tensor:
    """The order of one epoch, int64 [length]; hashed, so that epochs of neighbouring seeds have
    nothing in common.
    """
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.randperm(
        length, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    )


class Loader(DataLoader):
    """Endless batches; its workers hand over what they had to skip, which the data set counts in
    the main process.
    """

    dataset: Samples

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]  # a plain iterator is all anyone uses
        for batch, good, skipped in super().__iter__():
            self.dataset.account(good, skipped)
            self.dataset.account_captions(batch["caption"])
            yield batch


@dataclass(frozen=True)
class Source:
    """`batch_size` samples per process and micro-batch, read ahead by `num_workers` processes."""

    dataset: Samples
    batch_size: int
    num_workers: int = 0

    def loader(self, *, seed: int, rank: int = 0, world: int = 1, start: int = 0) -> Loader:
        """The endless stream of batches from batch number `start` on; tensors [B, ...], everything
        else in lists.
        """
        place, groups = (seed, self.batch_size, rank, world, start), self.dataset.groups
        return Loader(
            self.dataset,
            batch_sampler=(
                BucketOrder(groups, *place) if groups else Order(len(self.dataset), *place)
            ),
            collate_fn=collate,
            num_workers=self.workers,
            worker_init_fn=init_loader_worker,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A DataLoader draws its workers' seed from the global generator, which would disturb
            # exact resume.
            generator=torch.Generator().manual_seed(seed),
        )

    @property
    def workers(self) -> int:
        """Processes that read: no more than there are cores, above which torch warns that they slow
        each other down.
        """
        return min(self.num_workers, cores())

    def once(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Found]]:
        """For each batch of indices what is found at each of them: a bad sample is not replaced,
        and not counted.
        """
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
    """What is found at an index, and nowhere else."""

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
) -> Source:
    """Cached latents with captions, embedded perhaps: a folder or pattern of WebDataset shards."""
    data = LatentShards(
        path, limit=limit, max_bad_share=max_bad_share, seeded=seeded, buckets=buckets
    )
    return Source(data, batch_size, num_workers)


def prompts(
    path: str, *, batch_size: int, num_workers: int = 0, limit: int | None = None
) -> Source:
    """Captions alone: a text file with one a line."""
    return Source(Prompts(path, limit=limit), batch_size, num_workers)


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
) -> Source:
    """Pictures with captions: WebDataset shards, or a folder in one of the layouts of `folder`."""
    how = {
        "max_empty_share": max_empty_share,
        "repeats": repeats,
        "limit": limit,
        "max_bad_share": max_bad_share,
        "buckets": buckets,
        "caption_key": caption_key,
    }
    return Source(ImageShards(path, size=size, **how), batch_size, num_workers)


def drawn(
    reader: Reader,
    *,
    size: int | None = None,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    seeded: bool = False,
) -> Source:
    """Pictures with captions that `reader` draws, as large as the teacher's own where no size is
    given.
    """
    data = Drawn(reader, size=size, seeded=seeded, limit=limit)
    return Source(data, batch_size, num_workers)
