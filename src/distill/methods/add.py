"""ADD: Adversarial Diffusion Distillation (Sauer et al. 2023, arXiv 2311.17042).

    for picture, c in real images:                                         x0 = its latents
        s ~ levels {tau_1 .. tau_4 = 1};  x_s = alpha_s x0 + sigma_s eps   # pure noise at s = 1
        x0_hat = student(x_s, s, c)
        fake = F(decode(x0_hat)),  real = F(picture)                   # F: frozen DINOv2, five taps
        c_D = embedding of the caption, class token of the real image (zero where s = 1)
        discriminator:  hinge(heads(real, c_D), heads(fake, c_D)) + gamma R1 of the heads   # Eq. 3
        student:        -heads(fake, c_D)                                  # Eq. 2; the sum is Eq. 1
                        + lambda c(t) |x0_hat - teacher(x0_hat noised to t)|^2           # Eq. 4

Zero terminal SNR: at s = 1 the student is shown noise alone. One that predicts eps still divides by
its own schedule's alpha_1 > 0, as where sampling begins; one that predicts v can be given the
schedule that ends in noise, by teacher.zero_terminal_snr.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distill.core import losses
from distill.core.process import Corner, generator_like, noise_like, seed_of, square
from distill.core.randomness import Streams
from distill.core.score_distillation import ScoreDistillation, ScoreDraws
from distill.core.types import Batch, Cond, Critic, Decoder, Losses, Maker, Players, Terms, Times
from distill.methods.base import Distillation, Phase


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Level s [B] and noise [B, C, H, W] of the student's input; corner of the crop; seeds of the
    feature network's augmentations of real and fake; what the distillation term draws; the critic;
    weight of R1, 0 where it is not due."""

    s: Tensor
    noise: Tensor
    corner: Corner
    augment: tuple[int, int]
    distill: ScoreDraws | None
    critic: Critic
    gamma: float


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """x0_hat [B, C, H, W], its pixels and maps; the real picture's maps; what heads read beside."""

    x0_hat: Tensor
    pixels: Tensor
    maps: list[Tensor]
    real: list[Tensor]
    cond: Cond


class ADD(Distillation):
    """
    Args:
        levels: student's noise levels.
        distill: how the teacher's target is made.
        distill_weight: lambda; 0 leaves the term out. adversarial_weight: likewise, for ablations.
        distill_space: pixels, as the paper has it, or latents, which saves a pass of the decoder.
        loss: hinge, non_saturating or relativistic. over_heads: the paper's sum, or mean.
        r1_weight: gamma; every `r1_every`-th iteration, times as much.
        negative: caption of nfsd. decoder: used in the losses; None takes the teacher's.
        crop: side in latent cells of the random square that the heads look at; None shows them all.
    """

    space = "pixels"  # of what its feature network takes

    def __init__(
        self,
        players: Players,
        *,
        levels: Times,
        distill: ScoreDistillation,
        distill_weight: float = 2.5,
        adversarial_weight: float = 1.0,
        distill_space: Literal["pixels", "latents"] = "pixels",
        loss: losses.Game = "hinge",
        over_heads: losses.OverHeads = "sum",
        r1_weight: float = 1e-5,
        r1_every: int = 1,
        negative: str | None = None,
        decoder: Decoder | None = None,
        crop: int | None = None,
        real: Maker | None = None,
        loop: Any = None,
    ):
        super().__init__(players, real=real, loop=loop)
        if distill_space not in ("pixels", "latents"):
            raise ValueError(f"method.distill_space={distill_space}: must be pixels or latents")
        self.levels, self.distill = levels, distill
        self.adversarial = losses.adversarial(loss, over_heads)
        self.adversarial_weight, self.distill_weight = adversarial_weight, distill_weight
        self.in_pixels, self.negative = distill_space == "pixels", negative
        self.decode: Any
        self.hold(decode=decoder or players.teacher.decode)
        self.r1_weight, self.r1_every, self.crop = r1_weight, r1_every, crop
        self.second_order = r1_weight > 0

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        g = streams.sample
        return Draws(
            s=self.levels.sample(len(batch), streams.step, g),
            noise=noise_like(batch.x0, g),
            corner=torch.rand(2, generator=g, device=batch.x0.device).tolist(),
            augment=(seed_of(g), seed_of(g)),
            distill=self.distill.draw(batch.x0, streams.student) if self.distill_weight else None,
            critic=self.heads.draw(streams.common("heads")),
            gamma=0.0 if streams.iteration % self.r1_every else self.r1_weight * self.r1_every,
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        s = draws.s
        of_real, of_fake = (generator_like(batch.x0, seed) for seed in draws.augment)
        x_s = self.student_input(batch.x0, draws.noise, s)  # alpha_s x0 + sigma_s eps
        x0_hat = self.student.x0(x_s, s, batch.cond)
        with torch.no_grad():
            picture, cond = self._picture(batch, s, draws.corner)
            real = self.features(picture, s, cond, of_real)  # F_k(x0)
        pixels = self.decode(square(x0_hat, self.crop, draws.corner))
        maps = self.features(pixels, s, cond, of_fake)  # F_k(x0_hat)
        return StudentSample(x0_hat=x0_hat, pixels=pixels, maps=maps, real=real, cond=cond)

    def critic_features(
        self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[list[Tensor], Cond]:
        """Maps of whole pictures, not noised: t [B] is the level of the student's input."""
        with torch.no_grad():
            picture, cond = self._picture(batch, t)
        pixels = picture if x0 is batch.x0 else self.decode(x0)
        return self.features(pixels, t, cond, generator), cond

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, turn: int = 0
    ) -> Losses:
        critic, s, cond = draws.critic, draws.s, sample.cond
        real, inputs = losses.real_logits(critic, sample.real, s, cond, for_r1=draws.gamma > 0)
        fake = critic([m.detach() for m in sample.maps], s, cond)
        terms = {"adv": self.adversarial.discriminator(real, fake)}  # Eq. 3
        if draws.gamma > 0:
            terms["r1"] = draws.gamma * losses.r1(real, inputs)  # Eq. 3
        return Losses(terms, losses.critic_stats(real, fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        """Eq. 1: L_adv + lambda L_distill."""
        critic, s, cond = draws.critic, draws.s, sample.cond
        terms: Terms = {}
        if self.adversarial_weight:
            real = critic(sample.real, s, cond) if self.adversarial.paired else None
            loss = self.adversarial.student(critic(sample.maps, s, cond), real)  # Eq. 2
            terms["adv"] = self.adversarial_weight * loss
        if draws.distill:
            terms["distill"] = self.distill_weight * self._distance(batch, draws, sample)  # Eq. 4
        return Losses(terms)

    def _distance(self, batch: Batch, draws: Draws, sample: StudentSample) -> Tensor:
        """L_distill, Eq. 4: c(t) |x0_hat - teacher(x0_hat noised to t)|^2, in pixels or latents."""
        assert draws.distill is not None
        x_hat, cond = sample.x0_hat.detach(), batch.cond
        bad = None if self.negative is None else self.teacher.embed([self.negative] * len(batch))
        target, c = self.distill(self.teacher, x_hat, cond, draws.distill, bad)
        if not self.in_pixels:
            return losses.weighted_mse(sample.x0_hat, target, c)
        with torch.no_grad():
            target = self.decode(square(target, self.crop, draws.corner))
        return losses.weighted_mse(sample.pixels, target, c)

    def _picture(self, batch: Batch, s: Tensor, corner: Corner | None = None) -> tuple[Any, Cond]:
        """The real picture, decode(x0) where data hold none (ours); c_D, of the whole of it."""
        x0, whole = batch.x0, batch.pixels
        if whole is not None:
            part = square(whole, self.crop, corner, whole.shape[-1] // x0.shape[-1])
        else:
            part = whole = self.decode(square(x0, self.crop, corner))  # with a fake's borders
            if self.crop and getattr(self.condition, "image_width", 0):
                whole = self.decode(x0)
        return part, self.condition(batch, whole, s == 1) if self.condition else batch.cond
