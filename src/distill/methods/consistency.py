"""Consistency distillation (Song et al. 2023, arXiv 2303.01469) as latent consistency models have
it (Luo et al. 2023, arXiv 2310.04378): a baseline, without a discriminator.

    for x0, c in data:
        t ~ {1/N, 2/N, ..., 1},  s = t - 1/N;  x_t = alpha_t x0 + sigma_t eps
        x0' = teacher(x_t, t) + w (teacher(x_t, t, c) - teacher(x_t, t))  # guided; eps' its noise
        x_s = alpha_s x0' + sigma_s eps'                                # DDIM; on a flow Euler
        student:  d(f(x_t, t, c), stop_gradient f(x_s, s, c)),  f(x, 0, c) = x
        d(x, y) = |x - y|^2, or sqrt(|x - y|^2 + h^2) - h               # squares, or pseudo-Huber

f is the student's estimate of x0: for any prediction a skip and a scaled network with f(x, 0) = x,
as the boundary has it. Its target is the student itself and no average of it, as Song & Dhariwal
(2023, arXiv 2310.14189) train; the second d, with h = .00054 sqrt(dimensions), is theirs too. LCM
draws w and tells the student of it; ours is one value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.core.losses import pseudo_huber, weighted_mse
from distill.core.process import noise_like
from distill.core.randomness import Streams
from distill.core.score_distillation import guided_x0
from distill.core.types import Batch, Losses, Maker, Players
from distill.methods.base import Distillation, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Where the student stands, t [B], and a step further on, s [B]; the noise [B, C, H, W] of
    x_t.
    """

    t: Tensor
    s: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """The student's estimate at t, and what it is to be, both [B, C, H, W]."""

    x0_hat: Tensor
    target: Tensor


class Consistency(Distillation):
    """
    Args:
        steps: N, into which the path from noise to data is cut.
        guidance: w, of the teacher.
        huber: h, as a multiple of sqrt(dimensions); None takes squares.
    """

    space = "nothing"  # it has no discriminator

    def __init__(
        self,
        players: Players,
        *,
        steps: int = 50,
        guidance: float = 4.0,
        huber: float | None = None,
        real: Maker | None = None,
        loop: Any = None,
    ):
        super().__init__(players, real=real, loop=loop)
        if steps < 1:
            raise ValueError(f"method.steps={steps}: must be at least 1")
        self.steps, self.guidance, self.huber = steps, torch.tensor(float(guidance)), huber

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        n, g = len(batch), streams.sample
        place = torch.randint(1, self.steps + 1, (n,), generator=g, device=batch.x0.device)
        t, s = place / self.steps, (place - 1) / self.steps
        return Draws(t=t, s=s, noise=noise_like(batch.x0, g))

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        x_t = self.student.process.diffuse(batch.x0, draws.noise, draws.t)
        target = self._target(x_t, draws.t, draws.s, batch)
        return StudentSample(x0_hat=self.student.x0(x_t, draws.t, batch.cond), target=target)

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        if self.huber is None:
            return Losses({"consistency": weighted_mse(sample.x0_hat, sample.target)})
        return Losses({"consistency": pseudo_huber(sample.x0_hat, sample.target, self.huber)})

    @torch.no_grad()
    def _target(self, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The student's estimate one step of the teacher further on; behind the last step the
        teacher's own.
        """
        process = self.teacher.process
        x0 = guided_x0(self.teacher, x_t, t, batch.cond, self.guidance)
        x_s = process.diffuse(x0, process.from_x0(x0, x_t, t, "eps"), s)
        return torch.where((s == 0).view(-1, 1, 1, 1), x0, self.student.x0(x_s, s, batch.cond))
