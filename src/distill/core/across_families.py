"""Score distillation by a teacher of another family than the student's (ADD's Table 1e): it has
another autoencoder, other text encoders and, perhaps, pictures of another size.

    y = encode'(resize(decode(x0_hat)))                  # student's sample as the teacher's latents
    y_t = alpha'_t y + sigma'_t eps,  y_psi = teacher'(y_t, t, c')       # c': its own embeddings
    L_distill = c(t) mean (decode(x0_hat) - resize(decode'(y_psi)))^2         # Eq. 4, in pixels

A prime marks what is the other teacher's. The distance is of pixels, for which the paper chooses
this space: the two share no other. The target has passed the other autoencoder, so what that one
loses the target has lost too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core.limits import check_distillation
from distill.core.losses import weighted_mse
from distill.core.score_distillation import ScoreDistillation, ScoreDraws
from distill.core.types import Cond


@dataclass(frozen=True)
class AcrossFamilies:
    """Draws t and noise in the latents of `other`, a teacher of another family than `own`, the
    student's, and computes the loss in pixels.
    """

    distill: ScoreDistillation
    own: Any
    other: Any

    def shape(self, x0: Tensor) -> tuple[int, ...]:
        """(C, H, W) of the other teacher's latents for samples x0 [B, C, H, W] of the student: as
        many pixels as it was trained for, in this shape, to the nearest multiples of its unit.
        """
        height, width = self.own.sides_of(x0.shape)
        own_height, own_width = self.other.sides_of(self.other.latent_shape)
        scale, unit = math.sqrt(own_height * own_width / (height * width)), self.other.unit
        sides = [max(1, round(side * scale / unit)) * unit for side in (width, height)]
        return tuple(self.other.shape_of(sides, "score_teacher: its size"))

    def draw(self, x0: Tensor, generator: torch.Generator) -> ScoreDraws:
        """Random numbers for samples x0 [B, C, H, W] of the student."""
        return self.distill.draw(x0.new_empty((len(x0), *self.shape(x0))), generator)

    def loss(
        self, pixels: Tensor, captions: Sequence[str], draws: ScoreDraws, negative: str | None
    ) -> Tensor:
        """Eq. 4 of the student's pixels [B, 3, H, W]; `negative` is nfsd's negative caption."""
        target, c = self.target(pixels.detach(), captions, draws, negative)
        return weighted_mse(pixels, target, c)

    @torch.no_grad()
    def target(
        self, pixels: Tensor, captions: Sequence[str], draws: ScoreDraws, negative: str | None
    ) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] of the student's sample -> their target [B, 3, H, W] and c [B]."""
        other = self.other
        y = other.encode(resized(pixels, other.sides_of(draws.eps.shape)))
        cond, of_negative = other.embed(captions), avoided(other, negative, len(captions))
        y_psi, c = self.distill(other, y, cond, draws, of_negative)
        return resized(other.decode(y_psi), pixels.shape[-2:]), c


def across(
    method: Any, distill: ScoreDistillation, weight: float, space: str, crop: int | None
) -> AcrossFamilies | None:
    """The term of a method with a `score_teacher`; None for one without. Raises ValueError for
    options of the term that do not fit.
    """
    other = method.score_teacher
    check_distillation(weight, space, crop, across=other is not None)
    return None if other is None else AcrossFamilies(distill, method.teacher, other)


def avoided(teacher: Any, caption: str | None, count: int) -> Cond | None:
    """nfsd's negative caption, embedded by this teacher for `count` samples; None without one."""
    return None if caption is None else teacher.embed([caption] * count)


def resized(pixels: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Pixels [B, 3, H, W] with these sides, (height, width); the same ones if they have them."""
    if tuple(pixels.shape[-2:]) == tuple(sides):
        return pixels
    return F.interpolate(pixels, tuple(sides), mode="bilinear", antialias=True)
