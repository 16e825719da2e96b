"""LADD: Latent Adversarial Diffusion Distillation (Sauer et al. 2024, arXiv 2403.12015).

    for x0, c in latents that the teacher generated:  # real data only with the distillation term
        t ~ levels {1, .75, .5, .25};  x_t = alpha_t x0 + sigma_t eps      # pure noise at t = 1
        x0_hat = student(x_t, t, c)
        t_hat = sigmoid(m + s u), u ~ N(0, 1)                # noise level of the discriminator
        t' = the teacher's time with t_hat's noise-to-data ratio; t_hat itself for a flow
        fake = F(alpha_t' x0_hat + sigma_t' eps', t', c)     # F: frozen teacher, after every block
        real = F(alpha_t' x0 + sigma_t' eps', t', c)         # with its own t' and eps', or shared
        discriminator:  hinge(heads(real, t', e), heads(fake, t', e)) [+ gamma R1]   # ADD's Eq. 3
        student:        -heads(fake, t', e) [+ distillation]     # Eq. 2 [and 4]; e: pooled text

The paper prints no formula for its losses. It says that the discriminator follows StyleGAN-T and
ADD; hence the hinge loss and the optional R1. Equation numbers are those of ADD (arXiv 2311.17042).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.core import losses
from distill.core.process import noise_like
from distill.core.randomness import FromStream, Streams, levels_like
from distill.core.score_distillation import ScoreDistillation, ScoreDraws
from distill.core.types import Batch, Critic, Losses, Players, Renoising, TeacherSampler, Times
from distill.methods.base import Distillation, Loop, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Everything decided before this iteration's forward passes."""

    t: Tensor  # the student's noise level [B]
    noise: Tensor  # of the student's input [B, C, H, W]
    renoising: Renoising  # of the student's sample: t', which is t_hat as the teacher's time, eps'
    real_renoising: tuple[Renoising, ...]  # of the real sample, one for each discriminator update
    distill: ScoreDraws | None  # of the distillation term
    critic: Critic  # all heads; from a pool, some
    patch_generator: FromStream  # of the feature network; each call starts it again


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """The student's sample, and the features that the losses read."""

    x0_hat: Tensor  # [B, C, H, W]
    fake_features: list[Tensor]
    real_features: list[Tensor] | None  # under the fake's renoising; None where no loss reads them


class LADD(Distillation):
    """Trains against heads on the frozen teacher's features of renoised latents.

    Args:
        levels: noise levels t of the student's input, with their odds.
        renoise: noise levels t_hat of the discriminator, on the time scale of the rectified flow.
        shared: real and fake share t_hat and eps'; a paired loss compares like with like only then.
        loss: hinge, non_saturating or relativistic. over_heads: mean or sum of the heads' losses.
        misaligned: weight of an extra fake term, real samples with another's caption (SANA-Sprint).
        r1_weight: gamma of R1 on the heads' inputs; 0 leaves the term out.
        distill, distill_weight: ADD's Eq. 4 and lambda, for real data; 0 leaves the term out.
    """

    space = "latents"  # input of the feature network

    def __init__(
        self,
        players: Players,
        *,
        levels: Times,
        renoise: Times,
        shared: bool = False,
        loss: losses.LossName = "hinge",
        over_heads: losses.OverHeads = "mean",
        misaligned: float = 0.0,
        r1_weight: float = 0.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        real: TeacherSampler | None = None,
        loop: Loop | None = None,
    ):
        super().__init__(players, real=real, loop=loop)
        self.levels, self.renoise = levels, renoise
        self.adversarial = losses.adversarial(loss, over_heads)
        self.shared, self.misaligned = shared, misaligned
        self.distill, self.distill_weight = distill or ScoreDistillation(), distill_weight
        self.r1_weight, self.second_order = r1_weight, r1_weight > 0

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        t = levels_like(batch.x0, self.levels, streams.step, streams.sample)
        noise = noise_like(batch.x0, streams.sample)
        renoising = self._renoising(batch, streams.step, streams.sample)
        # Real is renoised for each update (ours); the fake's maps are made once, for both players.
        real_renoising = [
            renoising if self.shared else self._renoising(batch, streams.step, g)
            for g in streams.discriminator
        ]
        return Draws(
            t=t,
            noise=noise,
            renoising=renoising,
            real_renoising=tuple(real_renoising),
            distill=self.distill.draw(batch.x0, streams.student) if self.distill_weight else None,
            critic=self.heads.draw(streams.common("heads")),
            patch_generator=streams.patch_generator,
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        x_t = self.student_input(batch.x0, draws.noise, draws.t)  # alpha_t x0 + sigma_t eps
        x0_hat = self.student.x0(x_t, draws.t, batch.cond)
        fake = self._maps(x0_hat, draws.renoising, batch, draws)  # F_k(x0_hat noised to t', t', c)
        student_reads = self.adversarial.paired and phase != "discriminator"  # `shared` or not
        discriminator_reads = self.shared and phase != "student"
        real = None
        if student_reads or discriminator_reads:
            real = self._real_features(batch, draws.renoising, draws)
        return StudentSample(x0_hat=x0_hat, fake_features=fake, real_features=real)

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, update: int = 0
    ) -> Losses:
        renoising, fake = draws.real_renoising[update], sample.fake_features
        real = sample.real_features if self.shared else None
        if real is None:
            real = self._real_features(batch, renoising, draws)
        with_r1 = self.r1_weight > 0
        times = {"t": renoising.t, "fake_t": draws.renoising.t}
        logits = losses.both_logits(draws.critic, real, fake, batch.cond, for_r1=with_r1, **times)
        terms = {"adv": self.adversarial.discriminator(logits.real, logits.fake)}  # ADD's Eq. 3
        if with_r1:  # ADD's Eq. 3: gamma R1
            terms["r1"] = self.r1_weight * losses.r1(logits.real, logits.inputs)
        if self.misaligned:
            term = self._misaligned_term(batch, renoising, draws, logits.real)
            terms["misaligned"] = self.misaligned * term
        return Losses(terms, losses.critic_stats(logits.real, logits.fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        critic, t, maps = draws.critic, draws.renoising.t, sample.real_features
        real = critic(maps, t, batch.cond) if self.adversarial.paired and maps else None
        fake = critic(sample.fake_features, t, batch.cond)
        terms = {"adv": self.adversarial.student(fake, real)}  # ADD's Eq. 2
        if draws.distill:  # ADD's Eq. 4, in latents
            x0_hat = sample.x0_hat.detach()
            target, c = self.distill(self.teacher, x0_hat, batch.cond, draws.distill)
            terms["distill"] = self.distill_weight * losses.weighted_mse(sample.x0_hat, target, c)
        return Losses(terms)

    def _misaligned_term(
        self, batch: Batch, renoising: Renoising, draws: Draws, real_logits: losses.HeadLogits
    ) -> Tensor:
        """The discriminator's fake term of real samples with another sample's caption."""
        if len(batch) < 2:
            what = "there is no other caption; raise data.batch_size"
            raise ValueError(f"method.misaligned={self.misaligned}: {what}")
        other_cond = batch.cond.index(torch.arange(len(batch)).roll(1))
        maps = self._real_features(replace(batch, cond=other_cond), renoising, draws)
        logits = draws.critic(maps, renoising.t, other_cond)
        return self.adversarial.fake_term(real_logits, logits)

    def _maps(self, x0: Tensor, renoising: Renoising, batch: Batch, draws: Draws) -> list[Tensor]:
        t, noise = renoising.t, renoising.noise
        return self.critic_features(x0, t, noise, batch, draws.patch_generator())[0]

    @torch.no_grad()
    def _real_features(self, batch: Batch, renoising: Renoising, draws: Draws) -> list[Tensor]:
        return self._maps(batch.x0, renoising, batch, draws)

    def _renoising(self, batch: Batch, step: int, generator: torch.Generator) -> Renoising:
        to_t = self.teacher.process.from_flow_time  # of t_hat = sigmoid(m + s u)
        t = levels_like(batch.x0, self.renoise, step, generator, "renoise", to_t)
        return Renoising(t, noise_like(batch.x0, generator))
