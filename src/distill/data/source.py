"""What a run reads: a data set with the batch it is read in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distill.data.datasets import ImageShards, LatentShards, Samples, loader


@dataclass(frozen=True)
class Source:
    """`batch_size` samples per process and micro-batch, read ahead by `num_workers` processes."""

    dataset: Samples
    batch_size: int
    num_workers: int = 0

    def loader(self, *, seed: int, rank: int = 0, world: int = 1, start: int = 0) -> Iterable[dict]:
        """The endless stream of batches from batch number `start` on."""
        return loader(
            self.dataset,
            batch_size=self.batch_size,
            seed=seed,
            rank=rank,
            world=world,
            start_step=start,
            num_workers=self.num_workers,
        )


def latents(
    path: str, *, batch_size: int, num_workers: int = 0, limit: int | None = None, max_bad_share: float = 0.1
) -> Source:
    """Cached latents with captions: a folder or pattern of WebDataset shards."""
    return Source(LatentShards(path, limit=limit, max_bad_share=max_bad_share), batch_size, num_workers)


def images(
    path: str, *, size: int, batch_size: int, num_workers: int = 0, limit: int | None = None, max_bad_share: float = 0.1
) -> Source:
    """Pictures with captions: WebDataset shards, or a folder with a .txt beside each picture."""
    return Source(ImageShards(path, size=size, limit=limit, max_bad_share=max_bad_share), batch_size, num_workers)
