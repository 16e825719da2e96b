"""Score distillation, ADD's Eq. 4: the student's sample, noised again, should be what the teacher
makes of it.

L = E_t,eps  c(t) |x_hat - x_psi|^2
x_t = alpha_t x_hat + sigma_t eps,  x_psi = teacher at stop_gradient(x_t)

exponential   c = alpha_t
sds           c = alpha_t / (2 sigma_t) w(t) with w = sigma_t^2; the gradient is then
              w(t) (eps_psi - eps)
nfsd          c = alpha_t, x_psi = x_hat - sigma_t / alpha_t (delta_D + delta_C)  (Katzir 2023)
              delta_C = s (eps_text - eps_empty)
              delta_D = eps_empty, less eps_negative above t = 0.2
              without a caption of bad pictures the empty one stands for it

NFSD's target is ours. Katzir et al. give a gradient, w(t) (delta_D + delta_C), and ADD does not say
how it becomes the target of a squared error; here it is the x_psi whose difference from x_hat is
that gradient as a step of x0. Nothing of it is small where x_hat is good, as the other targets'
differences are: on latents its loss is about 43 times that of `exponential` at one lambda.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.core.process import level_like, noise_like
from distill.core.types import Cond, Denoiser

Kind = Literal["exponential", "sds", "nfsd"]
KINDS = get_args(Kind)
SMALL = (
    0.2  # the t below which NFSD takes what the empty caption predicts for a wish to denoise alone
)


@dataclass(frozen=True, eq=False)
class ScoreDraws:
    """t [B], guidance [B, 1, 1, 1] and noise [B, C, H, W] at which the teacher is asked."""

    t: Tensor
    scale: Tensor
    eps: Tensor


@dataclass(frozen=True, kw_only=True)
class ScoreDistillation:
    """Draws t and noise, and says what the teacher makes of a sample.

    Args:
        kind: exponential, sds or nfsd.
        guidance: the teacher's, one value or a range to draw from for every sample; nfsd's s.
        steps: of the teacher, DDIM from t down.
        low, high: range of t; at its ends the weights of sds and nfsd grow without bound.
    """

    kind: Kind = "exponential"
    guidance: float | Sequence[float] = 1.0
    steps: int = 1
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"method.distill.kind={self.kind}: must be one of {', '.join(KINDS)}")
        if self.steps < 1 or (self.kind == "nfsd" and self.steps > 1):
            raise ValueError(f"method.distill.steps={self.steps}: at least 1, and 1 for nfsd")
        ends = [self.guidance] * 2 if isinstance(self.guidance, int | float) else self.guidance
        if len(ends) != 2 or not ends[0] <= ends[1]:
            what = "must be a number, or least and largest of a range"
            raise ValueError(f"method.distill.guidance={list(ends)}: {what}")
        if not 0 < self.low < self.high < 1:
            raise ValueError(
                f"method.distill: t from low={self.low} to high={self.high} must lie inside (0, 1)"
            )

    def draw(self, x: Tensor, generator: torch.Generator) -> ScoreDraws:
        """For samples of the shape of x [B, C, H, W]."""
        t, u = torch.rand(2, len(x), generator=generator, device=x.device)
        t = self.low + (self.high - self.low) * t
        least, most = (
            (self.guidance, self.guidance)
            if isinstance(self.guidance, int | float)
            else self.guidance
        )
        scale = (least + (most - least) * u).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return ScoreDraws(t, scale, noise_like(x, generator))

    @torch.no_grad()
    def __call__(
        self,
        teacher: Denoiser,
        x_hat: Tensor,
        cond: Cond,
        draws: ScoreDraws,
        negative: Cond | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x_hat [B, C, H, W] -> x_psi [B, C, H, W] and c [B]; neither has a gradient.

        `negative`, of B, is nfsd's.
        """
        t, scale = draws.t, draws.scale
        alpha, sigma = teacher.process.alpha(t), teacher.process.sigma(t)
        x_t = teacher.process.diffuse(x_hat, draws.eps, t)
        if self.kind == "nfsd":
            return _noise_free(teacher, x_hat, x_t, t, cond, negative, scale), alpha
        weight = alpha if self.kind == "exponential" else alpha / (2 * sigma) * sigma**2
        return _denoised(teacher, x_t, t, cond, scale, self.steps), weight


def guided_x0(teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Tensor:
    """Classifier-free guidance of the estimate, by one scale or [B, 1, 1, 1]; it is that of eps,
    both being linear.
    """
    if bool((scale == 1).all()):
        return teacher.x0(x_t, t, cond)
    both = Cond.cat([cond, cond.unconditional()])  # one pass of 2 B costs less than two of B
    told, empty = teacher.x0(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return empty + scale * (told - empty)


def _denoised(
    teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor, steps: int
) -> Tensor:
    """DDIM from t to 0 in equal steps."""
    x0 = guided_x0(teacher, x_t, t, cond, scale)
    for left in range(steps - 1, 0, -1):
        eps = teacher.process.from_x0(x0, x_t, t, "eps")
        t = t * left / (left + 1)
        x_t = teacher.process.diffuse(x0, eps, t)
        x0 = guided_x0(teacher, x_t, t, cond, scale)
    return x0


def _noise_free(
    teacher: Denoiser,
    x_hat: Tensor,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    negative: Cond | None,
    scale: Tensor,
) -> Tensor:
    """sigma / alpha times a difference of eps is the opposite difference of estimates; eps alone
    needs the estimate.
    """
    process, conds = (
        teacher.process,
        [cond, cond.unconditional(), *([negative] if negative is not None else [])],
    )
    ratio = (process.sigma(t) / process.alpha(t)).view(-1, *[1] * (x_hat.ndim - 1)).to(x_hat.dtype)
    x0 = teacher.x0(torch.cat([x_t] * len(conds)), t.repeat(len(conds)), Cond.cat(conds)).chunk(
        len(conds)
    )
    told, empty, *bad = (process.from_x0(guess, x_t, t, "eps") for guess in x0)
    domain = empty - torch.where((t < SMALL).view(ratio.shape), 0.0, bad[0] if bad else empty)
    return x_hat - ratio * (domain + scale * (told - empty))


@dataclass(frozen=True, kw_only=True)
class TeacherSamples:
    """What a teacher makes of noise in a few steps: the real samples where data are captions alone.

    Args:
        levels: t of its steps, falling from 1.
        guidance: classifier-free; 1 for a teacher that was distilled itself.
        fresh: noise anew between steps, as few-step models want it; otherwise DDIM (on a flow:
            Euler).
    """

    levels: Sequence[float] = (1.0, 0.75, 0.5, 0.25)
    guidance: float = 1.0
    fresh: bool = True

    def __post_init__(self) -> None:
        if (
            not self.levels
            or self.levels[0] != 1
            or not all(a > b for a, b in pairwise([*self.levels, 0.0]))
        ):
            raise ValueError(
                f"method.real.levels={list(self.levels)}: must fall from 1, and stay above 0"
            )

    @torch.no_grad()
    def __call__(
        self, teacher: Denoiser, noise: Tensor, cond: Cond, generator: torch.Generator
    ) -> Tensor:
        """Noise [B, C, H, W] -> samples of the same shape."""
        x_t, scale = noise, torch.tensor(float(self.guidance))
        for now, later in pairwise([*self.levels, 0.0]):
            t = level_like(noise, now)
            x0 = guided_x0(teacher, x_t, t, cond, scale)
            if later:
                eps = (
                    noise_like(x_t, generator)
                    if self.fresh
                    else teacher.process.from_x0(x0, x_t, t, "eps")
                )
                x_t = teacher.process.diffuse(x0, eps, level_like(noise, later))
        return x0
