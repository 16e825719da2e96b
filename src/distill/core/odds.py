"""Limits of what is drawn at random: noise levels, numbers of steps, kinds of masks.

The classes that draw call these, and so do commands before anything slow is imported; `key` is the
dotted prefix of the settings, empty in a class, which does not know where it is used.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

MASKS = ("boxes", "strokes", "half", "outpainting")  # kinds of masks of inpainting


def check_levels(levels: Sequence[float], key: str = "") -> None:
    """Raise ValueError unless there are levels, all in (0, 1]."""
    if not levels or not all(0 < level <= 1 for level in levels):
        what = "must be levels in (0, 1], with 0 = data and 1 = noise, one or more"
        raise ValueError(f"{key}levels={list(levels)}: {what}")


def check_odds(odds: Sequence[float], count: int, key: str) -> None:
    """Raise ValueError unless there are `count` finite odds, none below 0 and not all 0; `key` is
    theirs.
    """
    if len(odds) != count:
        what = f"must be {count} numbers, one for each of the levels, and are {len(odds)}"
        raise ValueError(f"{key}={list(odds)}: {what}")
    if not (all(each >= 0 for each in odds) and 0 < sum(odds) < math.inf):
        raise ValueError(f"{key}={list(odds)}: must be finite, 0 or more, and not all 0")


def check_warm_up(steps: int, odds: Sequence[float] | None, key: str = "") -> None:
    """Raise ValueError for a warm-up of noise levels without odds of its own."""
    if steps < 0 or (steps > 0 and odds is None):
        what = f"must be 0, or above it and come with {key}warmup_odds"
        raise ValueError(f"{key}warmup_steps={steps}: {what}")


def check_spread(m: float, s: float, key: str = "") -> None:
    """Raise ValueError for the mean and the spread of a logit-normal that are none."""
    if not math.isfinite(m):
        raise ValueError(f"{key}m={m}: must be finite")
    if not (math.isfinite(s) and s > 0):
        raise ValueError(f"{key}s={s}: must be finite and above 0")


def check_range(low: float, high: float, key: str = "", *, inside: bool = False) -> None:
    """Raise ValueError unless 0 <= low < high <= 1; if `inside`, without both ends."""
    within = 0 < low < high < 1 if inside else 0 <= low < high <= 1
    if not within:
        ends = "both above 0 and below 1" if inside else "both from 0 to 1"
        raise ValueError(f"{key}low={low}: must be below {key}high={high}, and {ends}")


def check_refinement(levels: Sequence[Sequence[float]], refine: Sequence[int]) -> None:
    """Raise ValueError for noise levels of 1, 2, ... sampling steps, or for the updates from which
    these are trained, that cannot be. See `times.Refinement`.
    """
    counted = [len(steps) for steps in levels] == list(range(1, len(levels) + 1))
    falling = all(a > b for steps in levels for a, b in itertools.pairwise([*steps, 0.0]))
    if not levels or not counted or not falling or any(steps[0] != 1 for steps in levels):
        what = "must be 1, 2, ... levels for 1, 2, ... steps, each from 1 down"
        raise ValueError(f"method.levels={[list(steps) for steps in levels]}: {what}")
    if not 0 < len(refine) <= len(levels) or list(refine) != sorted(refine) or refine[0] != 0:
        what = "must rise from 0, at most one for each of method.levels"
        raise ValueError(f"method.refine={list(refine)}: {what}")


def check_masks(masks: Any) -> None:
    """Raise ValueError for odds of kinds of masks with an unknown kind, a number below 0, or none
    above it. true and false pass.
    """
    if not isinstance(masks, Mapping):
        return
    for name, odds in masks.items():
        if name not in MASKS:
            what = f"there is no such kind; there are {', '.join(MASKS)}"
            raise ValueError(f"data.masks.{name}: {what}")
        number = isinstance(odds, int | float) and not isinstance(odds, bool)
        if not (number and 0 <= odds < math.inf):
            raise ValueError(f"data.masks.{name}={odds}: must be a number, 0 or more")
    if not sum(masks.values()):
        raise ValueError("data.masks: all odds are 0; give at least one kind")
