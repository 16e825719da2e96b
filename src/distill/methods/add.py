"""ADD: Adversarial Diffusion Distillation (Sauer et al. 2023, arXiv 2311.17042).

    for picture, c in real images:                                                 x0 = its latents
        s ~ levels {tau_1 .. tau_4 = 1};  x_s = alpha_s x0 + sigma_s eps           # pure noise at s = 1
        x0_hat = student(x_s, s, c)
        fake = F(decode(x0_hat)),  real = F(picture)                               # F: frozen DINOv2, five taps
        c_D = embedding of the caption, class token of the real image (zero where s = 1)
        discriminator:  hinge(heads(real, c_D), heads(fake, c_D)) + gamma R1 on the heads' inputs
        student:        -heads(fake, c_D) + 2.5 c(t) |x0_hat - teacher(x0_hat noised to t)|^2

Where data hold latents and no pictures, decode(x0) stands for the picture: ours, for there is nothing else.

Zero terminal SNR: at s = 1 the student is shown noise alone, whatever its schedule leaves of the data there. One that
predicts eps answers by its own schedule, x0_hat = (x - sigma_1 eps_hat) / alpha_1 with alpha_1 > 0, as where sampling
begins; one that predicts v can be given the schedule that ends in noise, by teacher.zero_terminal_snr.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distill import losses
from distill.distillation import ScoreDistillation, ScoreDraws
from distill.methods.base import Distillation, Phase
from distill.process import generator_like, noise_like, seed_of, square
from distill.randomness import Streams
from distill.types import Batch, Cond, Critic, Decoder, Losses, Maker, Players, Terms, Times

Corner = Sequence[float]  # upper left of the crop, in shares of where it may be


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Level s [B] and noise [B, C, H, W] of the student's input; corner of the crop; seeds of the feature network's
    augmentations of real and fake; what the distillation term draws; the critic; whether R1 is due."""

    s: Tensor
    noise: Tensor
    corner: Corner
    augment: tuple[int, int]
    distill: ScoreDraws | None
    critic: Critic
    penalised: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """x0_hat [B, C, H, W], its pixels and maps; the real picture's maps; what the heads are conditioned on."""

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
        loss: hinge, non_saturating or relativistic. over_heads: sum of the heads' losses, the paper's, or mean.
        r1_weight: gamma; every `r1_every`-th iteration, times as much.
        negative: caption of nfsd.
        decoder: what makes pixels of latents in the losses; None takes the teacher's.
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
            penalised=self.r1_weight > 0 and streams.iteration % self.r1_every == 0,
        )

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        s, corner = draws.s, draws.corner
        of_real, of_fake = (generator_like(batch.x0, seed) for seed in draws.augment)
        x0_hat = self.student.x0(self.student_input(batch.x0, draws.noise, s), s, batch.cond)
        with torch.no_grad():
            part, cond = self._picture(batch, s, corner)
            real = self.features(part, s, cond, of_real)
        pixels = self.decode(self._part(x0_hat, corner))
        maps = self.features(pixels, s, cond, of_fake)
        return StudentSample(x0_hat=x0_hat, pixels=pixels, maps=maps, real=real, cond=cond)

    def critic_features(
        self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch, generator: torch.Generator
    ) -> tuple[list[Tensor], Cond]:
        """Maps of whole pictures, which are not noised: t [B] is the level of the student's input."""
        with torch.no_grad():
            picture, cond = self._picture(batch, t)
        pixels = picture if x0 is batch.x0 else self.decode(x0)
        return self.features(pixels, t, cond, generator), cond

    def discriminator_loss(
        self, batch: Batch, draws: Draws, sample: StudentSample, turn: int = 0
    ) -> Losses:
        critic, s, cond, for_r1 = draws.critic, draws.s, sample.cond, draws.penalised
        real, inputs = losses.real_logits(critic, sample.real, s, cond, for_r1=for_r1)
        fake = critic([m.detach() for m in sample.maps], s, cond)
        terms = {"adv": self.adversarial.discriminator(real, fake)}
        if for_r1:
            terms["r1"] = self.r1_weight * self.r1_every * losses.r1(real, inputs)
        return Losses(terms, losses.critic_stats(real, fake))

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        critic, s, cond = draws.critic, draws.s, sample.cond
        terms: Terms = {}
        if self.adversarial_weight:
            real = critic(sample.real, s, cond) if self.adversarial.paired else None
            loss = self.adversarial.student(critic(sample.maps, s, cond), real)
            terms["adv"] = self.adversarial_weight * loss
        if draws.distill:
            terms["distill"] = self.distill_weight * self._distance(batch, draws, sample)
        return Losses(terms)

    def _distance(self, batch: Batch, draws: Draws, sample: StudentSample) -> Tensor:
        """To the teacher's estimate: c(t) |x0_hat - teacher(x0_hat noised to t)|^2."""
        assert draws.distill is not None
        x_hat, cond = sample.x0_hat.detach(), batch.cond
        bad = None if self.negative is None else self.teacher.embed([self.negative] * len(batch))
        target, weight = self.distill(self.teacher, x_hat, cond, draws.distill, bad)
        if not self.in_pixels:
            return losses.weighted_mse(sample.x0_hat, target, weight)
        with torch.no_grad():
            target = self.decode(self._part(target, draws.corner))
        return losses.weighted_mse(sample.pixels, target, weight)

    def _picture(self, batch: Batch, s: Tensor, corner: Corner | None = None) -> tuple[Any, Cond]:
        """The real picture as the heads look at it, or decoded; what they project on, c_img being of the whole."""
        x0, whole = batch.x0, batch.pixels
        if whole is not None:
            part = self._part(whole, corner, whole.shape[-1] // x0.shape[-1])
        else:
            part = whole = self.decode(self._part(x0, corner))  # with the borders of a fake's
            if self.crop and getattr(self.condition, "image_width", 0):
                whole = self.decode(x0)
        return part, self.condition(batch, whole, s == 1) if self.condition else batch.cond

    def _part(self, x: Tensor, corner: Corner | None, cell: int = 1) -> Tensor:
        """The crop of latents [B, C, H, W], or of pictures with `cell` pixels a side for each of theirs."""
        return x if self.crop is None or corner is None else square(x, self.crop, corner, cell)
