"""Regression on the teacher's samples (Luhman & Luhman 2021, arXiv 2101.02388): a baseline without
a discriminator.

    for x_T ~ N(0, I), c in the teacher's pairs:
        x0 = teacher's sample from x_T, in many steps
        t ~ levels
        x_t = x_T where t = 1                     # the pair (x_T, x0) of the paper
              alpha_t x0 + sigma_t eps elsewhere  # fresh noise, as in a sampler
        student:  mean (student(x_t, t, c) - x0)^2   # over all values of a sample

Where x_t does not determine x0 the student learns the mean. At t < 1 this is therefore ordinary
diffusion training on guided samples. The paper trains one step; the levels below 1 are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.losses import weighted_mse
from distill.core.process import column, noise_like
from distill.core.randomness import Streams, levels_like
from distill.core.types import Batch, Losses, Players, TeacherSampler, Times
from distill.methods.base import Distillation, Loop, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Everything decided before this iteration's forward passes."""

    t: Tensor  # noise level of the student's input [B]
    noise: Tensor  # of the student's input [B, C, H, W]


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """The student's x0 prediction [B, C, H, W]."""

    x0_hat: Tensor


class Regression(Distillation):
    """Trains the student to give the teacher's sample.

    Args:
        levels: noise levels t of the student's input, with their odds.
    """

    space = "nothing"  # it has no discriminator

    def __init__(
        self,
        players: Players,
        *,
        levels: Times,
        real: TeacherSampler | None = None,
        loop: Loop | None = None,
    ):
        super().__init__(players, real=real, loop=loop)
        self.levels = levels

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        if batch.noise is None:
            raise ValueError(
                "regression needs the noise of each sample: data.seeded=true, or method.real"
            )
        t = levels_like(batch.x0, self.levels, streams.step, streams.sample)
        fresh = noise_like(batch.x0, streams.sample)
        return Draws(t=t, noise=torch.where(column(t == 1, fresh), batch.noise, fresh))

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        x_t = self.student_input(batch.x0, draws.noise, draws.t)
        return StudentSample(x0_hat=self.student.x0(x_t, draws.t, batch.cond))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        return Losses({"regression": weighted_mse(sample.x0_hat, batch.x0)})
