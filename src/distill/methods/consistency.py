"""Consistency distillation (Song et al. 2023, arXiv 2303.01469) in latents, as in latent
consistency models (Luo et al. 2023, arXiv 2310.04378): a baseline without a discriminator.

    for x0, c in data:
        t ~ {1/N, 2/N, ..., 1},  s = t - 1/N;  x_t = alpha_t x0 + sigma_t eps
        x0' = teacher(x_t, t) + w (teacher(x_t, t, c) - teacher(x_t, t))     # guided
        x_s = alpha_s x0' + sigma_s eps',  eps' = (x_t - alpha_t x0') / sigma_t    # DDIM, or Euler
        student:  d(f(x_t, t, c), stop_gradient f(x_s, s, c)),  f(x, 0, c) = x
        d(x, y) = mean (x - y)^2, or sqrt(sum (x - y)^2 + h^2) - h   # squared error, pseudo-Huber

f is the student's x0 prediction. From eps, v and flow predictions it has the skip connection of the
papers, so f(x, 0) = x; where s = 0 the target is x0' for any prediction. Else it is the student
itself and not its EMA, as in Song & Dhariwal (2023, arXiv 2310.14189); pseudo-Huber with
h = .00054 sqrt(dimensions) is theirs too. LCM draws w and conditions the student on it; ours is one
value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.losses import pseudo_huber, weighted_mse
from distill.core.process import column, noise_like
from distill.core.randomness import Streams
from distill.core.score_distillation import guided_x0
from distill.core.types import Batch, Losses, Players, TeacherSampler
from distill.methods.base import Distillation, Loop, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Everything decided before this iteration's forward passes."""

    t: Tensor  # noise level of the student's input [B]
    s: Tensor  # one teacher step below t [B]
    noise: Tensor  # of x_t [B, C, H, W]


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """The student's x0 prediction at t and its target, both [B, C, H, W]."""

    x0_hat: Tensor
    target: Tensor


class ConsistencyDistillation(Distillation):
    """Trains the student to estimate the same clean data at both ends of a step of the teacher.

    Args:
        steps: N, number of teacher steps from noise to data.
        guidance: w, guidance scale of the teacher.
        huber: h, as a multiple of sqrt(dimensions); None takes the squared error.
    """

    space = "nothing"  # it has no discriminator

    def __init__(
        self,
        players: Players,
        *,
        steps: int = 50,
        guidance: float = 4.0,
        huber: float | None = None,
        real: TeacherSampler | None = None,
        loop: Loop | None = None,
    ):
        super().__init__(players, real=real, loop=loop)
        if steps < 1:
            raise ValueError(f"method.steps={steps}: must be at least 1")
        self.steps, self.guidance, self.huber = steps, float(guidance), huber

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        n, g = len(batch), streams.sample
        index = torch.randint(1, self.steps + 1, (n,), generator=g, device=batch.x0.device)
        t = index / self.steps
        s = (index - 1) / self.steps
        return Draws(t=t, s=s, noise=noise_like(batch.x0, g))

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        # Also at t = 1: x_t lies on the teacher's path, along which x_s follows. `student_input`
        # would put pure noise there, off the path where alpha_1 > 0.
        x_t = self.student.process.diffuse(batch.x0, draws.noise, draws.t)
        target = self._target(x_t, draws.t, draws.s, batch)
        return StudentSample(x0_hat=self.student.x0(x_t, draws.t, batch.cond), target=target)

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        if self.huber is None:
            return Losses({"consistency": weighted_mse(sample.x0_hat, sample.target)})
        return Losses({"consistency": pseudo_huber(sample.x0_hat, sample.target, self.huber)})

    @torch.no_grad()
    def _target(self, x_t: Tensor, t: Tensor, s: Tensor, batch: Batch) -> Tensor:
        """The student's x0 prediction after one teacher step; at s = 0 the teacher's own
        prediction.
        """
        process = self.teacher.process
        x0 = guided_x0(self.teacher, x_t, t, batch.cond, self.guidance)
        x_s = process.diffuse(x0, process.from_x0(x0, x_t, t, "eps"), s)
        return torch.where(column(s == 0, x0), x0, self.student.x0(x_s, s, batch.cond))
