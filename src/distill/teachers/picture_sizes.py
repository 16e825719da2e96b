"""The sizes of a teacher: of its pictures in pixels, and of their latents."""

import math
from collections.abc import Sequence
from typing import Any

from distill.teachers.network import Network


class PictureSizes:
    """Part of a teacher. Pictures have sides in multiples of `unit` pixels, which are `patch`
    latents. Latents of videos have a number of frames T before their sides: (C, T, H, W).
    """

    network: Network
    latent_shape: tuple[int, ...]
    patch: int
    unit: int

    def sides(self) -> dict[str, int]:
        """Default `height` and `width` of a picture, in pixels."""
        height, width = self.sides_of(self.latent_shape)
        return {"height": height, "width": width}

    def _shape(self) -> tuple[int, ...]:
        """(C, H, W) of the latents at the size of its training."""
        config = self.network.model.config
        channels = config.in_channels - self.network.image_channels
        return channels, config.sample_size, config.sample_size

    def shape_of(self, size: Any, key: str = "size") -> tuple[int, ...]:
        """(C, H, W) of latents of `size`, pixels a side or [width, height]; None: the size of its
        training.

        Raises ValueError, with the setting's `key`, for sides that it cannot generate.
        """
        if size is None:
            return self.latent_shape
        sides = list(size) if isinstance(size, Sequence) else [size, size]
        most = self.unit * (self.network.positions or math.inf)
        fit = [isinstance(x, int) and 0 < x <= most and x % self.unit == 0 for x in sides]
        if fit != [True, True]:
            what = f"a side, or [width,height], in multiples of {self.unit}"
            raise ValueError(
                f"{key}={size}: must be {what}{f' up to {most}' if most < math.inf else ''}"
            )
        width, height = (side * self.patch // self.unit for side in sides)
        return *self.latent_shape[:-2], height, width

    def sides_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels of a picture with latents of this shape, [..., H, W]."""
        height, width = (side * self.unit // self.patch for side in shape[-2:])
        return height, width
