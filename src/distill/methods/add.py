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

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distill import losses
from distill.distillation import ScoreDistillation, ScoreDraws
from distill.engine import Parts
from distill.losses import Game, OverHeads, adversarial, verdicts, weighted_mse
from distill.methods.base import Distillation, Players
from distill.process import generator_like, noise_like, seed_of, square
from distill.types import Batch, Cond, Decoder, Maker, Streams, Terms, Times

Corner = tuple[float, float]  # upper left of the crop, in shares of where it may be


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Level s [B] and noise [B, C, H, W] of the student's input; corner of the crop; seeds for the features' changes of
    real and fake pictures; the distillation's."""

    s: Tensor
    noise: Tensor
    corner: Corner
    augment: tuple[int, int]
    distill: ScoreDraws | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Fake:
    """The student's sample [B, C, H, W], its pixels and maps; the maps of the real picture; what heads project on."""

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
        negative: caption of nfsd. decoder: what makes pixels of latents in the losses; None takes the teacher's.
        crop: side in latent cells of the random square that the heads look at; None shows them all.
    """

    space = "pixels"  # what its discriminator looks at

    def __init__(
        self,
        parts: Parts,
        *,
        levels: Times,
        distill: ScoreDistillation,
        distill_weight: float = 2.5,
        adversarial_weight: float = 1.0,
        distill_space: Literal["pixels", "latents"] = "pixels",
        loss: Game = "hinge",
        over_heads: OverHeads = "sum",
        r1_weight: float = 1e-5,
        r1_every: int = 1,
        negative: str | None = None,
        decoder: Decoder | None = None,
        crop: int | None = None,
        real: Maker | None = None,
    ):
        super().__init__(parts, real)
        if distill_space not in ("pixels", "latents"):
            raise ValueError(f"method.distill_space={distill_space}: must be pixels or latents")
        self.levels, self.distill = levels, distill
        self.adversarial = adversarial(loss, over_heads)
        self.adversarial_weight, self.distill_weight = adversarial_weight, distill_weight
        self.in_pixels, self.negative = distill_space == "pixels", negative
        self._frozen = (*self._frozen, decoder)
        self.r1_weight, self.r1_every, self.crop = r1_weight, r1_every, crop
        self.second_order = r1_weight > 0

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        g = streams.sample
        s = self.levels.sample(len(batch), self.step, g)
        noise = noise_like(batch.x0, g)
        top, left = torch.rand(2, generator=g, device=batch.x0.device).tolist()
        distill = self.distill.draw(batch.x0, streams.student) if self.distill_weight else None
        augment = (seed_of(g), seed_of(g))
        return Draws(s=s, noise=noise, corner=(top, left), augment=augment, distill=distill)

    def fake(self, batch: Batch, draws: Draws, players: Players = "both") -> Fake:
        s, corner = draws.s, draws.corner
        of_real, of_fake = (generator_like(batch.x0, seed) for seed in draws.augment)
        x0_hat = self.student.x0(self.begin(batch.x0, draws.noise, s), s, batch.cond)
        with torch.no_grad():
            part, cond = self._picture(batch, s, corner)
            real = self.features(part, s, cond, of_real)
        pixels = self._decode(self._part(x0_hat, corner))
        maps = self.features(pixels, s, cond, of_fake)
        return Fake(x0_hat=x0_hat, pixels=pixels, maps=maps, real=real, cond=cond)

    def see(self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch) -> tuple[list[Tensor], Cond]:
        """Maps of whole pictures, which are not noised: t [B] is the level that the student began from."""
        with torch.no_grad():
            picture, cond = self._picture(batch, t)
        pixels = picture if x0 is batch.x0 else self._decode(x0)
        return self.features(pixels, t, cond, self.common("features")), cond

    def discriminator_loss(self, batch: Batch, draws: Draws, fake: Fake, turn: int = 0) -> Terms:
        critic, s, cond = self.critic(), draws.s, fake.cond
        if penalised := self.r1_weight and self.iteration % self.r1_every == 0:
            of_real, maps = losses.logits_for_r1(critic, fake.real, s, cond)
        else:
            of_real = critic(fake.real, s, cond)
        of_fake = critic([m.detach() for m in fake.maps], s, cond)
        self.record(**verdicts(of_real, of_fake, critic.split))
        terms = {"adv": self.adversarial.discriminator(of_real, of_fake, critic.split)}
        if penalised:
            terms["r1"] = self.r1_weight * self.r1_every * losses.r1(of_real, maps)
        return terms

    def student_loss(self, batch: Batch, draws: Draws, fake: Fake) -> Terms:
        terms, s, cond = {}, draws.s, fake.cond
        if self.adversarial_weight:
            critic = self.critic()
            of_real = critic(fake.real, s, cond) if self.adversarial.paired else None
            loss = self.adversarial.student(critic(fake.maps, s, cond), of_real, critic.split)
            terms["adv"] = self.adversarial_weight * loss
        if draws.distill:
            away = self._distillation(batch, draws, draws.distill, fake)
            terms["distill"] = self.distill_weight * away
        return terms

    def _distillation(self, batch: Batch, draws: Draws, drawn: ScoreDraws, fake: Fake) -> Tensor:
        x_hat, cond = fake.x0_hat.detach(), batch.cond
        bad = None if self.negative is None else self.teacher.embed([self.negative] * len(batch))
        target, weight = self.distill(self.teacher, x_hat, cond, drawn, bad)
        if not self.in_pixels:
            return weighted_mse(fake.x0_hat, target, weight)
        with torch.no_grad():
            target = self._decode(self._part(target, draws.corner))
        return weighted_mse(fake.pixels, target, weight)

    def _picture(self, batch: Batch, s: Tensor, corner: Corner | None = None) -> tuple[Any, Cond]:
        """The real picture as the heads look at it, or decoded; what they project on, c_img being of the whole."""
        x0, whole = batch.x0, batch.pixels
        if whole is not None:
            part = self._part(whole, corner, whole.shape[-1] // x0.shape[-1])
        else:
            part = whole = self._decode(self._part(x0, corner))  # with the borders of a fake's
            if self.crop and getattr(self.condition, "image_width", 0):
                whole = self._decode(x0)
        return part, self.condition(batch, whole, s == 1) if self.condition else batch.cond

    def _part(self, x: Tensor, corner: Corner | None, cell: int = 1) -> Tensor:
        """The crop of latents [B, C, H, W], or of pictures with `cell` pixels a side for each of theirs."""
        return x if self.crop is None or corner is None else square(x, self.crop, corner, cell)

    def _decode(self, x0: Tensor) -> Tensor:
        return (self._frozen[-1] or self.teacher.decode)(x0)
