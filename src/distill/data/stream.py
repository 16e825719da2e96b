"""The order of the data: infinite, and a pure function of (seed, step, rank).

Sample positions count through all steps: position p = step * global_batch + i lies in epoch p // N, and every epoch is
a permutation of its own, seeded by (seed, epoch). To resume, nothing is needed but the step; nothing depends on the
number of workers; and W processes with batch B read together what one process with batch W * B reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class Order:
    """Position -> sample index. Keeps the permutation of the epoch it was last asked about."""

    def __init__(self, length: int, seed: int):
        if length < 1:
            raise ValueError(f"A stream needs at least one sample, got {length}.")
        self.length, self.seed = length, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, permutation(self.length, self.seed, epoch)
        return int(self._permutation[place])


def permutation(length: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch, int64 [length]; hashed, so that epochs of neighbouring seeds have nothing in common."""
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
    return torch.randperm(length, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))


class StreamSampler(Sampler[list[int]]):
    """Batch sampler: for each step from `start_step`, the `batch_size` indices that are this rank's part of the batch.

    Endless unless `stop_step` is given (exclusive); then it has a length. It shares out the data among ranks itself:
    no DistributedSampler may be put on top (Lightning: `use_distributed_sampler=False`).
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {batch_size}.")
        if not 0 <= rank < world:
            raise ValueError(f"The rank must lie in [0, {world}), the number of processes, got {rank}.")
        self.order = Order(length, seed)
        self.batch_size, self.rank, self.world, self.stop_step = batch_size, rank, world, stop_step
        self.set_start(start_step)

    def set_start(self, step: int) -> None:
        """Begin at `step` from the next `iter()` on: how a resumed run finds its place."""
        if step < 0:
            raise ValueError(f"The first step must not be negative, got {step}.")
        self.start_step = step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            first = (step * self.world + self.rank) * self.batch_size
            yield [self.order(position) for position in range(first, first + self.batch_size)]
            step += 1

    def __len__(self) -> int:
        if self.stop_step is None:
            raise TypeError("The stream is endless: stop it by steps (trainer.max_steps).")
        return max(0, self.stop_step - self.start_step)
