"""Pictures that are rendered on access, not read."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.datasets import Samples, Size


class Reader(Protocol):
    """Source of raw samples: pictures with captions, by number."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Hash of all that determines the samples."""

    def read(self, i: int, at_most: int = -1) -> dict[str, Any]:
        """Sample i: `txt`, its caption in UTF-8; `array`, its picture, uint8 [H, W, 3]; `source`,
        for an edit pair, the picture before; `__key__`, its name, a number where `seeded` is asked
        for; `__url__`, where it is from.
        """


class Drawn(Samples):
    """Pictures `pixels` in [-1, 1], [3, H, W], rendered by a reader and enlarged to `size` or the
    teacher's size.

    For a teacher of videos a picture is shown for all frames, [3, T, H, W].

    With `seeded` each has its own `noise` in the shape of its latents, once `fit` has set that.
    Methods on pairs can then run, though no teacher generated the picture from the noise. With
    `pairs` each has itself upside down as `loser_pixels`, so that methods of a preference can run.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        size: int | None = None,
        seeded: bool = False,
        pairs: bool = False,
        **options: Any,
    ):
        self.reader, self.size, self.seeded, self.pairs = reader, size, seeded, pairs
        self.sides: Size | None = (size, size) if size else None  # height, width
        self.noise_shape: tuple[int, ...] | None = None
        self.frames: int | None = None  # of a video
        super().__init__("", **options)

    def open(self, path: str) -> Any:
        return self.reader

    def fit(self, teacher: Any) -> None:
        """Use the size of this teacher's pictures, unless one is set; ValueError for an invalid
        size.
        """
        self.noise_shape = teacher.shape_of(self.size, "data.size")
        self.sides = teacher.sides_of(self.noise_shape)
        self.frames = teacher.frames if len(self.noise_shape) == 4 else None

    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        found = {"pixels": self._enlarged(sample["array"])}
        if self.pairs:
            found["loser_pixels"] = found["pixels"].flip(1)
        if "source" in sample:
            found["source"] = self._enlarged(sample["source"])
        if self.seeded and self.noise_shape is not None:
            generator = torch.Generator().manual_seed(int(sample["__key__"]))
            found["noise"] = torch.randn(self.noise_shape, generator=generator)
        return found

    def _enlarged(self, array: np.ndarray) -> Tensor:
        """A picture, uint8 [H, W, 3], as pixels [3, H', W'] of the size that is set."""
        pixels = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
        if self.sides is not None:
            pixels = F.interpolate(pixels[None], self.sides, mode="nearest")[0]
        if self.frames is None:
            return pixels
        return pixels[:, None].repeat(1, self.frames, 1, 1)
