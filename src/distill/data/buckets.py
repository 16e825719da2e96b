"""Buckets: samples of like shape, which a batch shares."""

import math
from collections.abc import Sequence

Size = tuple[int, int]  # width, height


def nearest(buckets: Sequence[Size], size: Size) -> int:
    """The bucket that crops least of a picture of this size; of equal shapes that of the nearest
    area.
    """

    def distance(k: int) -> tuple[float, float]:
        width, height = buckets[k]
        return abs(math.log(size[0] * height / (size[1] * width))), abs(
            math.log(size[0] * size[1] / (width * height))
        )

    return min(range(len(buckets)), key=distance)
