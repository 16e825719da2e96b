"""Training settings of every method: optimisers, learning rates and numbers of updates."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Training settings of every method.

    Learning rates rise over `warmup_steps`, then stay or follow half a cosine down to `final_rate`.
    """

    student: OptimizerFactory
    discriminator: OptimizerFactory
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_rate: float = 0.0
    clip_student: float = 1.0
    clip_discriminator: float = 1.0
    discriminator_updates: int = 1
    head_start: int = 0
    accumulate: int = 1
    ema_decay: float = 0.999
    stop_after_bad: int = 20  # iterations in a row with a gradient that is not finite

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"optimizer.schedule={self.schedule}: must be constant or cosine")
        for name in ("discriminator_updates", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)}: must be at least 1")

    def rate(self, step: int, steps: int, updates: int) -> float:
        """Share of the peak learning rate at student step `step` of `steps`, for a player after
        `updates` updates.
        """
        rise = min(1.0, (updates + 1) / max(1, self.warmup_steps))
        if self.schedule == "constant":
            return rise
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return rise * (self.final_rate + (1 - self.final_rate) * fall)
