"""NitroFusion: distillation by a dynamic pool of discriminator heads (Chen et al. 2024, arXiv 2412.02030).

    for c in prompts:
        x_T ~ N(0, I);  x0 = teacher(x_T, c) in several steps;  x0_hat = student(x_T, c) in one
        t* ~ {10, 250, 500, 750};  both noised to t*
        maps = encoder of the frozen teacher at t*, of the whole told c, of a patch told c, of the patch told nothing
        D_t* ~ pool:                  one head per map, drawn from those for this t*
        discriminator:  hinge(D_t*(real), D_t*(fake))                          # only the drawn heads learn
        student:        -D_t*(fake)
        about 1 % of the pool begins anew

The losses as printed cannot be meant: the discriminator's holds no fake, and the student's would lower its own logits.
Hinge is ours, with non-saturating and relativistic as options.

The student is to begin from weights that can do one step. Where there are none, the first `opening` steps make them, by
|x0_hat - x0|^2 on the pairs, as DMD2 prepares its one-step SDXL, or by ADD's Eq. 4, as DMD2 itself learns from the
teacher's score. The heads learn in the last LEAD of these.

Bottom-up refinement: from step refine[n - 1] on the student is also trained as the last of up to n steps. Steps before
it are its own, without gradient, and each begins where a sampler's does; the first of any n is the one-step student.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from distill.distillation import ScoreDistillation
from distill.losses import Game, adversarial, verdicts, weighted_mse
from distill.methods.base import Distillation, Fake
from distill.process import level_like, noise_like
from distill.types import Batch, Terms, Times

LEAD = 100


class NitroFusion(Distillation):
    """
    Args:
        renoise: t*.
        mixed: whether every sample has a t* of its own, or the whole batch one.
        levels: for each number of steps n = 1, 2, ... the t of its steps.
        refine: the student step from which on n steps are trained, for n = 1, 2, ...; none of it: one step alone.
        keep: odds of one step once there are others; otherwise n, and which of its steps, are drawn evenly.
        shared: whether real and fake are noised to t* by one noise.
        loss: hinge, non_saturating or relativistic.
        opening: student steps before the adversarial ones.
        pairs_weight, distill, distill_weight: what makes them, regression and score distillation; 0 leaves one out.
    """

    space = "latents"  # what its discriminator looks at

    def __init__(
        self,
        *,
        renoise: Times,
        mixed: bool = False,
        levels: Sequence[Sequence[float]] = ((1.0,),),
        refine: Sequence[int] = (0,),
        keep: float = 0.5,
        shared: bool = True,
        loss: Game = "hinge",
        opening: int = 0,
        pairs_weight: float = 1.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        **engine: Any,
    ):
        super().__init__(**engine)
        if [len(steps) for steps in levels] != list(range(1, len(levels) + 1)) or any(
            s[0] != 1 for s in levels
        ):
            raise ValueError(
                f"method.levels={levels}: must be 1, 2, ... levels for 1, 2, ... steps, each from 1 down"
            )
        if not 0 < len(refine) <= len(levels) or list(refine) != sorted(refine) or refine[0] != 0:
            raise ValueError(
                f"method.refine={list(refine)}: must rise from 0, at most one for each of method.levels"
            )
        self.renoise, self.levels, self.refine, self.keep = renoise, levels, refine, keep
        self.mixed, self.shared, self.adversarial, self.opening = (
            mixed,
            shared,
            adversarial(loss),
            opening,
        )
        self.pairs_weight, self.distill_weight = pairs_weight, distill_weight
        self.distill = distill or ScoreDistillation()

    def fake(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        x_t = noise_like(batch.x0, generator) if batch.noise is None else batch.noise
        done, now = self._place()
        with torch.no_grad():
            for at, later in pairwise([*done, now]):
                x0 = self.student.x0(x_t, level_like(x_t, at), batch.cond)
                x_t = self.student.process.diffuse(
                    x0, noise_like(x0, generator), level_like(x0, later)
                )
        x0_hat = self.student.x0(x_t, level_like(x_t, now), batch.cond)
        if self.step < self.opening - LEAD:
            return {"x0_hat": x0_hat}
        noise = noise_like(x0_hat, generator)
        return {
            "x0_hat": x0_hat,
            "noise": noise,
            "maps": self.see(x0_hat, self._level(x0_hat), noise, batch)[0],
        }

    def discriminator_loss(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Terms:
        if "maps" not in fake:
            return {}
        critic, t = self.critic(), self._level(batch.x0)
        of_real = critic(self._real(batch, fake, generator), t, batch.cond)
        of_fake = critic([m.detach() for m in fake["maps"]], t, batch.cond)
        self.record(**verdicts(of_real, of_fake, critic.split))
        return {"adv": self.adversarial.discriminator(of_real, of_fake, critic.split)}

    def student_loss(self, batch: Batch, fake: Fake, generator: torch.Generator) -> Terms:
        if self.step < self.opening:
            return self._opening(batch, fake["x0_hat"], generator)
        critic, t = self.critic(), self._level(batch.x0)
        of_real = (
            critic(self._real(batch, fake, generator), t, batch.cond)
            if self.adversarial.paired
            else None
        )
        return {
            "adv": self.adversarial.student(
                critic(fake["maps"], t, batch.cond), of_real, critic.split
            )
        }

    def _opening(self, batch: Batch, x0_hat: Tensor, generator: torch.Generator) -> Terms:
        terms = {}
        if self.pairs_weight:
            if batch.noise is None:
                raise ValueError(
                    "method.pairs_weight needs the noise of each sample: data.seeded=true, or make it 0"
                )
            terms["regression"] = self.pairs_weight * weighted_mse(x0_hat, batch.x0)
        if self.distill_weight:
            target, weight = self.distill(self.teacher, x0_hat.detach(), batch.cond, generator)
            terms["distill"] = self.distill_weight * weighted_mse(x0_hat, target, weight)
        return terms

    def _level(self, x: Tensor) -> Tensor:
        """t* of this iteration, for each of x [B, ...] -> [B]."""
        return self.renoise.sample(
            len(x) if self.mixed else 1, self.step, self.common("t*")
        ).expand(len(x))

    @torch.no_grad()
    def _real(self, batch: Batch, fake: Fake, generator: torch.Generator) -> list[Tensor]:
        """Maps of the teacher's samples, made when first asked for and kept."""
        if "real" not in fake:
            noise = fake["noise"] if self.shared else noise_like(batch.x0, generator)
            fake["real"], _ = self.see(batch.x0, self._level(batch.x0), noise, batch)
        return cast(list[Tensor], fake["real"])

    def _place(self) -> tuple[list[float], float]:
        """Levels of the steps that the student has behind it in this iteration, and of the one that it learns from."""
        most = sum(self.step >= start for start in self.refine)
        luck = torch.rand(3, generator=(g := self.common("steps")), device=g.device).tolist()
        n = 1 if luck[0] < self.keep else 1 + int(luck[1] * most)
        steps = list(self.levels[n - 1])
        i = int(luck[2] * n)
        return steps[:i], steps[i]
