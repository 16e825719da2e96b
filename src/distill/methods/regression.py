"""Regression on the teacher's samples (Luhman & Luhman 2021, arXiv 2101.02388): a baseline, without a discriminator.

    for x_T ~ N(0, I), c in the teacher's pairs:     x0 = teacher's sample from x_T, in its own many steps
        t ~ levels
        x_t = x_T where t = 1                        # a pair: the student is to draw what the teacher drew
              alpha_t x0 + sigma_t eps elsewhere     # fresh noise, as a sampler of several steps has it there
        student:  |student(x_t, t, c) - x0|^2

The mean over x0 is what this learns where x_t leaves it open, so at t < 1 it trains as diffusion itself does, on guided
samples. The paper has one step; the levels below 1 are ours.
"""

from __future__ import annotations

from typing import Any

import torch

from distill.losses import weighted_mse
from distill.methods.base import Distillation, Fake
from distill.process import noise_like
from distill.types import Batch, Terms, Times


class Regression(Distillation):
    """
    Args:
        levels: student's noise levels, with their odds.
    """

    space = "nothing"  # it has no discriminator

    def __init__(self, *, levels: Times, **engine: Any):
        super().__init__(**engine)
        self.levels = levels

    def fake(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        if batch.noise is None:
            raise ValueError(
                "regression needs the noise of each sample: data.seeded=true, or method.real"
            )
        t = self.levels.sample(len(batch), self.step, generator)
        noise = torch.where(
            (t == 1).view(-1, 1, 1, 1), batch.noise, noise_like(batch.x0, generator)
        )
        return {"x0_hat": self.student.x0(self.begin(batch.x0, noise, t), t, batch.cond)}

    def student_loss(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Terms:
        return {"regression": weighted_mse(fake["x0_hat"], batch.x0)}
