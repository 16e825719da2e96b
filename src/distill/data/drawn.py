"""Pictures that are drawn as they are asked for, instead of read."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.data.datasets import Samples, Size


class Reader(Protocol):
    """What raw samples come from: pictures with captions, by number."""

    def __len__(self) -> int: ...

    def digest(self) -> str:
        """Of all that decides what is read."""

    def read(self, i: int, at_most: int = -1) -> dict[str, Any]:
        """Sample i: `txt`, its caption in UTF-8; `array`, its picture, uint8 [H, W, 3]; `__key__`,
        its name, a number where `seeded` is asked for; `__url__`, where it is from.
        """


class Drawn(Samples):
    """Pictures `pixels` in [-1, 1], [3, H, W], that a reader draws, enlarged to `size` or to what a
    teacher wants.

    With `seeded` each comes with `noise` of its own, in the shape of its latents, once `fit` has
    told that: methods of pairs run on it, though no teacher made the one of the other.
    """

    def __init__(
        self, reader: Reader, *, size: int | None = None, seeded: bool = False, **options: Any
    ):
        self.reader, self.size, self.seeded = reader, size, seeded
        self.sides: Size | None = (size, size) if size else None  # height, width
        self.noise_shape: tuple[int, ...] | None = None
        super().__init__("", **options)

    def open(self, path: str) -> Any:
        return self.reader

    def fit(self, teacher: Any) -> None:
        """Take the size of this teacher's pictures, unless there is one; ValueError for one that it
        cannot read.
        """
        self.noise_shape = teacher.shape_of(self.size, "data.size")
        self.sides = teacher.sides_of(self.noise_shape)

    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        pixels = torch.from_numpy(sample["array"]).permute(2, 0, 1).float() / 127.5 - 1
        if self.sides is not None:
            pixels = F.interpolate(pixels[None], self.sides, mode="nearest")[0]
        if not self.seeded or self.noise_shape is None:
            return {"pixels": pixels}
        generator = torch.Generator().manual_seed(int(sample["__key__"]))
        return {"pixels": pixels, "noise": torch.randn(self.noise_shape, generator=generator)}
