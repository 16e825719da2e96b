"""NitroFusion: a dynamic pool of discriminator heads (Chen et al. 2024, arXiv 2412.02030).

    for c in prompts:
        x_T ~ N(0, I);  x0 = teacher(x_T, c) in several steps;  x0_hat = student(x_T, c) in one
        t* ~ {10, 250, 500, 750};  both noised to t*
        features = teacher's encoder and mid block at t*: latent with c, patch with and without c
        D_t* ~ pool:                  one head per feature map, of the heads for this t*
        discriminator:  hinge(D_t*(real), D_t*(fake))      # L_adv^D; only the drawn heads learn
        student:        -D_t*(fake)                        # L_adv^G
        about 1 % of the pool is re-initialised

t* counts training steps: step i of 1,000 is t = (i + 1) / 1000. The losses cannot be used as
printed: the discriminator's has no fake term, and the student's would lower its own logits. The
hinge loss is ours; non-saturating and relativistic are options.

The student must start from one-step weights. If not, the first `warm_start` updates train mean
(x0_hat - x0)^2 on the teacher's pairs, as DMD2 prepares its one-step SDXL, or ADD's Eq. 4 (ours).

Bottom-up refinement (3.5): after refine[n - 1] updates up to n sampling steps are trained. Draw n,
then a step i <= n. Run steps 1..i-1 without gradient, train step i. i = 1 is one-step training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core import losses
from distill.core.process import level_like, noise_like
from distill.core.randomness import FromStream, Streams, levels_like
from distill.core.score_distillation import ScoreDistillation, ScoreDraws
from distill.core.times import Refinement
from distill.core.types import Batch, Critic, Losses, Players, TeacherSampler, Terms, Times
from distill.methods.base import Distillation, Loop, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Everything decided before this iteration's forward passes. Noise is [B, C, H, W]."""

    x_T: Tensor  # the teacher's noise; fresh where unknown: real and fake are then unpaired (ours)
    levels: list[float]  # of the student's sampling steps; the last one is trained
    step_noises: list[Tensor]  # between these sampling steps
    t: Tensor  # t* [B]
    noise: Tensor  # at t*, of the fake
    real_noise: Tensor  # at t*, of the real sample; one for all updates, like the fake's (ours)
    distill: ScoreDraws | None  # of the distillation term in the warm start
    critic: Critic
    patch_generator: FromStream  # of the feature network; each call starts it again
    warm_start: bool  # whether the student learns without the adversarial term
    heads_learn: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """The student's sample, and the features that the losses read; empty where none does."""

    x0_hat: Tensor  # [B, C, H, W]
    fake_features: list[Tensor]
    real_features: list[Tensor]


class NitroFusion(Distillation):
    """Trains against heads drawn from a pool, on the frozen teacher's features.

    Args:
        renoise: distribution of t*. mixed: a t* for each sample; False: one for the whole batch.
        levels: for each number of sampling steps n = 1, 2, ... the noise levels t of these.
        refine: updates of the student before n sampling steps are trained, for n = 1, 2, ...
        one_step_prob: probability of forcing n = 1; else n is uniform from 1 on, its step uniform.
        shared: whether real and fake share the noise at t*.
        loss: hinge, non_saturating or relativistic. over_heads: mean or sum of the heads' losses.
        warm_start: updates before the adversarial ones. heads_lead: last of these with heads.
        pairs_weight, distill, distill_weight: losses of the warm start; a weight of 0: none.
    """

    space = "latents"  # input of the feature network
    same_heads = True  # every rank draws the same t*

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
        loss: losses.LossName = "hinge",
        over_heads: losses.OverHeads = "mean",
        warm_start: int = 0,
        heads_lead: int = 100,
        pairs_weight: float = 1.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        real: TeacherSampler | None = None,
        loop: Loop | None = None,
    ):
        super().__init__(players, real=real, loop=loop)
        self.renoise, self.mixed, self.shared = renoise, mixed, shared
        self.refinement = Refinement(levels, refine, one_step_prob)
        self.adversarial = losses.adversarial(loss, over_heads)
        self.warm_start, self.heads_lead = warm_start, heads_lead
        self.pairs_weight, self.distill_weight = pairs_weight, distill_weight
        self.distill = distill or ScoreDistillation()

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        g = streams.sample
        x_T = noise_like(batch.x0, g) if batch.noise is None else batch.noise
        earlier, trained = self.refinement.draw(streams.step, streams.common("steps"))
        step_noises = [noise_like(batch.x0, g) for _ in earlier]
        noise = noise_like(batch.x0, g)
        t = levels_like(x_T, self.renoise, streams.step, streams.common("t*"), one=not self.mixed)
        warm_start = streams.step < self.warm_start
        distilled = self.distill_weight and warm_start
        return Draws(
            x_T=x_T,
            levels=[*earlier, trained],
            step_noises=step_noises,
            t=t,
            noise=noise,
            real_noise=noise if self.shared else noise_like(batch.x0, streams.discriminator[0]),
            distill=self.distill.draw(batch.x0, streams.student) if distilled else None,
            critic=self.heads.draw(streams.common("heads")),  # D_t* ~ P_t*
            patch_generator=streams.patch_generator,
            warm_start=warm_start,
            heads_learn=streams.step >= self.warm_start - self.heads_lead,
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        # bottom-up refinement: the sampling steps before the trained one
        x_t = self.earlier_steps(draws.x_T, draws.levels, draws.step_noises, batch.cond)
        x0_hat = self.student.x0(x_t, level_like(x_t, draws.levels[-1]), batch.cond)
        if not draws.heads_learn:
            return StudentSample(x0_hat=x0_hat, fake_features=[], real_features=[])
        fake = self._features(x0_hat, draws.noise, batch, draws)  # E(x_hat*_t*, t*)
        real: list[Tensor] = []
        if phase != "student" or self.adversarial.paired:
            with torch.no_grad():
                real = self._features(batch.x0, draws.real_noise, batch, draws)  # E(x*_t*, t*)
        return StudentSample(x0_hat=x0_hat, fake_features=fake, real_features=real)

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, update: int = 0
    ) -> Losses:
        if not draws.heads_learn:
            return Losses({})
        real, fake = sample.real_features, sample.fake_features
        logits = losses.both_logits(draws.critic, real, fake, batch.cond, draws.t)
        terms = {"adv": self.adversarial.discriminator(logits.real, logits.fake)}  # L_adv^D
        return Losses(terms, losses.critic_stats(logits.real, logits.fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        if draws.warm_start:
            return Losses(self._warm_start_terms(batch, draws, sample.x0_hat))
        critic, t, cond = draws.critic, draws.t, batch.cond
        real = critic(sample.real_features, t, cond) if self.adversarial.paired else None
        fake = critic(sample.fake_features, t, cond)
        return Losses({"adv": self.adversarial.student(fake, real)})  # L_adv^G

    def _features(self, x0: Tensor, noise: Tensor, batch: Batch, draws: Draws) -> list[Tensor]:
        return self.critic_features(x0, draws.t, noise, batch, draws.patch_generator())[0]

    def _warm_start_terms(self, batch: Batch, draws: Draws, x0_hat: Tensor) -> Terms:
        terms = {}
        if self.pairs_weight:
            self.noise_of(batch, "method.pairs_weight")  # x0_hat is of the sample's own noise
            terms["regression"] = self.pairs_weight * losses.weighted_mse(x0_hat, batch.x0)
        if draws.distill:
            target, c = self.distill(self.teacher, x0_hat.detach(), batch.cond, draws.distill)
            terms["distill"] = self.distill_weight * losses.weighted_mse(x0_hat, target, c)
        return terms
