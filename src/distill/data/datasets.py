"""Datasets over shards and folders, and the one loader: endless, in the order of `stream`, past samples that are bad.

A sample that does not decode is replaced by the next index, so that the order stays a function of (seed, step, rank);
it is counted and its name and reason are kept. If too many are bad, the run stops and says so.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from distill.data import decode
from distill.data.shards import Folder, Shards, expand
from distill.data.stream import StreamSampler

log = logging.getLogger(__name__)
MIN_TRIED = 20  # before that, one bad sample would be a large share
MAX_IN_A_ROW = 50  # samples tried for one place in a batch
Skipped = tuple[str, str]  # name of a bad sample, reason
SKIPPED = "skipped"  # key under which a worker's bad samples travel to the main process; `Loader` takes it out


class Samples(Dataset, ABC):
    """Items of a source (`Shards`, `Folder`), decoded; `bad` maps the names of those that failed to the reasons.

    In a loader's worker, failures are passed on within the item, and `Loader` calls `account` in the main process.
    """

    def __init__(self, source: Shards | Folder, *, limit: int | None = None, max_bad_share: float = 0.1):
        if limit is not None and limit < 1:
            raise ValueError(f"The limit on the number of samples must be at least 1, got {limit}.")
        self.source, self.max_bad_share = source, max_bad_share
        self.length = len(source) if limit is None else min(limit, len(source))
        self.bad: dict[str, str] = {}
        self.tried = self.failed = 0  # draws, hence a bad sample counts again whenever it is met

    def __len__(self) -> int:
        return self.length

    @abstractmethod
    def item(self, sample: dict) -> dict:
        """The item of a raw sample; raises BadSample."""

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.length:
            raise IndexError(f"The index must lie in [0, {self.length}), got {i}.")
        found, skipped = self._first_good(i)
        item = found or {}
        if get_worker_info() is None:
            self.account(skipped, found=int(found is not None))
            return item
        return item | ({SKIPPED: skipped} if skipped else {})

    def _first_good(self, i: int) -> tuple[dict | None, list[Skipped]]:
        """The first item at or after i (cyclic) that decodes, or None after `MAX_IN_A_ROW`; and those passed over."""
        skipped: list[Skipped] = []
        for ahead in range(min(MAX_IN_A_ROW, self.length)):
            try:
                return self.item(self.source.read((i + ahead) % self.length)), skipped
            except decode.BadSample as error:
                skipped.append((error.name, error.reason))
        return None, skipped

    def account(self, skipped: list[Skipped], *, found: int) -> None:
        """Count `found` good samples and the `skipped` ones; ValueError if the bad are too many, or `found` is 0."""
        for name, reason in skipped:
            if name not in self.bad:
                log.warning("skipped a bad sample, %s: %s", name, reason)
            self.bad[name] = reason
        self.tried += found + len(skipped)
        self.failed += len(skipped)
        count = f"{self.failed} of {self.tried} samples tried are bad"
        if not found:
            raise ValueError(f"{count}, the last {len(skipped)} in a row: repair the data. {_some(skipped)}")
        if self.tried >= MIN_TRIED and self.failed > self.max_bad_share * self.tried:
            share = f"more than data.max_bad_share={self.max_bad_share:g}"
            raise ValueError(f"{count}, {share}: repair the data or raise the share. {_some(list(self.bad.items()))}")


def _some(skipped: list[Skipped]) -> str:
    return "The first: " + "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])


class LatentShards(Samples):
    """Cached latents: {"x0": float32 [C, h, w], "caption": str, "key": str}, all of the first good one's `shape`.

    Raises ValueError if there is no good one among the first `MAX_IN_A_ROW`.
    """

    def __init__(self, path: str, *, limit: int | None = None, max_bad_share: float = 0.1):
        super().__init__(Shards(path), limit=limit, max_bad_share=max_bad_share)
        self.shape: tuple[int, int, int] | None = None
        first, skipped = self._first_good(0)
        if first is None:
            raise ValueError(f"None of the first {len(skipped)} samples at {path!r} is usable: {_some(skipped)}")
        self.shape = tuple(first["x0"].shape)

    def item(self, sample: dict) -> dict:
        x0 = decode.latent(sample)
        if self.shape is not None and tuple(x0.shape) != self.shape:
            reason = f"its latents are {list(x0.shape)}, the first sample's {list(self.shape)}"
            raise decode.BadSample(decode.name_of(sample), reason)
        return {"x0": x0, "caption": decode.caption(sample), "key": sample["__key__"]}


class ImageShards(Samples):
    """Images: {"pixels": [3, size, size] in [-1, 1], "caption": str, "key": str}, from shards or a folder of images."""

    def __init__(self, path: str, *, size: int, limit: int | None = None, max_bad_share: float = 0.1):
        if size < 1:
            raise ValueError(f"The image size must be at least 1 pixel, got {size}.")
        super().__init__(_images(path), limit=limit, max_bad_share=max_bad_share)
        self.size = size

    def item(self, sample: dict) -> dict:
        return {
            "pixels": decode.image(sample, self.size),
            "caption": decode.caption(sample),
            "key": sample["__key__"],
        }


def _images(path: str) -> Shards | Folder:
    if os.path.isdir(os.path.expanduser(path)):
        try:
            expand(path)
        except FileNotFoundError:  # a folder without shards: one of images?
            return Folder(path)
    return Shards(path)


def collate(items: list[dict]) -> dict:
    """Batch of items: tensors stacked to [B, ...], everything else as lists; what workers skipped in one list."""
    skipped = [pair for item in items for pair in item.get(SKIPPED, ())]
    items = [{key: value for key, value in item.items() if key != SKIPPED} for item in items]
    if not all(items):  # a worker gave up on a place: no batch, only what went wrong
        return {SKIPPED: skipped}
    columns = {key: [item[key] for item in items] for key in items[0]}
    batch = {key: torch.stack(x) if isinstance(x[0], torch.Tensor) else x for key, x in columns.items()}
    return batch | ({SKIPPED: skipped} if skipped else {})


class Loader(DataLoader):
    """A DataLoader that tells its dataset in the main process which samples the workers had to skip."""

    dataset: Samples

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]  # a plain iterator is all anyone uses
        for batch in super().__iter__():
            if self.num_workers > 0:
                self.dataset.account(batch.pop(SKIPPED, []), found=len(batch.get("key", ())))
            yield batch


def loader(
    dataset: Samples,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
    stop_step: int | None = None,
    num_workers: int = 0,
) -> Loader:
    """The endless loader (up to `stop_step`, if given). `loader.batch_sampler.set_start(step)` moves it."""
    sampler = StreamSampler(
        len(dataset),
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world=world,
        start_step=start_step,
        stop_step=stop_step,
    )
    return Loader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # A DataLoader draws its workers' seed from the global generator, which would disturb exact resume.
        generator=torch.Generator().manual_seed(seed),
    )
