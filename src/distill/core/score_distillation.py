"""Score distillation, ADD's Eq. 4: the teacher's estimate of the renoised student sample is its
target.

L = E_t,eps  c(t) mean (x_hat - x_psi)^2        # over all values of a sample
x_t = alpha_t x_hat + sigma_t eps,  x_psi = teacher at stop_gradient(x_t)

exponential   c = alpha_t
sds           c = alpha_t / (2 sigma_t) w(t) with w = sigma_t^2; the gradient is then
              w(t) (eps_psi - eps)
nfsd          c = alpha_t, x_psi = x_hat - sigma_t / alpha_t (delta_D + delta_C)  (Katzir 2023)
              delta_C = s (eps_text - eps_empty)
              delta_D = eps_empty, minus eps_negative from t = 0.2 on
              without a negative caption eps_negative = eps_empty

NFSD's target is ours. Katzir et al. give a gradient, w(t) (delta_D + delta_C); ADD does not say how
it becomes the target of a squared error. Here x_psi is x_hat minus this gradient as a step in x0.
Unlike the other targets it does not approach x_hat for a good sample: on latents its loss is about
43 times that of `exponential` at one lambda.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.core.process import level_like, noise_like
from distill.core.transfers import host_values
from distill.core.types import Cond, Denoiser

Kind = Literal["exponential", "sds", "nfsd"]
KINDS = get_args(Kind)
# Below this t NFSD takes eps_empty for denoising alone: delta_D = eps_empty. Katzir et al. give it
# as step 200 of 1,000 of Stable Diffusion. The same number on a flow is ours: there the
# noise-to-data ratio at t = 0.2 is lower.
Scale = float | Tensor
"""A guidance scale: one number, or [B, 1, 1, 1]."""
LOW_NOISE = 0.2


@dataclass(frozen=True, eq=False)
class ScoreDraws:
    """Time t [B], guidance scale 1 or [B, 1, 1, 1] and noise [B, C, H, W] of the teacher's
    estimate.
    """

    t: Tensor
    scale: Scale
    eps: Tensor


@dataclass(frozen=True, kw_only=True)
class ScoreDistillation:
    """Draws t and noise, and computes the teacher's target for a student sample.

    Args:
        kind: exponential, sds or nfsd.
        guidance: guidance scale of the teacher: a value, or a range drawn from per sample; s in
            nfsd.
        steps: DDIM steps of the teacher from t to 0.
        low, high: range of t, inside (0, 1). At both ends the weight of sds, alpha sigma / 2, goes
            to 0. The factor sigma / alpha of nfsd's target diverges towards 1 where alpha_1 = 0. At
            t = 0 x_t holds no noise, so eps is undefined.
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
            what = "must be a number, or the lowest and highest of a range"
            raise ValueError(f"method.distill.guidance={list(ends)}: {what}")
        if not 0 < self.low < self.high < 1:
            raise ValueError(
                f"method.distill: t from low={self.low} to high={self.high} must lie inside (0, 1)"
            )

    def draw(self, x: Tensor, generator: torch.Generator) -> ScoreDraws:
        """Random numbers for samples of the shape of x [B, C, H, W]."""
        t, u = torch.rand(2, len(x), generator=generator, device=x.device)
        t = self.low + (self.high - self.low) * t
        one = isinstance(self.guidance, int | float)
        lowest, highest = (self.guidance, self.guidance) if one else self.guidance
        scale: Scale = (lowest + (highest - lowest) * u).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        if lowest == highest == 1:
            scale = 1.0  # no guidance: known without reading the tensor
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

        `negative` is the conditioning [B] on nfsd's negative caption.
        """
        t, scale = draws.t, draws.scale
        alpha, sigma = teacher.process.alpha(t), teacher.process.sigma(t)
        x_t = teacher.process.diffuse(x_hat, draws.eps, t)
        if self.kind == "nfsd":
            return _noise_free(teacher, x_hat, x_t, t, cond, negative, scale), alpha
        weight = alpha if self.kind == "exponential" else alpha / (2 * sigma) * sigma**2
        return _denoised(teacher, x_t, t, cond, scale, self.steps), weight


def guided_x0(teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Scale) -> Tensor:
    """The x0 prediction under classifier-free guidance, with one scale or [B, 1, 1, 1]. A scale
    that is known to be 1 without reading a device saves the unconditional half of the pass.

    It is equivalent to guidance of eps, because x0 is linear in eps.
    """
    if _is_one(scale):
        return teacher.x0(x_t, t, cond)
    both = Cond.cat([cond, cond.unconditional()])  # one pass of 2 B is cheaper than two of B
    conditional, empty = teacher.x0(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return empty + scale * (conditional - empty)


def _is_one(scale: Scale) -> bool:
    known = host_values(scale) if isinstance(scale, Tensor) else torch.tensor(scale)
    return known is not None and bool((known == 1).all())


def _denoised(
    teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Scale, steps: int
) -> Tensor:
    """x0 by DDIM from t to 0 in equal steps."""
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
    scale: Scale,
) -> Tensor:
    """x_psi of nfsd.

    sigma / alpha times a difference of eps is minus the difference of the x0 predictions. eps alone
    needs the conversion.
    """
    process = teacher.process
    conds = [cond, cond.unconditional(), *([negative] if negative is not None else [])]
    n = len(conds)
    ratio = (process.sigma(t) / process.alpha(t)).view(-1, *[1] * (x_hat.ndim - 1)).to(x_hat.dtype)
    estimates = teacher.x0(torch.cat([x_t] * n), t.repeat(n), Cond.cat(conds)).chunk(n)
    eps_text, eps_empty, *eps_negative = (process.from_x0(x0, x_t, t, "eps") for x0 in estimates)
    subtracted = eps_negative[0] if eps_negative else eps_empty
    delta_d = eps_empty - torch.where((t < LOW_NOISE).view(ratio.shape), 0.0, subtracted)
    return x_hat - ratio * (delta_d + scale * (eps_text - eps_empty))


@dataclass(frozen=True, kw_only=True)
class TeacherSamples:
    """Few-step samples of the teacher: the real samples where data are captions alone.

    Args:
        levels: noise levels t of its steps, falling from 1.
        guidance: classifier-free guidance scale; 1 for a teacher that was distilled itself.
        fresh: new noise between steps, for few-step models; False: DDIM (Euler on a flow).
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
        x_t, scale = noise, float(self.guidance)
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
