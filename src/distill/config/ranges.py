"""Check the numbers of a configuration before weights are read."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.core.limits import LARGEST_SCALE, check_falling, check_shift

# Whole numbers and their minimum: of a run, and of its evaluation.
LARGEST = {"seed": 2**32 - 1}  # NumPy's
COUNTS = dict.fromkeys(
    ("seed", "data.num_workers", "loop.warmup_steps", "loop.head_start"), 0
) | dict.fromkeys(
    (
        "data.batch_size", "data.size", "loop.accumulate", "loop.discriminator_updates",
        "loop.stop_after_bad", "trainer.max_steps", "trainer.num_nodes",
        "trainer.log_every_n_steps", "callbacks.samples.every", "callbacks.samples.count",
        "callbacks.checkpoint.every",
    ),
    1,
)  # fmt: skip
METRICS_COUNTS = {"prompts": 4, "seed": 0, "size": 1, "batch_size": 1, "workers": 0}
STUDENT_COUNTS = dict.fromkeys(
    ("student.rank", "student.shift", "student.channels", "student.mapping_width"), 1
) | dict.fromkeys(("student.blocks", "student.mapping_layers"), 0)
SHARE = (0, 1)
SCALE = (0, LARGEST_SCALE)
# Key -> least and largest value; None leaves a side open.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "callbacks.checkpoint.archive": (0, None),
    "callbacks.checkpoint.keep": (0, None),
    "data.cache_gb": (0, None),
    "discriminator.features.crop": SHARE,
    "discriminator.features.patch": SHARE,
    "discriminator.features.random_weights": (0, 2**63 - 1),
    "discriminator.features.size": (1, None),
    "discriminator.heads.kernel": (1, None),
    "discriminator.heads.layers": (1, None),
    "discriminator.heads.projection": (1, None),
    "discriminator.heads.refresh": SHARE,
    "discriminator.heads.size": (1, None),
    "discriminator.heads.width": (1, None),
    "method.adversarial_weight": (0, None),
    "method.discriminator_weight": (0, None),
    **dict.fromkeys(
        (
            f"method.{times}.{end}"
            for times in ("matching", "denoising", "renoise", "times")
            for end in ("low", "high")
        ),
        SHARE,
    ),
    "method.matching_weight": (0, None),
    "method.regression_weight": (0, None),
    "method.crop": (1, None),
    "method.distill.guidance": SCALE,
    "method.distill.image_guidance": SCALE,
    "method.distill.high": SHARE,
    "method.distill.low": SHARE,
    "method.distill_weight": (0, None),
    "method.guidance": SCALE,
    "method.huber": (0, None),
    "method.one_step_prob": SHARE,
    "method.misaligned": (0, None),
    "method.heads_lead": (0, None),
    "method.warm_start": (0, None),
    "method.pairs_weight": (0, None),
    "method.r1_every": (1, None),
    "method.r1_weight": (0, None),
    "method.real.guidance": SCALE,
    "method.real.image_guidance": SCALE,
    "method.renoise.s": (0, None),
    "method.steps": (1, None),
    "metrics.guidance": SCALE,
    "metrics.image_guidance": SCALE,
    "loop.clip_discriminator": (0, None),
    "loop.clip_student": (0, None),
    "optimizer.discriminator.lr": (0, None),
    "optimizer.discriminator.weight_decay": (0, None),
    "optimizer.fake_score.lr": (0, None),
    "optimizer.fake_score.weight_decay": (0, None),
    "loop.ema_decay": SHARE,
    "loop.final_rate": SHARE,
    "optimizer.student.lr": (0, None),
    "optimizer.student.weight_decay": (0, None),
    "sampler.guidance": SCALE,
    "sampler.flow_shift": (0, None),
    "student.layer_scale": (0, None),
    "teacher.guidance": SCALE,
}
ABOVE_ZERO = ("method.beta", "student.alpha")
SHIFTS = ("sampler.shift", "method.levels.shift", "method.real.shift")
ODD = ("discriminator.heads.kernel",)  # an even kernel would change the size of the map
# Lists of noise levels, 0 = data and 1 = noise.
LEVELS = (
    "sampler.levels", "discriminator.heads.levels", "method.levels.levels", "method.renoise.levels",
)  # fmt: skip
FALLING = ("sampler.levels",)
NAMED = ("discriminator.features.taps", "discriminator.features.tasks")  # without duplicates
OF_COLOURS = ("discriminator.features.mean", "discriminator.features.std")
BETAS = tuple(f"optimizer.{player}.betas" for player in ("student", "discriminator", "fake_score"))
INFINITE = ("loop.clip_student", "loop.clip_discriminator")  # infinity: no clipping
OURS = (
    "method",
    "optimizer",
    "loop",
    "discriminator",
    "sampler",
    "student",
    "teacher",
    "score_teacher",
    "data",
    "metrics",
)


def check_ranges(cfg: DictConfig) -> None:
    """Raise ValueError for a number outside its range, or NaN. `check_keys` checks the types."""
    for key, (least, most) in RANGES.items():
        value: Any = OmegaConf.select(cfg, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low = -float("inf") if least is None else least
        high = float("inf") if most is None else most
        if not low <= value <= high:
            what = f"from {least} to {most}" if most is not None else f"{least} or more"
            raise ValueError(f"{key}={value}: must be {what}")
    for key in ABOVE_ZERO:
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            raise ValueError(f"{key}={value}: must be above 0")
    for key in SHIFTS:
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group)
        value = node.get(name) if isinstance(node, DictConfig) else None
        if isinstance(value, DictConfig) and "_target_" not in value:
            check_shift(OmegaConf.to_container(value, resolve=True), key)  # type: ignore[arg-type]
    for key in ODD:
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int) and value % 2 == 0:
            raise ValueError(f"{key}={value}: must be odd; use {value + 1}")
    for group in OURS:
        node = OmegaConf.select(cfg, group)
        if isinstance(node, DictConfig):
            _check_finite(OmegaConf.to_container(node, resolve=True), group)


def check_most(cfg: DictConfig, most: Mapping[str, int]) -> None:
    """Raise ValueError for a whole number above the maximum of its key."""
    for key, largest in most.items():
        value = OmegaConf.select(cfg, key)
        if type(value) is int and value > largest:
            raise ValueError(f"{key}={value}: must be a whole number, 0 to {largest}")


def check_lists(cfg: DictConfig) -> None:
    """Raise ValueError for a list that is empty or has wrong values."""
    for key, values in _lists(cfg, *LEVELS):
        _check_levels(key, values, falling=key in FALLING)
    for key, values in _lists(cfg, "method.levels"):  # of one step, of two, ...
        for i, steps in enumerate(values):
            if isinstance(steps, Sequence) and not isinstance(steps, str):
                _check_levels(f"{key}[{i}]", steps, falling=True)
        if values and all(isinstance(x, int | float) for x in values):  # of one sampler
            check_falling(values, key)
    for key, values in _lists(cfg, "method.levels", *NAMED):
        if not values:
            raise ValueError(f"{key}=[]: is empty; give at least one")
    for key, values in _lists(cfg, *NAMED):
        if len(set(map(str, values))) < len(values):
            raise ValueError(f"{key}={values}: has a duplicate; leave it out")
    for key, values in _lists(cfg, *OF_COLOURS):
        numbers = [x for x in values if isinstance(x, int | float)]
        if len(numbers) != 3 or len(values) != 3 or (key.endswith("std") and min(numbers) <= 0):
            more = ", each above 0" if key.endswith("std") else ""
            raise ValueError(f"{key}={values}: must be three numbers, of red, green and blue{more}")
    for key, values in _lists(cfg, *BETAS):
        if not all(isinstance(x, int | float) and 0 <= x < 1 for x in values):
            raise ValueError(f"{key}={values}: must be numbers from 0 to below 1")
    for key, values in _lists(cfg, "method.distill.guidance"):
        if len(values) != 2 or not 0 <= values[0] <= values[1] <= LARGEST_SCALE:
            what = f"must be a number, or least and largest of a range, from 0 to {LARGEST_SCALE}"
            raise ValueError(f"{key}={values}: {what}")


def _lists(cfg: DictConfig, *keys: str) -> Iterator[tuple[str, list[Any]]]:
    for key in keys:
        group, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, group)
        value = node.get(name) if isinstance(node, DictConfig) else None
        if isinstance(value, ListConfig):
            yield key, list(OmegaConf.to_container(value, resolve=True))


def _check_levels(key: str, values: Sequence[Any], *, falling: bool) -> None:
    within = all(isinstance(x, int | float) and 0 < x <= 1 for x in values)
    if not values or not within:
        raise ValueError(f"{key}={list(values)}: must be levels above 0 and at most 1, one or more")
    if falling and not all(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{key}={list(values)}: must fall from at most 1, and stay above 0")


def _check_finite(value: Any, key: str) -> None:
    """Raise ValueError for infinity or NaN anywhere in a plain tree."""
    if isinstance(value, float) and not math.isfinite(value) and key not in INFINITE:
        raise ValueError(f"{key}={value}: must be a finite number")
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_finite(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_finite(inner, f"{key}[{i}]")
