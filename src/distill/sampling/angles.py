"""TrigFlow's angles, in which the scheduler of Sana-Sprint's pipeline steps, as times of a flow.

x = cos(a) x0 + sin(a) eps is, scaled by 1 / (cos(a) + sin(a)), the flow's x_t at
t = sin(a) / (cos(a) + sin(a)),    a = atan2(t, 1 - t)
"""

import math
from collections.abc import Sequence
from typing import Any

SECOND = 1.3  # the second angle of two steps, by default in the pipeline


def has_angles(network: Any) -> bool:
    """Whether the pipeline of this network, teacher or student steps in angles."""
    return getattr(getattr(network, "network", network), "angles", False)


def pipeline_levels(steps: int) -> list[float]:
    """The times of n steps in the pipeline: pi/2 and 1.3 for two, else in equal steps of the
    angle.
    """
    angles = [math.pi / 2 * (1 - i / steps) for i in range(steps)]
    if steps == 2:
        angles[1] = SECOND
    return [math.sin(a) / (math.cos(a) + math.sin(a)) for a in angles]


def angles_of(levels: Sequence[float]) -> list[float]:
    """The angles of these times."""
    return [math.atan2(t, 1 - t) for t in levels]


def check_no_angles(network: Any, sampler: str) -> None:
    """Raise ValueError for a network whose pipeline has no such sampler."""
    if has_angles(network):
        what = "Sana-Sprint's pipeline predicts x0 and adds fresh noise, and has no other sampler"
        raise ValueError(f"sampler={sampler}: {what}; use sampler=consistency")
