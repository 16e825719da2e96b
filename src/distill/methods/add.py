"""ADD: Adversarial Diffusion Distillation (Sauer et al. 2023, arXiv 2311.17042).

    for image, c in real images:                                         x0 = latents of the image
        s ~ levels {tau_1 .. tau_4 = 1};  x_s = alpha_s x0 + sigma_s eps   # pure noise at s = 1
        x0_hat = student(x_s, s, c)
        fake = F(decode(x0_hat)),  real = F(image)                 # F: frozen DINOv2, five taps
        c_D = embedding of the caption, class token of the real image (zero where s = 1: ours)
        discriminator:  hinge(heads(real, c_D), heads(fake, c_D)) + gamma R1 of the heads   # Eq. 3
        student:        L_adv + lambda L_distill                                            # Eq. 1
                        L_adv = -heads(fake, c_D)                                           # Eq. 2
                        L_distill = c(t) mean (x0_hat - teacher(x0_hat noised to t))^2      # Eq. 4

At s = 1 the student's input is pure noise, also where alpha_1 > 0 (ours; the paper: alpha_1 = 0).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distill.core import losses
from distill.core.across_families import across, avoided
from distill.core.process import Corner, generator_like, noise_like, square
from distill.core.randomness import Streams, levels_like, seed_of, uniform
from distill.core.score_distillation import ScoreDistillation, ScoreDraws
from distill.core.types import Batch, Cond, Critic, Decoder, Losses, Players, TeacherSampler, Times
from distill.methods.base import Distillation, Loop, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Everything decided before this iteration's forward passes."""

    s: Tensor  # the student's noise level [B]
    noise: Tensor  # of the student's input [B, C, H, W]
    corner: Corner  # of the crop that the discriminator sees
    augment_seeds: tuple[int, int]  # of the feature network's augmentations, for real and for fake
    distill: ScoreDraws | None
    critic: Critic
    gamma: float  # weight of R1 in this iteration; 0 where R1 is not due


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """The student's sample, and what both losses read."""

    x0_hat: Tensor  # [B, C, H, W]
    pixels: Tensor  # crop of decode(x0_hat)
    fake_features: list[Tensor]
    real_features: list[Tensor]
    cond: Cond  # c_D, what the heads are conditioned on


class ADD(Distillation):
    """Trains against heads on a network of pictures, and towards the teacher's estimates.

    Args:
        levels: noise levels s of the student's input. distill: computes the teacher's target.
        distill_weight, adversarial_weight: lambda, and that of L_adv; at 0 the heads still learn.
        distill_space: pixels, as in the paper, or latents, which saves one pass of the decoder.
        loss: hinge, non_saturating or relativistic. over_heads: sum, as in the paper, or mean.
        r1_weight: gamma. r1_every: R1 is computed every so many iterations, with that times gamma.
        negative: negative caption for nfsd. decoder: for the losses; None takes the teacher's.
        crop: side, in latents, of the random square that the heads see; None shows the full image.
    """

    space = "pixels"  # input of the feature network
    takes_score_teacher = True  # Table 1e
    takes_generator = True  # as a baseline: all that it asks of a student is x0 at t = 1

    def __init__(
        self,
        players: Players,
        *,
        levels: Times,
        distill: ScoreDistillation,
        distill_weight: float = 2.5,
        adversarial_weight: float = 1.0,
        distill_space: Literal["pixels", "latents"] = "pixels",
        loss: losses.LossName = "hinge",
        over_heads: losses.OverHeads = "sum",
        r1_weight: float = 1e-5,
        r1_every: int = 1,
        negative: str | None = None,
        decoder: Decoder | None = None,
        crop: int | None = None,
        real: TeacherSampler | None = None,
        loop: Loop | None = None,
    ):
        super().__init__(players, real=real, loop=loop)
        self.across = across(self, distill, distill_weight, distill_space, crop)
        self.levels, self.distill, self.scored = levels, distill, self.across or distill
        self.adversarial = losses.adversarial(loss, over_heads)
        self.adversarial_weight, self.distill_weight = adversarial_weight, distill_weight
        self.in_pixels, self.negative, self.crop = distill_space == "pixels", negative, crop
        self.decode: Any
        self.register_frozen(decode=decoder or players.teacher.decode)
        self.r1_weight, self.r1_every, self.second_order = r1_weight, r1_every, r1_weight > 0

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        g = streams.sample
        return Draws(
            s=levels_like(batch.x0, self.levels, streams.step, g),
            noise=noise_like(batch.x0, g),
            corner=uniform(2, g, "corner"),
            augment_seeds=(seed_of(g, "real"), seed_of(g, "fake")),
            distill=self.scored.draw(batch.x0, streams.student) if self.distill_weight else None,
            critic=self.heads.draw(streams.common("heads")),
            gamma=0.0 if streams.iteration % self.r1_every else self.r1_weight * self.r1_every,
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        real_g, fake_g = (generator_like(batch.x0, seed) for seed in draws.augment_seeds)
        x_s = self.student_input(batch.x0, draws.noise, draws.s)  # alpha_s x0 + sigma_s eps
        x0_hat = self.student.x0(x_s, draws.s, batch.cond)
        with torch.no_grad():
            real_pixels, cond = self._image(batch, draws.s, draws.corner)
            real = self.feature_network(real_pixels, draws.s, cond, real_g)  # F_k(x0)
        pixels = self.decode(square(x0_hat, self.crop, draws.corner))
        fake = self.feature_network(pixels, draws.s, cond, fake_g)  # F_k(x0_hat)
        return StudentSample(
            x0_hat=x0_hat, pixels=pixels, fake_features=fake, real_features=real, cond=cond
        )

    def critic_features(
        self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[list[Tensor], Cond]:
        """For `distill inspect`: maps of full, clean images; of the real ones if x0 is batch.x0."""
        real_pixels, cond = self._image(batch, t)
        pixels = real_pixels if x0 is batch.x0 else self.decode(x0)
        return self.feature_network(pixels, t, cond, generator), cond

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, update: int = 0
    ) -> Losses:
        with_r1 = draws.gamma > 0
        real, fake = sample.real_features, sample.fake_features
        logits = losses.both_logits(draws.critic, real, fake, sample.cond, draws.s, for_r1=with_r1)
        terms = {"adv": self.adversarial.discriminator(logits.real, logits.fake)}  # Eq. 3
        if with_r1:
            terms["r1"] = draws.gamma * losses.r1(logits.real, logits.inputs)  # Eq. 3
        return Losses(terms, losses.critic_stats(logits.real, logits.fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        critic, s, cond = draws.critic, draws.s, sample.cond
        terms: dict[str, Tensor] = {}
        if self.adversarial_weight:
            real = critic(sample.real_features, s, cond) if self.adversarial.paired else None
            fake = critic(sample.fake_features, s, cond)
            terms["adv"] = self.adversarial_weight * self.adversarial.student(fake, real)  # Eq. 2
        if draws.distill:
            terms["distill"] = self.distill_weight * self._distill_loss(batch, draws, sample)
        return Losses(terms)  # Eq. 1: L_adv + lambda L_distill

    def _distill_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Tensor:
        """L_distill, Eq. 4, in pixels or latents."""
        assert draws.distill is not None
        if self.across:
            return self.across.loss(sample.pixels, batch.captions, draws.distill, self.negative)
        negative = avoided(self.teacher, self.negative, len(batch))
        x0_hat = sample.x0_hat.detach()
        target, c = self.distill(self.teacher, x0_hat, batch.cond, draws.distill, negative)
        if not self.in_pixels:
            return losses.weighted_mse(sample.x0_hat, target, c)
        with torch.no_grad():
            target = self.decode(square(target, self.crop, draws.corner))
        return losses.weighted_mse(sample.pixels, target, c)

    @torch.no_grad()
    def _image(self, batch: Batch, s: Tensor, corner: Corner | None = None) -> tuple[Any, Cond]:
        """The real image's crop, and c_D of the full image; decode(x0) stands for it (ours)."""
        x0, image = batch.x0, batch.pixels
        if image is not None:
            crop = square(image, self.crop, corner, image.shape[-1] // x0.shape[-1])
        else:
            crop = image = self.decode(square(x0, self.crop, corner))  # the same borders as a fake
            if self.crop and getattr(self.condition, "image_width", 0):
                image = self.decode(x0)
        return crop, self.condition(batch, image, s == 1) if self.condition else batch.cond
