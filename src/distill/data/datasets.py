"""Latents and images by index, past samples that are bad.

A sample that does not decode is replaced by the next index, so that the order stays a function of (seed, step, rank);
it is counted and its name and reason are kept. If too many are bad, the run stops and says so.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.data import decode
from distill.data.shards import Shards

log = logging.getLogger(__name__)
MIN_TRIED = 20  # before that, one bad sample would be a large share
MAX_IN_A_ROW = 50  # samples tried for one place in a batch
Skipped = list[tuple[str, str]]  # names of bad samples, and the reasons
Found = tuple[dict | None, Skipped]  # the item for a place in a batch, or None; what was passed over on the way


class Samples(Dataset, ABC):
    """Items {"caption": str, "key": str} and what `tensors` adds, of shards, a folder of images or a list of prompts.

    `bad` maps the names of the samples that could not be used to the reasons. Raises ValueError if `limit`, the number
    of samples to use, is under 1, and whatever `Shards` raises.
    """

    def __init__(self, path: str, *, limit: int | None = None, max_bad_share: float = 0.1):
        if limit is not None and limit < 1:
            raise ValueError(f"data.limit={limit}: must be at least 1")
        self.shards, self.max_bad_share = self.open(path), max_bad_share
        self.length = min(limit or len(self.shards), len(self.shards))
        self.bad: dict[str, str] = {}
        self.tried = self.failed = 0  # draws, hence a bad sample counts again whenever it is met

    def open(self, path: str) -> Shards | Lines:
        """What reads raw samples by index."""
        return Shards(path)

    @abstractmethod
    def tensors(self, sample: dict) -> dict[str, Tensor]:
        """What a raw sample holds besides its caption; raises BadSample."""

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.length:
            raise IndexError(f"The index must lie in [0, {self.length}), got {i}.")
        item, skipped = self.find(i)
        self.account(int(item is not None), skipped)
        return item

    def __getitems__(self, indices: list[int]) -> list[Found]:
        """What a loader's worker asks for; its copy of the data set counts nothing."""
        return [self.find(i) for i in indices]

    def find(self, i: int) -> Found:
        """The first item at or after i (cyclic) that decodes, or None after `MAX_IN_A_ROW`; and those passed over."""
        skipped: Skipped = []
        for ahead in range(min(MAX_IN_A_ROW, self.length)):
            sample = self.shards.read((i + ahead) % self.length)
            try:
                item = {**self.tensors(sample), "caption": decode.caption(sample), "key": sample["__key__"]}
                return item, skipped
            except decode.BadSample as error:
                skipped.append((error.name, error.reason))
        return None, skipped

    def account(self, good: int, skipped: Skipped) -> None:
        """Count samples; ValueError if the bad are too many, or there is nothing `good`."""
        for name, reason in skipped:
            if name not in self.bad:
                log.warning("skipped a bad sample, %s: %s", name, reason)
            self.bad[name] = reason
        self.tried += good + len(skipped)
        self.failed += len(skipped)
        if good and (self.tried < MIN_TRIED or self.failed <= self.max_bad_share * self.tried):
            return
        what = f"more than data.max_bad_share={self.max_bad_share:g}: repair the data or raise the share"
        what = what if good else f"the last {len(skipped)} in a row: repair the data"
        some = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[:3])
        raise ValueError(f"{self.failed} of {self.tried} samples tried are bad, {what}. The first: {some}")


class LatentShards(Samples):
    """Cached latents `x0`, float32 [C, h, w], all of the first good one's `shape`; ValueError if there is none.

    With `seeded` each comes with the `noise` [C, h, w] that it was made from: its key is the seed.
    """

    shape = None

    def __init__(self, path: str, *, limit: int | None = None, max_bad_share: float = 0.1, seeded: bool = False):
        super().__init__(path, limit=limit, max_bad_share=max_bad_share)
        self.seeded = seeded
        first, skipped = self.find(0)
        if first is None:
            raise ValueError(f"data.path={path}: none of its first {len(skipped)} samples is usable {skipped[0]}")
        self.shape = tuple(first["x0"].shape)

    def tensors(self, sample: dict) -> dict[str, Tensor]:
        x0 = decode.latent(sample)
        if self.shape and tuple(x0.shape) != self.shape:
            raise decode.BadSample(sample, f"its latents are {list(x0.shape)}, the first sample's {list(self.shape)}")
        if not self.seeded:
            return {"x0": x0}
        try:
            seed = int(sample["__key__"].rpartition("/")[2])
        except ValueError:
            raise decode.BadSample(sample, "its key is no seed, as data.seeded=true has it") from None
        return {"x0": x0, "noise": torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))}


class ImageShards(Samples):
    """Images `pixels`, [3, size, size] in [-1, 1]; ValueError if `size` is under 1."""

    def __init__(self, path: str, *, size: int, limit: int | None = None, max_bad_share: float = 0.1):
        if size < 1:
            raise ValueError(f"data.size={size}: must be at least 1 pixel")
        super().__init__(path, limit=limit, max_bad_share=max_bad_share)
        self.size = size

    def tensors(self, sample: dict) -> dict[str, Tensor]:
        return {"pixels": decode.image(sample, self.size)}


class Lines:
    """The lines of a text file that are not blank, as raw samples. Raises ValueError if there are none."""

    def __init__(self, path: str):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"data.path={path}: cannot be read as lines of UTF-8 text ({error})") from None
        self.path, self.lines = path, [line for line in lines if line.strip()]
        if not self.lines:
            raise ValueError(f"data.path={path}: has no line that is not blank")

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, i: int) -> dict:
        return {"__url__": self.path, "__key__": str(i), "txt": self.lines[i].encode()}


class Prompts(Samples):
    """Captions alone, a line each of a text file; the teacher makes the samples."""

    def open(self, path: str) -> Lines:
        return Lines(path)

    def tensors(self, sample: dict) -> dict[str, Tensor]:
        return {}


def collate(found: list[Found]) -> tuple[dict, int, Skipped]:
    """What was found for each place -> batch (tensors [B, ...], the rest in lists), its size (0 if one is empty)."""
    items, skipped = [item for item, _ in found], [pair for _, pairs in found for pair in pairs]
    if None in items:
        return {}, 0, skipped
    columns = {key: [item[key] for item in items] for key in items[0]}
    batch = {key: torch.stack(x) if isinstance(x[0], Tensor) else x for key, x in columns.items()}
    return batch, len(items), skipped
