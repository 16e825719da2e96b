"""ADD: Adversarial Diffusion Distillation (Sauer et al. 2023, arXiv 2311.17042).

    for x0, c in real images:
        s ~ levels {tau_1 .. tau_4 = 1};  x_s = alpha_s x0 + sigma_s eps           # pure noise at s = 1
        x0_hat = student(x_s, s, c)
        fake = F(decode(x0_hat)),  real = F(decode(x0))                            # F: frozen DINOv2, five taps
        c_D = embedding of the caption, class token of the real image (zero where s = 1)
        discriminator:  hinge(heads(real, c_D), heads(fake, c_D)) + gamma R1 on the heads' inputs
        student:        -heads(fake, c_D) + 2.5 c(t) |x0_hat - teacher(x0_hat noised to t)|^2

Zero terminal SNR: at s = 1 the student is shown noise alone, whatever its schedule leaves of the data there. A network
that predicts eps then answers by its own schedule, x0_hat = (x - sigma_1 eps_hat) / alpha_1 with its alpha_1 > 0, as it
does when sampling begins; one that predicts v may be given the schedule that ends in noise.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from distill.distillation import ScoreDistillation
from distill.losses import Game, adversarial, r1, verdicts, weighted_mse
from distill.methods.base import Distillation, Fake
from distill.process import noise_like
from distill.types import Batch, Cond, Terms, Times


class ADD(Distillation):
    """
    Args:
        levels: student's noise levels.
        distill: how the teacher's target is made.
        distill_weight: lambda; 0 leaves the term out. adversarial_weight: likewise, for the ablations.
        distill_space: pixels, as the paper has it, or latents, which saves a pass of the decoder.
        loss: hinge, non_saturating or relativistic.
        r1_weight: gamma; every `r1_every`-th iteration, times as much.
        negative: caption of nfsd.
        decoder: what makes pixels of latents in the losses; None takes the teacher's.
        crop: side in latent cells of the random square that is decoded; None decodes all.
    """

    space = "pixels"  # what its discriminator looks at

    def __init__(
        self,
        *,
        levels: Times,
        distill: ScoreDistillation,
        distill_weight: float = 2.5,
        adversarial_weight: float = 1.0,
        distill_space: Literal["pixels", "latents"] = "pixels",
        loss: Game = "hinge",
        r1_weight: float = 1e-5,
        r1_every: int = 1,
        negative: str | None = None,
        decoder: Any = None,
        crop: int | None = None,
        **engine: Any,
    ):
        super().__init__(**engine)
        if distill_space not in ("pixels", "latents"):
            raise ValueError(f"method.distill_space={distill_space}: must be pixels or latents")
        self.levels, self.distill, self.adversarial = levels, distill, adversarial(loss)
        self.adversarial_weight, self.distill_weight = adversarial_weight, distill_weight
        self.in_pixels, self.negative = distill_space == "pixels", negative
        self._frozen = (*self._frozen, decoder)
        self.r1_weight, self.r1_every, self.crop = r1_weight, r1_every, crop
        self.second_order = r1_weight > 0

    def fake(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        s = self.levels.sample(len(batch), self.step, generator)
        eps = noise_like(batch.x0, generator)
        x0_hat = self.student.x0(self.begin(batch.x0, eps, s), s, batch.cond)
        place = self._place(batch.x0, generator)
        pixels = self._decode(x0_hat, place)
        with torch.no_grad():
            real = self._decode(batch.x0, place)
            told = self.condition(batch, real, s == 1) if self.condition else batch.cond
            of_real = self.features(real, s, told, generator)
        maps = self.features(pixels, s, told, generator)
        return {
            "x0_hat": x0_hat,
            "pixels": pixels,
            "place": place,
            "s": s,
            "told": told,
            "real": of_real,
            "maps": maps,
        }

    def see(self, x0: Tensor, t: Tensor, noise: Tensor, batch: Batch) -> tuple[list[Tensor], Cond]:
        """Maps of whole pictures, which are not noised: t [B] is the level that the student began from."""
        told, whole = batch.cond, (slice(None), slice(None))
        if self.condition:
            with torch.no_grad():
                told = self.condition(batch, self._decode(batch.x0, whole), t == 1)
        return self.features(self._decode(x0, whole), t, told, self.common("features")), told

    def discriminator_loss(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Terms:
        critic, s, told = self.critic(), fake["s"], fake["told"]
        penalised = self.r1_weight and self.iteration % self.r1_every == 0
        maps = [m.detach().requires_grad_(bool(penalised)) for m in fake["real"]]
        of_real, of_fake = (
            critic(maps, s, told),
            critic([m.detach() for m in fake["maps"]], s, told),
        )
        self.record(**verdicts(of_real, of_fake, critic.split))
        terms = {"adv": self.adversarial.discriminator(of_real, of_fake, critic.split)}
        if penalised:
            terms["r1"] = self.r1_weight * self.r1_every * r1(of_real, maps)
        return terms

    def student_loss(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Terms:
        terms, s, told = {}, fake["s"], fake["told"]
        if self.adversarial_weight:
            critic = self.critic()
            of_real = critic(fake["real"], s, told) if self.adversarial.paired else None
            loss = self.adversarial.student(critic(fake["maps"], s, told), of_real, critic.split)
            terms["adv"] = self.adversarial_weight * loss
        if self.distill_weight:
            terms["distill"] = self.distill_weight * self._distillation(batch, fake, generator)
        return terms

    def _distillation(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Tensor:
        x0_hat = fake["x0_hat"]
        negative = (
            self.teacher.embed([self.negative] * len(batch)) if self.negative is not None else None
        )
        target, weight = self.distill(
            self.teacher, x0_hat.detach(), batch.cond, generator, negative
        )
        if not self.in_pixels:
            return weighted_mse(x0_hat, target, weight)
        with torch.no_grad():
            target = self._decode(target, fake["place"])
        return weighted_mse(fake["pixels"], target, weight)

    def _place(self, x0: Tensor, generator: torch.Generator) -> tuple[slice, slice]:
        """Rows and columns of the latents [B, C, H, W] that are decoded: the same of real and fake."""
        if self.crop is None:
            return slice(None), slice(None)
        corner = torch.rand(2, generator=generator, device=x0.device).tolist()
        top, left = (
            int(u * max(1, side - self.crop + 1))
            for u, side in zip(corner, x0.shape[-2:], strict=True)
        )
        return slice(top, top + self.crop), slice(left, left + self.crop)

    def _decode(self, x0: Tensor, place: tuple[slice, slice]) -> Tensor:
        return (self._frozen[-1] or self.teacher.decode)(x0[..., place[0], place[1]])
