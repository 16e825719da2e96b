"""Masks of inpainting, drawn as the data are read.

A mask is a function of the run's seed and of the sample's place in the endless order alone: a
resumed run has the same ones, and so have several processes and one.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from distill.core.odds import MASKS, check_masks

# Ours, like the odds: LADD's paper does not describe its masks. Shares of a side of the picture.
BOXES = (1, 3)  # how many
BOX_SIDE = (0.2, 0.6)
STROKE_POINTS = (4, 9)
STROKE_WIDTH = (0.06, 0.16)
HALF = (0.3, 0.7)  # share of the picture that is filled
KEPT_SIDE = (0.4, 0.8)  # of the part that outpainting keeps


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Draws masks of these kinds, with odds in proportion to the numbers.

    boxes: one to three rectangles. strokes: a thick line, as of a brush. half: a part from one edge
    on. outpainting: all but a rectangle. Raises ValueError for odds below 0, or all 0.
    """

    boxes: float = 0.35
    strokes: float = 0.35
    half: float = 0.15
    outpainting: float = 0.15

    def __post_init__(self) -> None:
        check_masks(self._odds())

    def _odds(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __call__(self, seed: int, positions: Sequence[int], size: Sequence[int]) -> Tensor:
        """Masks [B, 1, H, W] of the samples at these positions of the order, 1 where the picture is
        to be filled, for pictures of this size, (H, W).
        """
        drawn = [self._draw(random.Random(f"masks/{seed}/{place}"), *size) for place in positions]
        return torch.stack(drawn)[:, None]

    def _draw(self, rng: random.Random, height: int, width: int) -> Tensor:
        odds = self._odds()
        (kind,) = rng.choices(list(odds), list(odds.values()))
        picture = Image.new("L", (width, height), 255 if kind == "outpainting" else 0)
        draw, size = ImageDraw.Draw(picture), (width, height)
        if kind == "boxes":
            for _ in range(rng.randint(*BOXES)):
                draw.rectangle(_box(rng, size, BOX_SIDE), fill=255)
        elif kind == "strokes":
            _stroke(rng, draw, size)
        elif kind == "half":
            draw.rectangle(_half(rng, size), fill=255)
        else:
            draw.rectangle(_box(rng, size, KEPT_SIDE), fill=0)
        return torch.from_numpy(np.asarray(picture) > 0).float()


def masks_of(value: bool | Mapping[str, float]) -> Masks | None:
    """The masks of a setting: false for none, true for the default odds, or odds of some kinds, the
    others 0. Raises ValueError for an unknown kind.
    """
    if not isinstance(value, Mapping):
        return Masks() if value else None
    check_masks(value)
    return Masks(**{**dict.fromkeys(MASKS, 0.0), **value})


def _box(
    rng: random.Random, size: tuple[int, int], share: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, all inside, of a box with sides of these shares."""
    sides = [max(1, round(side * rng.uniform(*share))) for side in size]
    left, top = (rng.randint(0, side - length) for side, length in zip(size, sides, strict=True))
    return left, top, left + sides[0] - 1, top + sides[1] - 1


def _half(rng: random.Random, size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    share, edge = rng.uniform(*HALF), rng.choice(["left", "right", "top", "bottom"])
    across = max(1, round(share * (width if edge in ("left", "right") else height)))
    return {
        "left": (0, 0, across - 1, height - 1),
        "right": (width - across, 0, width - 1, height - 1),
        "top": (0, 0, width - 1, across - 1),
        "bottom": (0, height - across, width - 1, height - 1),
    }[edge]


def _stroke(rng: random.Random, draw: ImageDraw.ImageDraw, size: tuple[int, int]) -> None:
    width = max(1, round(min(size) * rng.uniform(*STROKE_WIDTH)))
    count = rng.randint(*STROKE_POINTS)
    points = [tuple(rng.uniform(0, side - 1) for side in size) for _ in range(count)]
    draw.line(points, fill=255, width=width, joint="curve")
    for x, y in points:  # round ends
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
