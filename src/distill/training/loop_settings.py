"""How any method is trained: its optimisers, their learning rates over the steps, and counts of
updates.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Optimizers:
    """What makes the optimiser of the student, and that of the discriminator's heads."""

    student: OptimizerFactory
    discriminator: OptimizerFactory


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop does, whatever the method.

    Args:
        warmup_steps: steps in which the student's learning rate rises to the peak, and iterations
            in which the discriminator's does; an iteration counts once, however often it updates
            the discriminator.
        schedule: of the learning rates after that; a cosine falls to `final_rate`, a share of the
            peak.
        clip_student, clip_discriminator: largest norm of the gradient.
        discriminator_updates: for each update of the student.
        head_start: iterations of the discriminator alone, before step 0.
        accumulate: micro-batches of one update.
        ema_decay: of the student's average.
        stop_after_bad: iterations in a row whose gradient is not finite, after which training ends.

    Raises ValueError for another schedule, and for counts of updates below 1.
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
    stop_after_bad: int = 20

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"loop.schedule={self.schedule}: must be constant or cosine")
        for name in ("discriminator_updates", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name}={getattr(self, name)}: must be at least 1")

    def rate(self, step: int, steps: int, updates: int) -> float:
        """Share of the peak learning rate at student step `step` of `steps`.

        `updates` is what the network's warm-up counts: `warmup_steps` says what that is.
        """
        rise = min(1.0, (updates + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return rise
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return rise * (self.final_rate + (1 - self.final_rate) * fall)
