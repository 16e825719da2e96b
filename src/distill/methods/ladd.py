"""LADD: Latent Adversarial Diffusion Distillation (Sauer et al. 2024, arXiv 2403.12015).

    for x0, c in teacher-made latents:  # real data only with the distillation term
        t ~ levels {1, .75, .5, .25};  x_t = alpha_t x0 + sigma_t eps      # pure noise at t = 1
        x0_hat = student(x_t, t, c)
        t_hat = sigmoid(m + s u), u ~ N(0, 1)  # where the discriminator reads
        fake = maps of the frozen teacher at (diffuse(x0_hat, eps', t_hat), t_hat, c), after every
            block
        real = the same of x0, with t_hat and noise of its own, or shared with the fake
        discriminator:  hinge(heads(real), heads(fake)) [+ R1 on the heads' inputs]  # ADD's Eq. 3
        student:        -heads(fake) [+ distillation]  # ADD's Eq. 2 [and 4]; through the teacher

The paper prints no formula for its losses; hinge, and R1 as an option, follow its statement that
the discriminator is that of StyleGAN-T and ADD. The numbers are those of ADD's equations (arXiv
2311.17042).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill.core import losses
from distill.core.process import noise_like
from distill.core.randomness import FromStream, Streams
from distill.core.score_distillation import ScoreDistillation, ScoreDraws
from distill.core.types import Batch, Critic, Losses, Maker, Players, Times
from distill.methods.base import Distillation, Phase


@dataclass(frozen=True, eq=False)
class Renoising:
    """Where the discriminator reads a sample: t_hat [B] and noise [B, C, H, W]."""

    t: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Level t [B] and noise [B, C, H, W] of the student's input; where its sample is read and, for
    each update of the discriminator, the real one; what the distillation term draws; the critic;
    what the feature network draws from."""

    t: Tensor
    noise: Tensor
    renoising: Renoising
    of_real: tuple[Renoising, ...]
    distill: ScoreDraws | None
    critic: Critic
    features: FromStream


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """x0_hat [B, C, H, W] and its maps; the real sample's under the same renoising, where a loss
    asks for them.
    """

    x0_hat: Tensor
    maps: list[Tensor]
    real: list[Tensor] | None


class LADD(Distillation):
    """
    Args:
        levels: student's noise levels, with their odds.
        renoise: levels t_hat at which the discriminator reads, on the scale of the rectified flow.
        shared: whether a real sample is renoised by the t_hat and the noise of its fake.
        loss: hinge, non_saturating or relativistic. over_heads: mean or sum of the heads' losses.
        misaligned: weight of real samples under the next one's caption as further fakes, as
            SANA-Sprint has them.
        r1_weight: gamma of R1 on the heads' inputs; 0 leaves the term out.
        distill: the teacher's estimate of x0_hat, ADD's Eq. 4.
        distill_weight: lambda of that term, for real data; 0 leaves it out.
    """

    space = "latents"  # of what its feature network takes

    def __init__(
        self,
        players: Players,
        *,
        levels: Times,
        renoise: Times,
        shared: bool = False,
        loss: losses.Game = "hinge",
        over_heads: losses.OverHeads = "mean",
        misaligned: float = 0.0,
        r1_weight: float = 0.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        real: Maker | None = None,
        loop: Any = None,
    ):
        super().__init__(players, real=real, loop=loop)
        self.levels, self.renoise = levels, renoise
        self.adversarial = losses.adversarial(loss, over_heads)
        self.shared, self.misaligned, self.distill_weight = shared, misaligned, distill_weight
        self.r1_weight, self.distill = r1_weight, distill or ScoreDistillation()
        self.second_order = r1_weight > 0

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        t = self.levels.sample(len(batch), streams.step, streams.sample)
        noise = noise_like(batch.x0, streams.sample)
        renoising = self._renoising(batch, streams.step, streams.sample)
        of_real = [renoising for _ in streams.discriminator]
        if not self.shared:
            of_real = [self._renoising(batch, streams.step, g) for g in streams.discriminator]
        return Draws(
            t=t,
            noise=noise,
            renoising=renoising,
            of_real=tuple(of_real),
            distill=self.distill.draw(batch.x0, streams.student) if self.distill_weight else None,
            critic=self.heads.draw(streams.common("heads")),
            features=streams.features,
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        x_t = self.student_input(batch.x0, draws.noise, draws.t)  # alpha_t x0 + sigma_t eps
        x0_hat = self.student.x0(x_t, draws.t, batch.cond)
        maps = self._maps(x0_hat, draws.renoising, batch, draws)  # F_k(x0_hat noised to t_hat)
        student_asks = self.adversarial.paired and phase != "discriminator"
        discriminator_asks = self.shared and phase != "student"
        real = None
        if student_asks or discriminator_asks:
            real = self._real_maps(batch, draws.renoising, draws)
        return StudentSample(x0_hat=x0_hat, maps=maps, real=real)

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, turn: int = 0
    ) -> Losses:
        critic, at = draws.critic, draws.of_real[turn]
        maps = sample.real if self.shared and sample.real else self._real_maps(batch, at, draws)
        for_r1 = self.r1_weight > 0
        real, inputs = losses.real_logits(critic, maps, at.t, batch.cond, for_r1=for_r1)
        fake = critic([m.detach() for m in sample.maps], draws.renoising.t, batch.cond)
        terms = {"adv": self.adversarial.discriminator(real, fake)}  # ADD's Eq. 3
        if for_r1:
            terms["r1"] = self.r1_weight * losses.r1(real, inputs)  # ADD's Eq. 3: gamma R1
        if self.misaligned:
            terms["misaligned"] = self.misaligned * self._misaligned(batch, at, draws, real)
        return Losses(terms, losses.critic_stats(real, fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        critic, t_hat, real = draws.critic, draws.renoising.t, None
        if self.adversarial.paired and sample.real is not None:
            real = critic(sample.real, t_hat, batch.cond)
        fake = critic(sample.maps, t_hat, batch.cond)
        terms = {"adv": self.adversarial.student(fake, real)}  # ADD's Eq. 2
        if draws.distill:  # ADD's Eq. 4, in latents
            x_hat = sample.x0_hat.detach()
            target, c = self.distill(self.teacher, x_hat, batch.cond, draws.distill)
            distance = losses.weighted_mse(sample.x0_hat, target, c)
            terms["distill"] = self.distill_weight * distance
        return Losses(terms)

    def _misaligned(self, batch: Batch, at: Renoising, draws: Draws, real: losses.Answer) -> Tensor:
        """The discriminator's loss on real samples, as fakes, under the caption of the next one."""
        if len(batch) < 2:
            what = "there is no other caption; raise data.batch_size"
            raise ValueError(f"method.misaligned={self.misaligned}: {what}")
        wrong = replace(batch, cond=batch.cond.index(torch.arange(len(batch)).roll(1)))
        logits = draws.critic(self._real_maps(wrong, at, draws), at.t, wrong.cond)
        return self.adversarial.fake_term(real, logits)

    def _maps(self, x0: Tensor, at: Renoising, batch: Batch, draws: Draws) -> list[Tensor]:
        return self.critic_features(x0, at.t, at.noise, batch, draws.features())[0]

    @torch.no_grad()
    def _real_maps(self, batch: Batch, at: Renoising, draws: Draws) -> list[Tensor]:
        return self._maps(batch.x0, at, batch, draws)

    def _renoising(self, batch: Batch, step: int, generator: torch.Generator) -> Renoising:
        t_hat = self.renoise.sample(len(batch), step, generator)  # sigmoid(m + s u)
        t = self.teacher.process.from_flow_time(t_hat)
        return Renoising(t, noise_like(batch.x0, generator))
