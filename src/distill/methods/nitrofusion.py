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
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distill.distillation import ScoreDistillation, ScoreDraws
from distill.engine import Parts
from distill.losses import Game, OverHeads, adversarial, verdicts, weighted_mse
from distill.methods.base import Distillation, Players
from distill.process import level_like, noise_like
from distill.times import Refinement
from distill.types import Batch, Maker, Streams, Terms, Times

LEAD = 100


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """x_T; levels of the student's steps, the last of them the one that learns, and the noise between; t* [B] and the
    noise there of fake and real; what the opening's distillation draws. All noise is [B, C, H, W]."""

    x_T: Tensor
    steps: list[float]
    between: list[Tensor]
    t: Tensor
    noise: Tensor
    real_noise: Tensor
    distill: ScoreDraws | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Fake:
    """The student's sample [B, C, H, W]; its maps and the real one's, where the heads are at work and ask for them."""

    x0_hat: Tensor
    maps: list[Tensor] | None = None
    real: list[Tensor] | None = None


class NitroFusion(Distillation):
    """
    Args:
        renoise: t*.
        mixed: whether every sample has a t* of its own, or the whole batch one.
        levels: for each number of steps n = 1, 2, ... the t of its steps.
        refine: the student step from which on n steps are trained, for n = 1, 2, ...; none of it: one step alone.
        keep: odds of one step once there are others; otherwise n, and which of its steps, are drawn evenly.
        shared: whether real and fake are noised to t* by one noise.
        loss: hinge, non_saturating or relativistic. over_heads: mean or sum of the heads' losses.
        opening: student steps before the adversarial ones.
        pairs_weight, distill, distill_weight: what makes them, regression and score distillation; 0 leaves one out.
    """

    space = "latents"  # what its discriminator looks at

    def __init__(
        self,
        parts: Parts,
        *,
        renoise: Times,
        mixed: bool = False,
        levels: Sequence[Sequence[float]] = ((1.0,),),
        refine: Sequence[int] = (0,),
        keep: float = 0.5,
        shared: bool = True,
        loss: Game = "hinge",
        over_heads: OverHeads = "mean",
        opening: int = 0,
        pairs_weight: float = 1.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        real: Maker | None = None,
    ):
        super().__init__(parts, real)
        self.renoise, self.mixed, self.shared = renoise, mixed, shared
        self.refinement = Refinement(levels, refine, keep)
        self.adversarial, self.opening = adversarial(loss, over_heads), opening
        self.pairs_weight, self.distill_weight = pairs_weight, distill_weight
        self.distill = distill or ScoreDistillation()

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        g, n = streams.sample, len(batch)
        x_T = noise_like(batch.x0, g) if batch.noise is None else batch.noise
        done, now = self.refinement.draw(self.step, self.common("steps"))
        between = [noise_like(batch.x0, g) for _ in done]
        noise = noise_like(batch.x0, g)
        t = self.renoise.sample(n if self.mixed else 1, self.step, self.common("t*")).expand(n)
        asked = self.distill_weight and self.step < self.opening
        return Draws(
            x_T=x_T,
            steps=[*done, now],
            between=between,
            t=t,
            noise=noise,
            real_noise=noise if self.shared else noise_like(batch.x0, streams.discriminator[0]),
            distill=self.distill.draw(batch.x0, streams.student) if asked else None,
        )

    def fake(self, batch: Batch, draws: Draws, players: Players = "both") -> Fake:
        x_t = draws.x_T
        with torch.no_grad():
            for (at, later), noise in zip(pairwise(draws.steps), draws.between, strict=True):
                x0 = self.student.x0(x_t, level_like(x_t, at), batch.cond)
                x_t = self.student.process.diffuse(x0, noise, level_like(x0, later))
        x0_hat = self.student.x0(x_t, level_like(x_t, draws.steps[-1]), batch.cond)
        if self.step < self.opening - LEAD:
            return Fake(x0_hat=x0_hat)
        maps, _ = self.see(x0_hat, draws.t, draws.noise, batch)
        if players == "student" and not self.adversarial.paired:
            return Fake(x0_hat=x0_hat, maps=maps)
        with torch.no_grad():
            real, _ = self.see(batch.x0, draws.t, draws.real_noise, batch)
        return Fake(x0_hat=x0_hat, maps=maps, real=real)

    def discriminator_loss(self, batch: Batch, draws: Draws, fake: Fake, turn: int = 0) -> Terms:
        if fake.maps is None or fake.real is None:
            return {}
        critic, t = self.critic(), draws.t
        of_real = critic(fake.real, t, batch.cond)
        of_fake = critic([m.detach() for m in fake.maps], t, batch.cond)
        self.record(**verdicts(of_real, of_fake, critic.split))
        return {"adv": self.adversarial.discriminator(of_real, of_fake, critic.split)}

    def student_loss(self, batch: Batch, draws: Draws, fake: Fake) -> Terms:
        if self.step < self.opening or fake.maps is None:
            return self._opening(batch, draws, fake.x0_hat)
        critic, t = self.critic(), draws.t
        of_real = None
        if self.adversarial.paired and fake.real is not None:
            of_real = critic(fake.real, t, batch.cond)
        of_fake = critic(fake.maps, t, batch.cond)
        return {"adv": self.adversarial.student(of_fake, of_real, critic.split)}

    def _opening(self, batch: Batch, draws: Draws, x0_hat: Tensor) -> Terms:
        terms = {}
        if self.pairs_weight:
            if batch.noise is None:
                what = "needs the noise of each sample: data.seeded=true, or make it 0"
                raise ValueError(f"method.pairs_weight {what}")
            terms["regression"] = self.pairs_weight * weighted_mse(x0_hat, batch.x0)
        if draws.distill:
            target, weight = self.distill(self.teacher, x0_hat.detach(), batch.cond, draws.distill)
            terms["distill"] = self.distill_weight * weighted_mse(x0_hat, target, weight)
        return terms
