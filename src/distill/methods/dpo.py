"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908): tunes a model to a preference.

LADD's paper does it before the distillation, and adds the same LoRA to its student afterwards.

    for winner x_w, loser x_l, caption c in the pairs:
        t ~ times, eps ~ N(0, I)                       # shared by both pictures
        e(x) = mean (target - prediction(x_t, t, c))^2   # of the student; e_ref: of the reference
        student:  -log sigmoid(-beta / 2 [(e(x_w) - e_ref(x_w)) - (e(x_l) - e_ref(x_l))])

The reference is the teacher: of a LoRA student the same network without its adapters. Prediction
and target are what the network predicts, eps, v or flow. At a given x_t each is a linear function
of eps, so the squared errors are one quantity up to a weight that depends on t alone:

    |v - v'|^2 = |eps - eps'|^2 / alpha_t^2        flow: the same, with its own alpha_t = 1 - t

The paper leaves the weight of a level open, and its code takes 1 for eps. Ours is 1 for each of
them, the weight of the family's own training. Means, not sums, over the values of a sample, and the
factor of one half, are the paper's code's: in Eq. 14, with sums, beta T is beta / (2 C H W).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.process import noise_like
from distill.core.randomness import Streams, levels_like
from distill.core.types import Batch, Cond, Losses, Players, Times
from distill.methods.base import Distillation, Loop, Phase

WANTED = "method=dpo learns from pairs of a winner and a loser"


@dataclass(frozen=True, eq=False, kw_only=True)
class Draws:
    """Everything decided before this iteration's forward passes; shared by both of a pair."""

    t: Tensor  # noise level [B]
    noise: Tensor  # [B, C, H, W]


@dataclass(frozen=True, eq=False, kw_only=True)
class StudentSample:
    """x0 predictions of the winners, then of the losers, all [2 B, C, H, W]."""

    x0_hat: Tensor
    reference: Tensor
    x0: Tensor  # the pictures themselves
    x_t: Tensor  # noised


class DPO(Distillation):
    """Trains the student to prefer the winners more than its teacher does.

    Args:
        beta: how much the student is held to the reference.
        times: noise levels t of a pair.
    """

    space = "nothing"  # it has no discriminator
    many_steps = True  # its student samples as its teacher does
    of_pairs = True  # its data are pairs of a winner and a loser

    def __init__(
        self,
        players: Players,
        *,
        beta: float = 5000.0,
        times: Times,
        loop: Loop | None = None,
    ):
        super().__init__(players, loop=loop)
        if not beta > 0:
            raise ValueError(f"method.beta={beta}: must be above 0")
        self.beta, self.times = float(beta), times

    @torch.no_grad()
    def prepare_batch(
        self,
        batch: Mapping[str, Any],
        generator: torch.Generator,
        common: torch.Generator | None = None,
    ) -> Batch:
        made = super().prepare_batch(batch, generator, common)
        if "loser_x0" in batch:
            return replace(made, loser=batch["loser_x0"])
        if "loser_pixels" in batch:
            return replace(made, loser=self.teacher.encode(batch["loser_pixels"]))
        raise ValueError(f"{WANTED}, and these data have no losers; give some by data=preference")

    def draw(self, batch: Batch, streams: Streams) -> Draws:
        t = levels_like(batch.x0, self.times, streams.step, streams.sample)
        return Draws(t=t, noise=noise_like(batch.x0, streams.sample))

    def student_sample(self, batch: Batch, draws: Draws, phase: Phase = "both") -> StudentSample:
        assert batch.loser is not None
        x0, cond = torch.cat([batch.x0, batch.loser]), Cond.cat([batch.cond, batch.cond])
        t, noise = draws.t.repeat(2), torch.cat([draws.noise] * 2)
        x_t = self.teacher.process.diffuse(x0, noise, t)
        with torch.no_grad():
            reference = self.teacher.x0(x_t, t, cond)
        x0_hat = self.student.x0(x_t, t, cond)
        return StudentSample(x0_hat=x0_hat, reference=reference, x0=x0, x_t=x_t)

    def student_loss(self, batch: Batch, draws: Draws, sample: StudentSample) -> Losses:
        errors = (self._errors(x0, draws, sample) for x0 in (sample.x0_hat, sample.reference))
        of_student, of_reference = errors
        winner, loser = (of_student - of_reference).chunk(2)
        logit = -self.beta / 2 * (winner - loser)
        with torch.no_grad():
            metrics = {
                "pairs/preferred": (logit > 0).float().mean() + (logit == 0).float().mean() / 2,
                "pairs/winner_error": winner.mean(),
                "pairs/loser_error": loser.mean(),
            }
        return Losses({"dpo": -F.logsigmoid(logit).mean()}, metrics)

    def _errors(self, x0_hat: Tensor, draws: Draws, sample: StudentSample) -> Tensor:
        """Mean squared error of the prediction that x0_hat implies -> [2 B]."""
        process, kind, t = self.teacher.process, self.teacher.prediction, draws.t.repeat(2)
        predicted, target = (process.from_x0(x0, sample.x_t, t, kind) for x0 in (x0_hat, sample.x0))
        errors: Tensor = (predicted - target).square().mean(tuple(range(1, target.ndim)))
        return errors
