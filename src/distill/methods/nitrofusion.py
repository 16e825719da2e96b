"""NitroFusion: a dynamic pool of discriminator heads (Chen et al. 2024, arXiv 2412.02030).

    for c in prompts:
        x_T ~ N(0, I);  x0 = teacher(x_T, c) in several steps;  x0_hat = student(x_T, c) in one
        t* ~ {10, 250, 500, 750};  both noised to t*
        maps = frozen teacher's encoder at t*: whole under c, a patch under c and without
        D_t* ~ pool:                  one head per map, drawn from those for this t*
        discriminator:  hinge(D_t*(real), D_t*(fake))      # L_adv^D; only the drawn heads learn
        student:        -D_t*(fake)                        # L_adv^G
        about 1 % of the pool begins anew

The losses as printed cannot be meant: the discriminator's holds no fake, and the student's would
lower its own logits. Hinge is ours, with non-saturating and relativistic as options.

The student is to start from weights that can do one step. Where there are none, the first
`warm_start` steps make them: by |x0_hat - x0|^2 on the pairs, as DMD2 prepares its one-step SDXL,
or by ADD's Eq. 4, as DMD2 itself learns from the teacher's score.

Bottom-up refinement: from step refine[n - 1] on the student is also trained as the last of up to n
steps. Steps before it are its own, without gradient, and each begins where a sampler's does; the
first of any n is the one-step student.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.core import losses
from distill.core.process import level_like, noise_like
from distill.core.randomness import FromStream, Streams
from distill.core.score_distillation import ScoreDistillation, ScoreDraws
from distill.core.times import Refinement
from distill.core.types import Batch, Critic, Losses, Maker, Players, Terms, Times
from distill.methods.base import Distillation, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """x_T; levels of the student's steps, of which the last learns, and the noise between; t* [B]
    and the noise there; what the warm start's distillation and the feature network draw from; the
    critic; whether the heads and the adversarial term are at work. Noise is [B, C, H, W]."""

    x_T: Tensor
    steps: list[float]
    between: list[Tensor]
    t: Tensor
    noise: Tensor
    real_noise: Tensor
    distill: ScoreDraws | None
    critic: Critic
    features: FromStream
    warm_start: bool
    heads_learn: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """x0_hat [B, C, H, W]; its maps and the real sample's, none where no loss asks for them."""

    x0_hat: Tensor
    maps: list[Tensor]
    real: list[Tensor]


class NitroFusion(Distillation):
    """
    Args:
        renoise: t*; mixed: whether every sample has one of its own, or the whole batch one.
        levels: for each number of steps n = 1, 2, ... the t of its steps.
        refine: the student step from which on n steps are trained, for n = 1, 2, ...
        one_step_prob: odds of one step once there are others; else n and its step, evenly.
        shared: whether real and fake are noised to t* by one noise.
        loss: hinge, non_saturating or relativistic. over_heads: mean or sum of the heads' losses.
        warm_start: student steps before the adversarial ones; in the last heads_lead heads learn.
        pairs_weight, distill, distill_weight: what makes them; a weight of 0 leaves one out.
    """

    space = "latents"  # of what its feature network takes

    def __init__(
        self,
        players: Players,
        *,
        renoise: Times,
        mixed: bool = False,
        levels: Sequence[Sequence[float]] = ((1.0,),),
        refine: Sequence[int] = (0,),
        one_step_prob: float = 0.5,
        shared: bool = True,
        loss: losses.Game = "hinge",
        over_heads: losses.OverHeads = "mean",
        warm_start: int = 0,
        heads_lead: int = 100,
        pairs_weight: float = 1.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        real: Maker | None = None,
        loop: Any = None,
    ):
        super().__init__(players, real=real, loop=loop)
        self.renoise, self.mixed, self.shared = renoise, mixed, shared
        self.refinement = Refinement(levels, refine, one_step_prob)
        self.adversarial = losses.adversarial(loss, over_heads)
        self.warm_start, self.heads_lead = warm_start, heads_lead
        self.pairs_weight, self.distill_weight = pairs_weight, distill_weight
        self.distill = distill or ScoreDistillation()

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        g, n = streams.sample, len(batch)
        x_T = noise_like(batch.x0, g) if batch.noise is None else batch.noise
        done, now = self.refinement.draw(streams.step, streams.common("steps"))
        between = [noise_like(batch.x0, g) for _ in done]
        noise = noise_like(batch.x0, g)
        t = self.renoise.sample(n if self.mixed else 1, streams.step, streams.common("t*"))
        warm_start = streams.step < self.warm_start
        asked = self.distill_weight and warm_start
        return Draws(
            x_T=x_T,
            steps=[*done, now],
            between=between,
            t=t.expand(n),
            noise=noise,
            real_noise=noise if self.shared else noise_like(batch.x0, streams.discriminator[0]),
            distill=self.distill.draw(batch.x0, streams.student) if asked else None,
            critic=self.heads.draw(streams.common("heads")),  # D_t* ~ P_t*
            features=streams.features,
            warm_start=warm_start,
            heads_learn=streams.step >= self.warm_start - self.heads_lead,
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        x_t = draws.x_T
        with torch.no_grad():  # bottom-up refinement: the steps before the one that learns
            for (at, later), noise in zip(pairwise(draws.steps), draws.between, strict=True):
                x0 = self.student.x0(x_t, level_like(x_t, at), batch.cond)
                x_t = self.student.process.diffuse(x0, noise, level_like(x0, later))
        x0_hat = self.student.x0(x_t, level_like(x_t, draws.steps[-1]), batch.cond)
        if not draws.heads_learn:
            return StudentSample(x0_hat=x0_hat, maps=[], real=[])
        maps, real = self._maps(x0_hat, draws.noise, batch, draws), []  # E(x_hat*_t*, t*)
        if phase != "student" or self.adversarial.paired:
            with torch.no_grad():
                real = self._maps(batch.x0, draws.real_noise, batch, draws)  # E(x*_t*, t*)
        return StudentSample(x0_hat=x0_hat, maps=maps, real=real)

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, turn: int = 0
    ) -> Losses:
        if not draws.heads_learn:
            return Losses({})
        real = draws.critic(sample.real, draws.t, batch.cond)
        fake = draws.critic([m.detach() for m in sample.maps], draws.t, batch.cond)
        terms = {"adv": self.adversarial.discriminator(real, fake)}  # L_adv^D
        return Losses(terms, losses.critic_stats(real, fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        if draws.warm_start:
            return Losses(self._warm_start_terms(batch, draws, sample.x0_hat))
        real = draws.critic(sample.real, draws.t, batch.cond) if self.adversarial.paired else None
        fake = draws.critic(sample.maps, draws.t, batch.cond)
        return Losses({"adv": self.adversarial.student(fake, real)})  # L_adv^G

    def _maps(self, x0: Tensor, noise: Tensor, batch: Batch, draws: Draws) -> list[Tensor]:
        return self.critic_features(x0, draws.t, noise, batch, draws.features())[0]

    def _warm_start_terms(self, batch: Batch, draws: Draws, x0_hat: Tensor) -> Terms:
        terms = {}
        if self.pairs_weight:
            if batch.noise is None:
                what = "needs the noise of each sample: data.seeded=true, or make it 0"
                raise ValueError(f"method.pairs_weight {what}")
            terms["regression"] = self.pairs_weight * losses.weighted_mse(x0_hat, batch.x0)
        if draws.distill:
            target, c = self.distill(self.teacher, x0_hat.detach(), batch.cond, draws.distill)
            terms["distill"] = self.distill_weight * losses.weighted_mse(x0_hat, target, c)
        return terms
