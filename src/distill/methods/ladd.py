"""LADD: Latent Adversarial Diffusion Distillation (Sauer et al. 2024, arXiv 2403.12015).

    for x0, c in teacher-made latents:                                     # real data only with the distillation term
        t ~ levels {1, .75, .5, .25};  x_t = alpha_t x0 + sigma_t eps      # pure noise at t = 1
        x0_hat = student(x_t, t, c)
        t_hat = sigmoid(m + s u), u ~ N(0, 1)                              # where the discriminator looks
        fake = features of the frozen teacher at (diffuse(x0_hat, eps', t_hat), t_hat, c), after every block
        real = the same of x0, with t_hat and noise of its own, or shared with the fake
        discriminator:  hinge(heads(real), heads(fake)) [+ R1 on the heads' inputs]
        student:        -heads(fake) [+ distillation]                      # gradient through the frozen teacher

The paper prints no formula for its losses; hinge, and R1 as an option, follow its statement that the discriminator is
that of StyleGAN-T and ADD.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from distill.distillation import ScoreDistillation
from distill.losses import Game, adversarial, r1, verdicts, weighted_mse
from distill.methods.base import Distillation, Fake
from distill.process import noise_like
from distill.types import Batch, Terms, Times


class LADD(Distillation):
    """
    Args:
        levels: student's noise levels, with their odds.
        renoise: levels t_hat at which the discriminator reads, on the scale of the rectified flow.
        shared: whether a real sample is re-noised by the t_hat and the noise of its fake.
        loss: hinge, non_saturating or relativistic.
        misaligned: weight of real samples under the next one's caption as further fakes, as SANA-Sprint has them.
        r1_weight: gamma of R1 on the heads' inputs; 0 leaves the term out.
        distill: what the teacher makes of x0_hat, and how much that counts: ADD's Eq. 4.
        distill_weight: lambda of that term, for real data; 0 leaves it out.
    """

    space = "latents"  # what its discriminator looks at

    def __init__(
        self,
        *,
        levels: Times,
        renoise: Times,
        shared: bool = False,
        loss: Game = "hinge",
        misaligned: float = 0.0,
        r1_weight: float = 0.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        **engine: Any,
    ):
        super().__init__(**engine)
        self.levels, self.renoise, self.adversarial = levels, renoise, adversarial(loss)
        self.shared, self.misaligned, self.distill_weight = shared, misaligned, distill_weight
        self.r1_weight, self.distill = r1_weight, distill or ScoreDistillation()
        self.second_order = r1_weight > 0

    def fake(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        t = self.levels.sample(len(batch), self.step, generator)
        x_t = self.begin(batch.x0, noise_like(batch.x0, generator), t)
        x0_hat = self.student.x0(x_t, t, batch.cond)
        look = self._look(batch, generator)
        return {"x0_hat": x0_hat, "look": look, "maps": self.see(x0_hat, *look, batch)[0]}

    def discriminator_loss(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Terms:
        critic, (t_hat, _) = self.critic(), fake["look"]
        real: Fake = fake if self.shared else {"look": self._look(batch, generator)}
        t_real, noise = real["look"]
        maps = [m.detach().requires_grad_(self.r1_weight > 0) for m in self._real(batch, real)]
        of_real = critic(maps, t_real, batch.cond)
        of_fake = critic([m.detach() for m in fake["maps"]], t_hat, batch.cond)
        self.record(**verdicts(of_real, of_fake, critic.split))
        terms = {"adv": self.adversarial.discriminator(of_real, of_fake, critic.split)}
        if self.r1_weight:
            terms["r1"] = self.r1_weight * r1(of_real, maps)
        if self.misaligned:
            if len(batch) < 2:
                raise ValueError(
                    f"method.misaligned={self.misaligned}: there is no other caption; raise data.batch_size"
                )
            wrong = replace(batch, cond=batch.cond.index(torch.arange(len(batch)).roll(1)))
            with torch.no_grad():
                maps, _ = self.see(batch.x0, t_real, noise, wrong)
            of_wrong = critic(maps, t_real, wrong.cond)
            terms["misaligned"] = self.misaligned * self.adversarial.against(
                of_real, of_wrong, critic.split
            )
        return terms

    def student_loss(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Terms:
        critic, (t_hat, _) = self.critic(), fake["look"]
        of_real = (
            critic(self._real(batch, fake), t_hat, batch.cond) if self.adversarial.paired else None
        )
        terms = {
            "adv": self.adversarial.student(
                critic(fake["maps"], t_hat, batch.cond), of_real, critic.split
            )
        }
        if self.distill_weight:
            target, weight = self.distill(self.teacher, fake["x0_hat"], batch.cond, generator)
            terms["distill"] = self.distill_weight * weighted_mse(fake["x0_hat"], target, weight)
        return terms

    @torch.no_grad()
    def _real(self, batch: Batch, seen: Fake) -> list[Tensor]:
        """Maps of the real sample under this look, made when first asked for and kept: both players may need them."""
        if "real" not in seen:
            t, noise = seen["look"]
            seen["real"], _ = self.see(batch.x0, t, noise, batch)
        return cast(list[Tensor], seen["real"])

    def _look(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t_hat [B] and noise [B, C, H, W] of one look of the discriminator."""
        t_hat = self.teacher.process.from_flow_time(
            self.renoise.sample(len(batch), self.step, generator)
        )
        return t_hat, noise_like(batch.x0, generator)
