"""Distributions of the noise level t in (0, 1] for training; 0 = data, 1 = noise.

`sample(n, step, generator)` returns n levels, float32 [n], on the generator's device (the CPU
without one). `step` counts updates of the student, and only a warm-up reads it. t = 0 is never
drawn: there is nothing to denoise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from distill.core.limits import check_shift
from distill.core.odds import (
    check_levels,
    check_odds,
    check_range,
    check_refinement,
    check_spread,
    check_warm_up,
)
from distill.core.randomness import uniform

Numbers = Sequence[float]


@dataclass(frozen=True, kw_only=True)
class ResolutionShift:
    """More noise for larger pictures: t' = s t / (1 + (s - 1) t), with s = e^mu, as flow models are
    trained and sampled (arXiv 2403.03206; diffusers' dynamic shifting, and its names).

    mu rises in a line with the number of tokens, from `base_shift` at `base_image_seq_len` to
    `max_shift` at `max_image_seq_len`, and goes on beyond. `patch`, the side of a token in latents,
    is 2 for FLUX and SD3. `time_shift_type`: exponential; linear: s = mu. Equal shifts at both ends
    are one for all sizes.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    patch: int = 2

    def __post_init__(self) -> None:
        check_shift({field.name: getattr(self, field.name) for field in fields(self)}, "shift")

    @classmethod
    def of(cls, settings: Shift, key: str) -> ResolutionShift | None:
        """The shift of these settings, by their names; `key` is theirs, for errors."""
        if settings is None or isinstance(settings, ResolutionShift):
            return settings
        check_shift(settings, key)
        return cls(**settings)

    def mu(self, tokens: float) -> float:
        """The shift of a picture of so many tokens; its logarithm where it is exponential."""
        span = self.max_image_seq_len - self.base_image_seq_len
        share = (tokens - self.base_image_seq_len) / span
        return self.base_shift + share * (self.max_shift - self.base_shift)

    def scale(self, shape: Sequence[int]) -> float:
        """s for latents of this shape, [..., H, W]."""
        mu = self.mu(shape[-2] * shape[-1] // self.patch**2)
        return math.exp(mu) if self.time_shift_type == "exponential" else mu

    def __call__(self, t: Tensor, shape: Sequence[int]) -> Tensor:
        """Levels t -> t' for latents of this shape. 0 and 1 stay."""
        s = self.scale(shape)
        return s * t / (1 + (s - 1) * t)

    def of_levels(self, levels: Numbers, shape: Sequence[int]) -> list[float]:
        """As a call, for levels that Python decides by."""
        s = self.scale(shape)
        return [s * t / (1 + (s - 1) * t) for t in levels]

    def settings(self) -> dict[str, Any]:
        """The settings of diffusers' schedulers of flow models for this shift."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        del named["patch"]
        return {"use_dynamic_shifting": True, **named}


Shift = ResolutionShift | Mapping[str, Any] | None
"""A shift, or its settings by name; None: levels do not move."""


class Discrete:
    """Levels with given odds, and other odds in the first `warmup_steps` updates of the student.
    `shift` moves the levels with the size of the picture.

    LADD's student: levels (1, .75, .5, .25), odds (.7, .1, .1, .1) after 500 updates at (0, 0, .5,
    .5).
    """

    def __init__(
        self,
        levels: Numbers,
        odds: Numbers,
        warmup_odds: Numbers | None = None,
        warmup_steps: int = 0,
        shift: Shift = None,
    ):
        self.shift = ResolutionShift.of(shift, "method.levels.shift")
        self.levels = [float(level) for level in levels]
        check_levels(self.levels)
        check_warm_up(warmup_steps, warmup_odds)
        self.warmup_steps, count = warmup_steps, len(self.levels)
        self.odds = _normalised("odds", odds, count)
        self.warmup_odds = (
            self.odds if warmup_odds is None else _normalised("warmup_odds", warmup_odds, count)
        )

    def sample(self, n: int, step: int, generator: Generator | None = None) -> Tensor:
        device = _device(generator)
        odds = torch.tensor(
            self.warmup_odds if step < self.warmup_steps else self.odds, device=device
        )
        index = torch.multinomial(odds, n, replacement=True, generator=generator)
        return torch.tensor(self.levels, device=device, dtype=torch.float32)[index]


class LogitNormal:
    """t = sigmoid(m + s * u) with u ~ N(0, 1): a larger m gives more noise, a larger s a wider
    spread.

    m = s = 1 is LADD's choice for the discriminator (percentiles 5/50/95: .34/.73/.93).
    """

    def __init__(self, m: float = 1.0, s: float = 1.0) -> None:
        check_spread(m, s)
        self.m, self.s = float(m), float(s)

    def sample(self, n: int, step: int, generator: Generator | None = None) -> Tensor:
        u = torch.randn(n, generator=generator, device=_device(generator), dtype=torch.float32)
        return torch.sigmoid(self.m + self.s * u)


class Uniform:
    """t uniform in (low, high]."""

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        check_range(low, high)
        self.low, self.high = float(low), float(high)

    def sample(self, n: int, step: int, generator: Generator | None = None) -> Tensor:
        u = torch.rand(n, generator=generator, device=_device(generator), dtype=torch.float32)
        return self.high - (self.high - self.low) * u  # u < 1, so t > low


class Refinement:
    """Number n of sampling steps, and the one that is trained: n = 1 at first, and after
    refine[n - 1] updates of the student up to n.

    levels: for each number of steps n = 1, 2, ... the noise levels of its steps, falling from 1.
    refine: rises from 0. one_step: probability of forcing n = 1; otherwise n is uniform from 1 on,
    and so is the trained one of the n steps. Raises ValueError.
    """

    def __init__(
        self, levels: Sequence[Numbers], refine: Sequence[int], one_step: float = 0.5
    ) -> None:
        check_refinement(levels, refine)
        self.levels, self.refine, self.one_step = levels, refine, one_step

    def draw(self, step: int, generator: Generator) -> tuple[list[float], float]:
        """Levels of the earlier sampling steps, and of the one that is trained, after `step`
        updates.
        """
        u = uniform(3, generator, "steps")
        most = sum(step >= start for start in self.refine)
        n = 1 if u[0] < self.one_step else 1 + int(u[1] * most)
        steps = list(self.levels[n - 1])
        i = int(u[2] * n)
        return steps[:i], steps[i]


def _normalised(name: str, odds: Numbers, count: int) -> list[float]:
    """Odds that sum to 1. Raises ValueError unless there are `count` finite ones, not negative."""
    weights = [float(weight) for weight in odds]
    check_odds(weights, count, name)
    return [weight / sum(weights) for weight in weights]


def _device(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
