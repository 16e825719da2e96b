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
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from distill.core.limits import check_buckets, check_falling, drawn_bucket
from distill.core.losses import weighted_mse
from distill.core.odds import check_range
from distill.core.process import column, level_like, noise_like, precise
from distill.core.randomness import uniform
from distill.core.times import ResolutionShift, Shift
from distill.core.transfers import host_values
from distill.core.types import Cond, Denoiser

Kind = Literal["exponential", "sds", "nfsd"]
KINDS = get_args(Kind)
Scale = float | Tensor
"""A guidance scale: one number, or [B, 1, 1, 1]."""
# Below this t NFSD takes eps_empty for denoising alone: delta_D = eps_empty. Katzir et al. give it
# as step 200 of 1,000 of Stable Diffusion. The same number on a flow is ours: there the
# noise-to-data ratio at t = 0.2 is lower.
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
        image_guidance: that of an editing teacher's source picture; not in nfsd.
        steps: DDIM steps of the teacher from t to 0.
        low, high: range of t, inside (0, 1). At both ends the weight of sds, alpha sigma / 2, goes
            to 0. The factor sigma / alpha of nfsd's target diverges towards 1 where alpha_1 = 0. At
            t = 0 x_t holds no noise, so eps is undefined.
    """

    kind: Kind = "exponential"
    guidance: float | Sequence[float] = 1.0
    image_guidance: float = 1.0
    steps: int = 1
    low: float = 0.02
    high: float = 0.98

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"method.distill.kind={self.kind}: must be one of {', '.join(KINDS)}")
        if self.image_guidance != 1 and self.kind == "nfsd":
            what = "nfsd has no guidance by a source picture; leave it out"
            raise ValueError(f"method.distill.image_guidance={self.image_guidance}: {what}")
        if self.steps < 1 or (self.kind == "nfsd" and self.steps > 1):
            raise ValueError(f"method.distill.steps={self.steps}: at least 1, and 1 for nfsd")
        ends = [self.guidance] * 2 if isinstance(self.guidance, int | float) else self.guidance
        if len(ends) != 2 or not ends[0] <= ends[1]:
            what = "must be a number, or the lowest and highest of a range"
            raise ValueError(f"method.distill.guidance={list(ends)}: {what}")
        check_range(self.low, self.high, "method.distill.", inside=True)

    def draw(self, x: Tensor, generator: torch.Generator) -> ScoreDraws:
        """Random numbers for samples of the shape of x [B, C, H, W]."""
        t, u = torch.rand(2, len(x), generator=generator, device=x.device)
        t = self.low + (self.high - self.low) * t
        one = isinstance(self.guidance, int | float)
        lowest, highest = (self.guidance, self.guidance) if one else self.guidance
        scale: Scale = column(lowest + (highest - lowest) * u, x).to(x.dtype)
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
        scales = (scale, self.image_guidance)
        return _denoised(teacher, x_t, t, cond, scales, self.steps), weight


def guided_x0(
    teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Scale, image_scale: float = 1.0
) -> Tensor:
    """The x0 prediction under classifier-free guidance, with one scale or [B, 1, 1, 1]. A scale
    that is known to be 1 without reading a device saves the unconditional half of the pass.

    It is equivalent to guidance of eps, because x0 is linear in eps. A teacher whose pipeline
    changes the guided prediction has a method `rescaled`, as `Network` has it.

    `image_scale` is that of an editing teacher's source picture, with three passes
    (InstructPix2Pix, arXiv 2211.09800, Eq. 3): nothing + s_I (source - nothing) + s_T (source and
    caption - source). At s_I = 1 this is the guidance by the caption alone. Raises ValueError for
    another s_I without a source.
    """
    if image_scale != 1:
        return _guided_by_both(teacher, x_t, t, cond, scale, image_scale)
    if _is_one(scale):
        return teacher.x0(x_t, t, cond)
    both = Cond.cat([cond, cond.unconditional()])  # one pass of 2 B is cheaper than two of B
    conditional, empty = teacher.x0(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    guided = empty + scale * (conditional - empty)
    rescaled = getattr(teacher, "rescaled", None)
    return guided if rescaled is None else rescaled(guided, conditional, x_t)


def _guided_by_both(
    teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scale: Scale, image_scale: float
) -> Tensor:
    if cond.image is None:
        what = "is for a teacher that edits; leave it out, or give such a teacher"
        raise ValueError(f"image_guidance={image_scale:g}: {what}")
    empty = cond.unconditional()
    nothing = replace(empty, image=torch.zeros_like(cond.image))
    three = Cond.cat([cond, empty, nothing])
    estimates = teacher.x0(torch.cat([x_t] * 3), t.repeat(3), three).chunk(3)
    of_both, of_source, of_nothing = estimates
    by_source = image_scale * (of_source - of_nothing)
    return of_nothing + by_source + scale * (of_both - of_source)


def distribution_matching(x: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """DMD's loss of student samples x [B, C, H, W], from the x0 predictions of two scores at the
    same x_t.

    Its gradient is that of the KL divergence, (x_fake - x_real) / mean |x - x_real|, with a mean of
    each sample (arXiv 2311.18828, Eq. 7 and 8); here divided by the number of values. As in the
    paper's code it is 1/2 mean (x - stop_gradient(x - gradient))^2.
    """
    with torch.no_grad():
        scale = precise(x - x_real).abs().flatten(1).mean(1)
        gradient = (x_fake - x_real) / column(scale.clamp_min(1e-8), x)
        target = x - gradient
    return weighted_mse(x, target) / 2


def _is_one(scale: Scale) -> bool:
    if not isinstance(scale, Tensor):
        return scale == 1
    known = host_values(scale)
    return known is not None and bool((known == 1).all())


def _denoised(
    teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond, scales: tuple[Scale, float], steps: int
) -> Tensor:
    """x0 by DDIM from t to 0 in equal steps, guided by the caption and by a source picture."""
    x0 = guided_x0(teacher, x_t, t, cond, *scales)
    for left in range(steps - 1, 0, -1):
        eps = teacher.process.from_x0(x0, x_t, t, "eps")
        t = t * left / (left + 1)
        x_t = teacher.process.diffuse(x0, eps, t)
        x0 = guided_x0(teacher, x_t, t, cond, *scales)
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
    ratio = column(process.sigma(t) / process.alpha(t), x_hat).to(x_hat.dtype)
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
        image_guidance: that of an editing teacher's source picture.
        fresh: new noise between steps, for few-step models; False: DDIM (Euler on a flow).
        buckets: sizes of the pictures, [width, height]; a micro-batch has one of them, the same on
            every rank. None: the teacher's own size.
        shares: of the buckets, as they are drawn; None: equal ones.
        shift: moves the levels with the size of the picture.
    """

    levels: Sequence[float] = (1.0, 0.75, 0.5, 0.25)
    guidance: float = 1.0
    fresh: bool = True
    buckets: Sequence[Sequence[int]] | None = None
    shares: Sequence[float] | None = None
    shift: Shift = None
    image_guidance: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", ResolutionShift.of(self.shift, "method.real.shift"))
        check_falling(self.levels, "method.real.levels")
        check_buckets(self.buckets, self.shares, "method.real.")

    def size(self, generator: torch.Generator) -> tuple[int, int] | None:
        """Width and height of the next pictures, drawn by share; None: the teacher's own size."""
        if self.buckets is None:
            return None
        return drawn_bucket(self.buckets, self.shares, uniform(1, generator, "bucket")[0])

    @torch.no_grad()
    def __call__(
        self, teacher: Denoiser, noise: Tensor, cond: Cond, generator: torch.Generator
    ) -> Tensor:
        """Noise [B, C, H, W] -> samples of the same shape."""
        x_t, scale = noise, float(self.guidance)
        shift = cast("ResolutionShift | None", self.shift)  # since __post_init__
        levels = shift.of_levels(self.levels, noise.shape) if shift else self.levels
        for now, later in pairwise([*levels, 0.0]):
            t = level_like(noise, now)
            x0 = guided_x0(teacher, x_t, t, cond, scale, self.image_guidance)
            if later:
                eps = (
                    noise_like(x_t, generator)
                    if self.fresh
                    else teacher.process.from_x0(x0, x_t, t, "eps")
                )
                x_t = teacher.process.diffuse(x0, eps, level_like(noise, later))
        return x0
