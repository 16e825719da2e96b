"""What a run reads: a data set, and the one order in which its batches come.

The order is endless and a pure function of (seed, step, rank). Sample positions count through all steps: position
p = step * global_batch + i lies in epoch p // N, and every epoch is a permutation of its own, seeded by (seed, epoch).
To resume, nothing is needed but the step; nothing depends on the number of workers; and W processes with batch B read
together what one process with batch W * B reads.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from distill.data.datasets import ImageShards, LatentShards, Prompts, Samples, collate


@dataclass(frozen=True)
class Order:
    """For each step from `start` on, the `batch_size` indices below `length` that are this rank's part of the batch.

    It shares out the data among `world` ranks itself: no DistributedSampler may be put on top. Raises ValueError for
    numbers out of their ranges: `length` and `batch_size` from 1, `start` from 0, `rank` in [0, world).
    """

    length: int
    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if min(self.length, self.batch_size) < 1 or self.start < 0 or not 0 <= self.rank < self.world:
            raise ValueError(f"{self}: length and batch_size must be 1 or more, start 0 or more, rank in [0, world)")

    def __iter__(self) -> Iterator[list[int]]:
        epoch, permuted = -1, torch.empty(0)
        for step in itertools.count(self.start):
            batch = []
            first = (step * self.world + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    permuted = permutation(self.length, self.seed, epoch)
                batch.append(int(permuted[position % self.length]))
            yield batch


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, int64 [length]; hashed, so that epochs of neighbouring seeds have nothing in common."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.randperm(length, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))


class Loader(DataLoader):
    """Endless batches; its workers hand over what they had to skip, which the data set counts in the main process."""

    dataset: Samples

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]  # a plain iterator is all anyone uses
        for batch, good, skipped in super().__iter__():
            self.dataset.account(good, skipped)
            yield batch


@dataclass(frozen=True)
class Source:
    """`batch_size` samples per process and micro-batch, read ahead by `num_workers` processes."""

    dataset: Samples
    batch_size: int
    num_workers: int = 0

    def loader(self, *, seed: int, rank: int = 0, world: int = 1, start: int = 0) -> Loader:
        """The endless stream of batches from batch number `start` on; tensors [B, ...], everything else in lists."""
        return Loader(
            self.dataset,
            batch_sampler=Order(len(self.dataset), seed, self.batch_size, rank, world, start),
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # A DataLoader draws its workers' seed from the global generator, which would disturb exact resume.
            generator=torch.Generator().manual_seed(seed),
        )


def latents(
    path: str,
    *,
    batch_size: int,
    num_workers: int = 0,
    limit: int | None = None,
    max_bad_share: float = 0.1,
    seeded: bool = False,
) -> Source:
    """Cached latents with captions: a folder or pattern of WebDataset shards."""
    data = LatentShards(path, limit=limit, max_bad_share=max_bad_share, seeded=seeded)
    return Source(data, batch_size, num_workers)


def prompts(path: str, *, batch_size: int, num_workers: int = 0, limit: int | None = None) -> Source:
    """Captions alone: a text file with one a line."""
    return Source(Prompts(path, limit=limit), batch_size, num_workers)


def images(
    path: str, *, size: int, batch_size: int, num_workers: int = 0, limit: int | None = None, max_bad_share: float = 0.1
) -> Source:
    """Pictures with captions: WebDataset shards, or a folder with a .txt beside each picture."""
    return Source(ImageShards(path, size=size, limit=limit, max_bad_share=max_bad_share), batch_size, num_workers)
