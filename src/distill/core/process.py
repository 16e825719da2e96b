"""Noise processes, x_t = alpha(t) * x0 + sigma(t) * eps, and the one solve that turns any
prediction into x0.

Time `t` is a float tensor [B] in [0, 1]; 0 is data, 1 is noise. What is no such tensor raises
ValueError. Whatever a network predicts is linear in x0 and eps, pred = a * x0 + b * eps, with

    eps: (a, b) = (0, 1)    x0: (1, 0)    v: (-sigma, alpha)    flow: (-1, 1), that is eps - x0

so that with the equation of x_t there are two equations in two unknowns, and

    x0 = (b * x_t - sigma * pred) / (b * alpha - a * sigma).

Arithmetic is done in float32 at least, because in bfloat16 the differences above lose most digits;
results come back in the dtype of x.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["eps", "v", "x0", "flow"]


class Process(ABC):
    """A way from data to noise. Subclasses say alpha(t) and sigma(t); all else follows."""

    ends_in_noise: bool
    """Whether alpha(1) = 0, so that x_1 is pure noise."""

    @abstractmethod
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma [B] at checked t [B]."""

    @abstractmethod
    def from_flow_time(self, tau: Tensor) -> Tensor:
        """The t [B] with the noise-to-data ratio of the unshifted flow at tau [B]:
        sigma/alpha = tau/(1 - tau).

        Ratios beyond what the process reaches clamp to t = 1. It carries levels stated for SD3 over
        to any teacher.
        """

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at t [B] -> [B]."""
        return self._levels(t := _checked(t))[0].to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at t [B] -> [B]."""
        return self._levels(t := _checked(t))[1].to(t.dtype)

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x0, eps [B, ...], t [B] -> x_t [B, ...]."""
        alpha, sigma = self._columns(t, x0)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """What a network predicted at x_t [B, ...] -> the x0 [B, ...] it implies.

        Refuses eps where alpha(t) = 0.
        """
        alpha, sigma = self._columns(t, x_t)
        a, b = _coefficients(prediction, alpha, sigma)
        if prediction == "x0":  # already solved, and the quotient below would be 0 / 0 at sigma = 0
            return pred.to(x_t.dtype)
        # Looking at values makes a GPU wait, so do it only for the pair that can fail: v and flow
        # divide by alpha^2 + sigma^2 and alpha + sigma, and the usual eps networks never reach
        # alpha = 0.
        if prediction == "eps" and self.ends_in_noise and bool((alpha == 0).any()):
            what = (
                "an eps prediction says nothing about x0 where alpha(t) = 0, which is so at t = 1"
                " of this process"
            )
            raise ValueError(
                f"{what}; use a v, flow or x0 prediction, or a lower t (NitroFusion's timestep"
                " shift)"
            )
        return ((b * x_t - sigma * pred) / (b * alpha - a * sigma)).to(x_t.dtype)

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The inverse of `to_x0`: what to predict at x_t [B, ...] so as to mean x0.

        Refuses sigma(t) = 0.
        """
        alpha, sigma = self._columns(t, x_t)
        a, b = _coefficients(prediction, alpha, sigma)
        if prediction == "x0":
            return x0.to(x_t.dtype)
        if bool((sigma == 0).any()):
            raise ValueError(
                f"x_t holds no noise where sigma(t) = 0, so that {prediction} cannot be told; use"
                " t > 0"
            )
        return ((b * x_t - (b * alpha - a * sigma) * x0) / sigma).to(x_t.dtype)

    def _columns(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), shaped [B, 1, ...] to multiply x [B, ...], in float32 or in x's
        float64.
        """
        if t.ndim != 1 or len(t) != len(x):
            raise ValueError(
                f"t must have shape [{len(x)}] to go with x {list(x.shape)}, got {list(t.shape)}"
            )
        t = _checked(t).to(x.device, torch.promote_types(x.dtype, torch.float32))
        alpha, sigma = (
            level.to(t.dtype).view(-1, *[1] * (x.ndim - 1)) for level in self._levels(t)
        )
        return alpha, sigma


class RectifiedFlow(Process):
    """A straight path, alpha = 1 - sigma, with sigma = shift * t / (1 + (shift - 1) * t).

    A shift above 1 (SD3: 3) spends more of t at high noise, as larger images need; see arXiv
    2403.03206, section 5.3.2.
    """

    ends_in_noise = True

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}; 1 is the unshifted path")
        self.shift = float(shift)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        total = (
            1 - t
        ) + self.shift * t  # so written, both ends of the path are exact for every shift
        return (1 - t) / total, self.shift * t / total

    def from_flow_time(self, tau: Tensor) -> Tensor:
        tau = _checked(tau)
        return tau / (tau + self.shift * (1 - tau))


class VariancePreserving(Process):
    """The discrete-step process of Stable Diffusion, made continuous: alpha^2 + sigma^2 = 1.

    alphas_cumprod [T] is the training table (a diffusers scheduler has it under this name).
    t = (index + 1) / T names training step `index` exactly, t = 0 is clean, and in between
    alpha = sqrt(alphas_cumprod) is interpolated linearly. With zero_terminal_snr the table is first
    stretched so that the last step is pure noise (arXiv 2305.08891, Alg. 1).
    """

    def __init__(
        self, alphas_cumprod: Tensor | Sequence[float], zero_terminal_snr: bool = False
    ) -> None:
        table = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(
                "alphas_cumprod must be a list of at least two numbers, got shape"
                f" {list(table.shape)}"
            )
        if not (table[0] <= 1 and table[-1] >= 0 and (table.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod must fall strictly within [0, 1]; pass cumprod(1 - betas), not the"
                " betas"
            )
        alpha = table.sqrt()
        if zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        self.steps = len(alpha)
        self.ends_in_noise = bool(alpha[-1] == 0)
        self._alpha = torch.cat(
            [torch.ones(1, dtype=torch.float64), alpha]
        )  # [T + 1], entry k belongs to t = k / T
        self._moved: dict[torch.device, Tensor] = {}

    def from_flow_time(self, tau: Tensor) -> Tensor:
        tau = _checked(tau)
        # alpha falls with t; negated it rises, as searchsorted wants. alpha = (1 - tau) / |(1 -
        # tau, tau)|.
        rising = -self._table(tau.device)
        sought = -((1 - tau) / torch.hypot(1 - tau, tau)).to(rising.dtype)
        high = torch.searchsorted(rising, sought.contiguous()).clamp(1, self.steps)
        share = ((sought - rising[high - 1]) / (rising[high] - rising[high - 1])).clamp(0, 1)
        return ((high - 1 + share) / self.steps).to(tau.dtype)

    def index(self, t: Tensor) -> Tensor:
        """The training step nearest to t [B] -> long [B] in [0, T - 1]; what is below t = 1/T
        belongs to step 0.
        """
        return (_checked(t) * self.steps - 1).round().long().clamp(0, self.steps - 1)

    def time(self, index: Tensor) -> Tensor:
        """The t, float32, that names training step index, long [B] in [0, T - 1]."""
        return (index + 1).to(torch.float32) / self.steps

    def shifted(self, t: Tensor, shift: int) -> Tensor:
        """NitroFusion's t' [B]: training step floor(index * shift / T) in the place of that of t
        [B].
        """
        return self.time(self.index(t) * shift // self.steps)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """In the table's float64: 1 - alpha^2 cancels near the clean end."""
        table = self._table(t.device)
        position = t.to(table.dtype) * self.steps
        nearest = position.round()
        # A float32 t cannot say k / T exactly; within its resolution it means the step itself.
        on_step = (position - nearest).abs() <= self.steps * torch.finfo(torch.float32).eps
        position = torch.where(on_step, nearest, position).clamp(0, self.steps)
        low = position.long().clamp(max=self.steps - 1)
        alpha = torch.lerp(table[low], table[low + 1], position - low)
        return alpha, (1 - alpha.square()).sqrt()

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._moved:  # Apple's GPUs have no float64
            self._moved[device] = self._alpha.to(
                device, torch.float32 if device.type == "mps" else torch.float64
            )
        return self._moved[device]


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of x."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def seed_of(generator: torch.Generator) -> int:
    """A seed for `generator_like`: it stands in a record for numbers that are drawn where they are
    used.
    """
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def generator_like(x: Tensor, seed: int) -> torch.Generator:
    """A generator on the device of x that begins at this seed."""
    return torch.Generator(x.device).manual_seed(seed)


def level_like(x: Tensor, t: float) -> Tensor:
    """One t for all of x [B, ...] -> [B]."""
    return torch.full((len(x),), float(t), device=x.device)


Corner = Sequence[float]
"""The upper left of a square, as shares in [0, 1) of where it may be: rows, columns."""


def square(x: Tensor, side: int | None, corner: Corner | None, cell: int = 1) -> Tensor:
    """A square of side `cell * side` of x [B, C, H, W], or what there is of it; all of x if either
    is None.

    Its upper left lies at a multiple of `cell`. A picture with `cell` pixels a side for each latent
    is cut as its latents are.
    """
    if side is None or corner is None:
        return x
    for dim, share in zip((2, 3), corner, strict=True):
        cells = x.shape[dim] // cell
        size = min(side, cells)
        x = x.narrow(dim, cell * int(share * (cells - size + 1)), cell * size)
    return x


def precise(x: Tensor) -> Tensor:
    """x in float32, or in its own float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _checked(t: Tensor) -> Tensor:
    """t itself, in float32 at least, or an error for what is not a time in [0, 1]."""
    if not t.is_floating_point():
        raise ValueError(
            f"t must be float in [0, 1], got {t.dtype}; VariancePreserving.time converts step"
            " indices"
        )
    # On a GPU reading the values would stall every call; there the samplers of times.py answer for
    # the range.
    if t.device.type == "cpu" and len(t) and not (t.min() >= 0 and t.max() <= 1):
        raise ValueError(f"t must lie in [0, 1], got values from {t.min():.4g} to {t.max():.4g}")
    return precise(t)


def _coefficients(
    prediction: Prediction, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor | float, Tensor | float]:
    """a and b of pred = a * x0 + b * eps."""
    known: dict[str, tuple[Tensor | float, Tensor | float]]
    known = {"eps": (0.0, 1.0), "v": (-sigma, alpha), "x0": (1.0, 0.0), "flow": (-1.0, 1.0)}
    if prediction not in known:
        raise ValueError(f"prediction must be one of {', '.join(known)}, got {prediction!r}")
    return known[prediction]
