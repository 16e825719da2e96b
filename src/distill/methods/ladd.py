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

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.distillation import ScoreDistillation, ScoreDraws
from distill.engine import Parts
from distill.losses import (
    Game,
    OverHeads,
    adversarial,
    logits_for_r1,
    r1,
    verdicts,
    weighted_mse,
)
from distill.methods.base import Distillation, Players
from distill.process import noise_like
from distill.types import Batch, Critic, Maker, Streams, Terms, Times


@dataclass(frozen=True, eq=False)
class Look:
    """Where the discriminator reads a sample: t_hat [B] and noise [B, C, H, W]."""

    t: Tensor
    noise: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Level t [B] and noise [B, C, H, W] of the student's input; the looks at its sample and, one for each update of
    the discriminator, at the real one; what the distillation term draws."""

    t: Tensor
    noise: Tensor
    look: Look
    real_looks: tuple[Look, ...]
    distill: ScoreDraws | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Fake:
    """The student's sample [B, C, H, W] and its maps; those of the real one under the same look, where it is asked."""

    x0_hat: Tensor
    maps: list[Tensor]
    real: list[Tensor] | None


class LADD(Distillation):
    """
    Args:
        levels: student's noise levels, with their odds.
        renoise: levels t_hat at which the discriminator reads, on the scale of the rectified flow.
        shared: whether a real sample is re-noised by the t_hat and the noise of its fake.
        loss: hinge, non_saturating or relativistic. over_heads: mean or sum of the heads' losses.
        misaligned: weight of real samples under the next one's caption as further fakes, as SANA-Sprint has them.
        r1_weight: gamma of R1 on the heads' inputs; 0 leaves the term out.
        distill: what the teacher makes of x0_hat, and how much that counts: ADD's Eq. 4.
        distill_weight: lambda of that term, for real data; 0 leaves it out.
    """

    space = "latents"  # what its discriminator looks at

    def __init__(
        self,
        parts: Parts,
        *,
        levels: Times,
        renoise: Times,
        shared: bool = False,
        loss: Game = "hinge",
        over_heads: OverHeads = "mean",
        misaligned: float = 0.0,
        r1_weight: float = 0.0,
        distill: ScoreDistillation | None = None,
        distill_weight: float = 0.0,
        real: Maker | None = None,
    ):
        super().__init__(parts, real)
        self.levels, self.renoise = levels, renoise
        self.adversarial = adversarial(loss, over_heads)
        self.shared, self.misaligned, self.distill_weight = shared, misaligned, distill_weight
        self.r1_weight, self.distill = r1_weight, distill or ScoreDistillation()
        self.second_order = r1_weight > 0

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        t = self.levels.sample(len(batch), self.step, streams.sample)
        noise = noise_like(batch.x0, streams.sample)
        look = self._look(batch, streams.sample)
        looks = (look if self.shared else self._look(batch, g) for g in streams.discriminator)
        distill = self.distill.draw(batch.x0, streams.student) if self.distill_weight else None
        return Draws(t=t, noise=noise, look=look, real_looks=tuple(looks), distill=distill)

    def fake(self, batch: Batch, draws: Draws, players: Players = "both") -> Fake:
        x_t = self.begin(batch.x0, draws.noise, draws.t)
        x0_hat = self.student.x0(x_t, draws.t, batch.cond)
        maps, _ = self.see(x0_hat, draws.look.t, draws.look.noise, batch)
        of_pairs = self.adversarial.paired and players != "discriminator"
        asked = of_pairs or (self.shared and players != "student")
        real = self._maps(batch, draws.look) if asked else None
        return Fake(x0_hat=x0_hat, maps=maps, real=real)

    def discriminator_loss(self, batch: Batch, draws: Draws, fake: Fake, turn: int = 0) -> Terms:
        critic, look = self.critic(), draws.real_looks[turn]
        maps = fake.real if self.shared and fake.real else self._maps(batch, look)
        if self.r1_weight:
            of_real, maps = logits_for_r1(critic, maps, look.t, batch.cond)
        else:
            of_real = critic(maps, look.t, batch.cond)
        of_fake = critic([m.detach() for m in fake.maps], draws.look.t, batch.cond)
        self.record(**verdicts(of_real, of_fake, critic.split))
        terms = {"adv": self.adversarial.discriminator(of_real, of_fake, critic.split)}
        if self.r1_weight:
            terms["r1"] = self.r1_weight * r1(of_real, maps)
        if self.misaligned:
            terms["misaligned"] = self.misaligned * self._misaligned(batch, look, critic, of_real)
        return terms

    def student_loss(self, batch: Batch, draws: Draws, fake: Fake) -> Terms:
        critic, t_hat = self.critic(), draws.look.t
        of_real = None
        if self.adversarial.paired and fake.real is not None:
            of_real = critic(fake.real, t_hat, batch.cond)
        of_fake = critic(fake.maps, t_hat, batch.cond)
        terms = {"adv": self.adversarial.student(of_fake, of_real, critic.split)}
        if draws.distill:
            x0_hat = fake.x0_hat
            target, weight = self.distill(self.teacher, x0_hat.detach(), batch.cond, draws.distill)
            terms["distill"] = self.distill_weight * weighted_mse(x0_hat, target, weight)
        return terms

    def _misaligned(self, batch: Batch, look: Look, critic: Critic, of_real: Tensor) -> Tensor:
        """The discriminator's loss on real samples, as fakes, under the caption of the next one."""
        if len(batch) < 2:
            what = "there is no other caption; raise data.batch_size"
            raise ValueError(f"method.misaligned={self.misaligned}: {what}")
        wrong = replace(batch, cond=batch.cond.index(torch.arange(len(batch)).roll(1)))
        of_wrong = critic(self._maps(wrong, look), look.t, wrong.cond)
        return self.adversarial.against(of_real, of_wrong, critic.split)

    @torch.no_grad()
    def _maps(self, batch: Batch, look: Look) -> list[Tensor]:
        """Of the real sample."""
        return self.see(batch.x0, look.t, look.noise, batch)[0]

    def _look(self, batch: Batch, generator: torch.Generator) -> Look:
        t_hat = self.renoise.sample(len(batch), self.step, generator)
        return Look(self.teacher.process.from_flow_time(t_hat), noise_like(batch.x0, generator))
