"""Pictures of any size for the reader, which reads 64x64: background is cut away or added.

Objects keep their pixels, so they stay as the reader was trained on them. `experiments/judge_sizes`
holds how well renders of several sizes are read so. Stretching or shrinking the picture instead
makes the reader wrong: an object of two thirds of its size is read right in one render of three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.worlds.shapes.world import SIDE

LEAST = 40  # pixels a side that the largest object needs, with a pixel on either side
# Ours: a column of background differs nowhere by more than this from the frame's colour, in
# [-1, 1]; colours of objects differ by 0.4 and more.
BACKGROUND = 0.3


def sides(size: int | Sequence[int] | None) -> tuple[int, int]:
    """[Width, height] of a size, pixels a side or [width, height]; None: 64x64."""
    if size is None or isinstance(size, int):
        return (size or SIDE, size or SIDE)
    width, height = size
    return width, height


def framed(pixels: Tensor) -> Tensor:
    """Pixels [N, 3, H, W] in [-1, 1] -> [N, 3, 64, 64]; 64x64 stay as they are.

    Of larger sides the columns or rows of background farthest from any object are cut away. Smaller
    ones get a margin in the background's colour, the median of the outermost pixels.
    """
    if pixels.shape[-2:] == (SIDE, SIDE):
        return pixels
    return torch.stack([_framed(picture) for picture in pixels])


def _framed(picture: Tensor) -> Tensor:
    ends = (picture[:, :, 0], picture[:, :, -1], picture[:, 0], picture[:, -1])
    background = torch.cat(ends, dim=1).median(dim=1).values[:, None, None]
    # less background, so that margins are 0; averaged against noise
    shown = picture - background
    activity = F.avg_pool2d(shown.abs(), 3, stride=1, padding=1, count_include_pad=False)
    kept = [_kept(activity.amax(dim=(0, axis))) for axis in (1, 2)]
    shown = shown[:, :, kept[0]][:, kept[1]]
    height, width = (SIDE - side for side in shown.shape[-2:])
    margins = (width // 2, width - width // 2, height // 2, height - height // 2)
    return F.pad(shown, margins) + background


def _kept(activity: Tensor) -> Tensor:
    """The places, at most 64 in their order, of the least sure background in activity [L]."""
    places, busy = torch.arange(len(activity)), activity > BACKGROUND
    distance = torch.zeros(len(activity))
    if busy.any():
        distance = (places[:, None] - places[busy]).abs().amin(dim=1).float()
    # the empty ones by their distance, then the others: the faintest first
    order = torch.where(busy, activity, -distance).argsort(stable=True)
    return order[max(0, len(activity) - SIDE) :].sort().values
