"""Settings of the training loop: optimisers, learning rates over the steps, numbers of updates."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Optimizers:
    """Factories of optimisers: for the student, for the discriminator's heads, and for the fake
    score of a method that trains one.
    """

    student: OptimizerFactory
    discriminator: OptimizerFactory
    fake_score: OptimizerFactory | None = None


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the loop, which are the same for every method.

    Args:
        warmup_steps: steps in which the student's learning rate rises to its peak, and iterations
            in which the discriminator's does. An iteration counts once, however often it updates
            the discriminator.
        schedule: learning rates after the warm-up. A cosine falls to `final_rate` times the peak.
        final_rate: share of the peak at the last step of a cosine.
        clip_student, clip_discriminator: largest norm of the gradient; the latter for the heads
            and for a fake score, each by its own norm.
        discriminator_updates: updates of the discriminator for each update of the student.
        head_start: iterations before step 0 that train the discriminator only.
        accumulate: micro-batches per update.
        ema_decay: decay of the student's EMA.
        ema_device: cpu keeps the EMA there; null: where the student is.
        optimizer_device: cpu keeps the optimisers' state there, and steps there; null: where the
            weights are.
        stop_after_bad: training stops after so many iterations in a row with a gradient that is not
            finite.

    Raises ValueError for another schedule, and for `discriminator_updates` or `accumulate` below 1.
    """

    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_rate: float = 0.0
    clip_student: float = 1.0
    clip_discriminator: float = 1.0
    discriminator_updates: int = 1
    head_start: int = 0
    accumulate: int = 1
    ema_decay: float = 0.999
    ema_device: Literal["cpu"] | None = None
    optimizer_device: Literal["cpu"] | None = None
    stop_after_bad: int = 20

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"loop.schedule={self.schedule}: must be constant or cosine")
        for name in ("ema_device", "optimizer_device"):
            if getattr(self, name) not in ("cpu", None):
                raise ValueError(f"loop.{name}={getattr(self, name)}: must be cpu or null")
        for name in ("discriminator_updates", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name}={getattr(self, name)}: must be at least 1")

    def rate(self, step: int, steps: int, updates: int) -> float:
        """Learning rate as a share of its peak, at student step `step` of `steps`.

        `updates` is what the network's warm-up counts: see `warmup_steps`.
        """
        rise = min(1.0, (updates + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return rise
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return rise * (self.final_rate + (1 - self.final_rate) * fall)
