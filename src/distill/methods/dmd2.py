"""DMD2: Improved Distribution Matching Distillation (Yin et al. 2024, arXiv 2405.14867).

    for x0, c in real samples:
        sample(c):  i ~ {1 .. N}, levels tau_1 = 1 > .. > tau_N            # one step: N = 1
                    z ~ N(0, I); the student's own steps 1 .. i-1 -> x_i   # backward simulation
                    x = student(x_i, tau_i, c)
        5 times, each with another x = sample(c):                          # two time scales
            fake score, and the heads D on its features, in one update:
            mean (fake's prediction - target)^2 + w_D (softplus(-D(x0_t)) + softplus(D(x_t)))
        student, with x = sample(c):
            L_DM:  dL/dx = (fake(x_t, t, c) - teacher(x_t, t, c)) / mean |x - teacher(x_t, t, c)|
            L_adv: w_G softplus(-D(x_t))      [L_reg: DMD's regression on the teacher's pairs]

x_t = alpha_t x + sigma_t eps, with a t and an eps of its own in each loss. The teacher is guided.
The five updates share captions and real samples (ours: the paper's code reads others for each).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from distill.core import losses
from distill.core.limits import check_falling
from distill.core.process import level_like, noise_like
from distill.core.randomness import Streams, levels_like, uniform
from distill.core.score_distillation import distribution_matching, guided_x0
from distill.core.types import (
    Batch,
    Cond,
    Critic,
    Logits,
    Losses,
    Players,
    Renoising,
    TeacherSampler,
    Times,
)
from distill.methods.base import Distillation, Loop, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Everything decided before the forward passes of one update."""

    z: Tensor  # the student's noise [B, C, H, W]
    levels: list[float]  # of its sampling steps, up to the one that gives the sample
    step_noises: list[Tensor]  # between these steps
    score: Renoising  # of the sample, for L_DM or the fake score's loss
    fake: Renoising  # of the sample, for the heads
    real: Renoising  # of x0, for the heads
    critic: Critic
    opponents: "tuple[Draws, ...]" = ()  # of each update of fake score and heads


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """The student's sample [B, C, H, W]; None in a phase of its opponents, which draw others."""

    x0_hat: Tensor | None


class DMD2(Distillation):
    """Matches the student's distribution to the teacher's by two scores, and to the data by heads.

    Args:
        levels: noise levels t of the student's steps, falling from 1. guidance: the teacher's.
        matching, denoising, renoise: times t of L_DM, of the fake score's loss, of the heads.
        matching_weight, adversarial_weight, discriminator_weight: of L_DM, w_G and w_D.
        regression_weight: of mean (student(z, 1, c) - x0)^2 on the teacher's pairs z, x0.
    """

    space = "a fake score"  # what its discriminator reads

    def __init__(
        self,
        players: Players,
        *,
        levels: Sequence[float],
        guidance: float = 8.0,
        matching: Times,
        denoising: Times,
        renoise: Times,
        matching_weight: float = 1.0,
        adversarial_weight: float = 5e-3,
        discriminator_weight: float = 1e-2,
        regression_weight: float = 0.0,
        real: TeacherSampler | None = None,
        loop: Loop | None = None,
    ):
        super().__init__(players, real=real, loop=loop)
        check_falling(levels, "method.levels")
        self.levels, self.guidance = [float(level) for level in levels], float(guidance)
        self.matching, self.denoising, self.renoise = matching, denoising, renoise
        self.matching_weight, self.adversarial_weight = matching_weight, adversarial_weight
        self.discriminator_weight, self.regression_weight = discriminator_weight, regression_weight
        self.adversarial = losses.adversarial("non_saturating")
        self.fake_score = players.features

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        # On every rank the same step is trained, as in the paper's code: none waits for another.
        u, *others = uniform(1 + len(streams.discriminator), streams.common("steps"), "steps")
        pairs = zip(others, streams.discriminator, strict=True)
        opponents = [self._drawn(batch, self.denoising, u, g, streams) for u, g in pairs]
        drawn = self._drawn(batch, self.matching, u, streams.sample, streams)
        return replace(drawn, opponents=tuple(opponents))

    def _drawn(self, batch: Batch, times: Times, u: float, g: Generator, streams: Streams) -> Draws:
        x0, i = batch.x0, 1 + int(u * len(self.levels))  # i ~ {1 .. N}
        levels = self.levels[:i]

        def renoising(times: Times, purpose: str) -> Renoising:
            return Renoising(levels_like(x0, times, streams.step, g, purpose), noise_like(x0, g))

        return Draws(
            z=noise_like(x0, g),
            levels=levels,
            step_noises=[noise_like(x0, g) for _ in levels[1:]],
            score=renoising(times, "score"),
            fake=renoising(self.renoise, "fake"),
            real=renoising(self.renoise, "real"),
            critic=self.heads.draw(streams.common("heads")),
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        x0_hat = None if phase == "discriminator" else self._sample(draws, batch.cond)
        return StudentSample(x0_hat=x0_hat)

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, update: int = 0
    ) -> Losses:
        drawn, fake_score, cond = draws.opponents[update], self.fake_score, batch.cond
        with torch.no_grad():
            x = self._sample(drawn, cond)
        kind, process = fake_score.prediction, fake_score.process  # eps, v or flow, as its teacher
        x_t, t = drawn.score.of(x, process), drawn.score.t
        predicted = process.from_x0(fake_score.x0(x_t, t, cond), x_t, t, kind)
        target = process.from_x0(x, x_t, t, kind)
        denoising = losses.weighted_mse(predicted, target)
        if not self.discriminator_weight:
            return Losses({"denoising": denoising})
        x_both = torch.cat([drawn.real.of(batch.x0, process), drawn.fake.of(x, process)])
        t_both = torch.cat([drawn.real.t, drawn.fake.t])
        logits = self._logits(drawn.critic, x_both, t_both, Cond.cat([cond, cond]))
        real, fake = (logits._replace(values=half) for half in logits.values.chunk(2))
        adv = self.discriminator_weight * self.adversarial.discriminator(real, fake)
        return Losses({"denoising": denoising, "adv": adv}, losses.critic_stats(real, fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        x, cond = sample.x0_hat, batch.cond
        assert x is not None
        terms = {}
        if self.matching_weight:
            x_real, x_fake = self._scores(x, draws.score, cond)
            terms["matching"] = self.matching_weight * distribution_matching(x, x_real, x_fake)
        if self.adversarial_weight:
            x_t = draws.fake.of(x, self.teacher.process)
            fake = self._logits(draws.critic, x_t, draws.fake.t, cond)
            terms["adv"] = self.adversarial_weight * self.adversarial.student(fake)
        if self.regression_weight:
            z = self.noise_of(batch, "method.regression_weight")
            x0_hat = self.student.x0(z, level_like(z, 1), cond)
            terms["regression"] = self.regression_weight * losses.weighted_mse(x0_hat, batch.x0)
        return Losses(terms)

    @torch.no_grad()
    def _scores(self, x: Tensor, renoising: Renoising, cond: Cond) -> tuple[Tensor, Tensor]:
        """x_real and x_fake."""
        x_t, t = renoising.of(x, self.teacher.process), renoising.t
        x_real = guided_x0(self.teacher, x_t, t, cond, self.guidance)
        return x_real, self.fake_score.x0(x_t, t, cond)

    def _sample(self, draws: Draws, cond: Cond) -> Tensor:
        x_t = self.earlier_steps(draws.z, draws.levels, draws.step_noises, cond)
        x: Tensor = self.student.x0(x_t, level_like(x_t, draws.levels[-1]), cond)
        return x

    def _logits(self, critic: Critic, x_t: Tensor, t: Tensor, cond: Cond) -> Logits:
        return Logits.of(critic(self.fake_score(x_t, t, cond), t, cond))
