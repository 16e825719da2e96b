"""Noise processes x_t = alpha(t) * x0 + sigma(t) * eps, and the conversion of any prediction to x0.

Time `t` is a float tensor [B] in [0, 1]; 0 is data, 1 is noise. Anything else raises ValueError.
Every prediction is linear in x0 and eps, pred = a * x0 + b * eps, with

    eps: (a, b) = (0, 1)    x0: (1, 0)    v: (-sigma, alpha)    flow: (-1, 1), that is eps - x0

With the equation of x_t these are two equations in two unknowns, solved by

    x0 = (b * x_t - sigma * pred) / (b * alpha - a * sigma).

Arithmetic is in float32 or above, because in bfloat16 these differences lose most digits. Results
have the dtype of x.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distill.core.transfers import filled, host_values, on_host

Prediction = Literal["eps", "v", "x0", "flow"]


class Process(ABC):
    """Abstract: a path from data to noise. Subclasses define alpha(t) and sigma(t)."""

    ends_in_noise: bool
    """Whether alpha(1) = 0, so that x_1 is pure noise."""

    @abstractmethod
    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma [B] at valid t [B]."""

    @abstractmethod
    def from_flow_time(self, tau: Tensor) -> Tensor:
        """The t [B] at which sigma/alpha = tau/(1 - tau), the noise-to-data ratio of the unshifted
        flow.

        It converts noise levels stated for SD3 to any teacher. Ratios above those of the process
        give t = 1.
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
        """The x0 [B, ...] that a network's prediction at x_t [B, ...] implies.

        Raises ValueError for eps where alpha(t) = 0.
        """
        alpha, sigma = self._columns(t, x_t)
        a, b = _coefficients(prediction, alpha, sigma)
        if prediction == "x0":  # the quotient below would be 0 / 0 at sigma = 0
            return pred.to(x_t.dtype)
        # Checked only where the division can fail. v and flow divide by alpha^2 + sigma^2 and
        # alpha + sigma; most eps processes never reach alpha = 0.
        if prediction == "eps" and self.ends_in_noise and self._vanishes("alpha", t):
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
        """Inverse of `to_x0`: the prediction at x_t [B, ...] that implies x0.

        Raises ValueError where sigma(t) = 0.
        """
        alpha, sigma = self._columns(t, x_t)
        a, b = _coefficients(prediction, alpha, sigma)
        if prediction == "x0":
            return x0.to(x_t.dtype)
        if self._vanishes("sigma", t):
            raise ValueError(
                f"x_t holds no noise where sigma(t) = 0, and {prediction} is undefined; use t > 0"
            )
        return ((b * x_t - (b * alpha - a * sigma) * x0) / sigma).to(x_t.dtype)

    def _vanishes(self, name: Literal["alpha", "sigma"], t: Tensor) -> bool:
        """Whether alpha or sigma is 0 at one of t [B]; False where only a read of a device would
        say so. There the quotient is not finite, and neither is the gradient.
        """
        known = host_values(t)
        if known is None:
            return False
        return bool((self._levels(precise(known))[name == "sigma"] == 0).any())

    def _columns(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), broadcastable to x [B, ...], in float32, or float64 for a float64
        x.
        """
        if t.ndim != 1 or t.shape[0] != x.shape[0]:
            raise ValueError(
                f"t must have shape [{len(x)}] to go with x {list(x.shape)}, got {list(t.shape)}"
            )
        t = _checked(t).to(x.device, torch.promote_types(x.dtype, torch.float32))
        alpha, sigma = (column(level.to(t.dtype), x) for level in self._levels(t))
        return alpha, sigma


class RectifiedFlow(Process):
    """A straight path, alpha = 1 - sigma, with sigma = shift * t / (1 + (shift - 1) * t).

    A shift above 1 gives high noise more of t, for larger images: SD3 trains and samples 1024x1024
    with 3 (arXiv 2403.03206, section 5.3.2). It changes which times are visited, and not the path.
    The teachers' own process is therefore the unshifted one, whose t is the time that they are
    told; samplers may shift.
    """

    ends_in_noise = True

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}; 1 is the unshifted path")
        self.shift = float(shift)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        total = (1 - t) + self.shift * t  # exact at t = 0 and t = 1 for every shift
        return (1 - t) / total, self.shift * t / total

    def from_flow_time(self, tau: Tensor) -> Tensor:
        tau = _checked(tau)
        return tau / (tau + self.shift * (1 - tau))


class VariancePreserving(Process):
    """The discrete process of Stable Diffusion, made continuous: alpha^2 + sigma^2 = 1.

    alphas_cumprod [T] is the training table, under its name in diffusers. t = (index + 1) / T is
    exactly training step `index`, and t = 0 is clean. In between alpha = sqrt(alphas_cumprod) is
    interpolated linearly. With zero_terminal_snr the table is rescaled so that the last step is
    pure noise (arXiv 2305.08891, Alg. 1).
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
        clean = torch.ones(1, dtype=torch.float64)
        self._alpha = torch.cat([clean, alpha])  # [T + 1]; entry k is alpha at t = k / T
        self._on_device: dict[torch.device, Tensor] = {}

    def from_flow_time(self, tau: Tensor) -> Tensor:
        tau = _checked(tau)
        # searchsorted needs a rising table, so alpha is negated. The wanted alpha is
        # (1 - tau) / |(1 - tau, tau)|.
        rising = -self._table(tau.device)
        target = -((1 - tau) / torch.hypot(1 - tau, tau)).to(rising.dtype)
        high = torch.searchsorted(rising, target.contiguous()).clamp(1, self.steps)
        fraction = ((target - rising[high - 1]) / (rising[high] - rising[high - 1])).clamp(0, 1)
        return ((high - 1 + fraction) / self.steps).to(tau.dtype)

    def index(self, t: Tensor) -> Tensor:
        """The training step nearest to t [B] -> long [B] in [0, T - 1]; t < 1/T gives 0."""
        return (_checked(t) * self.steps - 1).round().long().clamp(0, self.steps - 1)

    def time(self, index: Tensor) -> Tensor:
        """t, float32, of training step index, long [B] in [0, T - 1]."""
        return (index + 1).to(torch.float32) / self.steps

    def shifted(self, t: Tensor, shift: int) -> Tensor:
        """NitroFusion's shifted time [B]: training step floor(index * shift / T) replaces that of t
        [B].
        """
        return self.time(self.index(t) * shift // self.steps)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """In the table's float64: 1 - alpha^2 cancels near the clean end."""
        table = self._table(t.device)
        position = t.to(table.dtype) * self.steps
        nearest = position.round()
        # float32 cannot represent k / T exactly; a t within its resolution is that step.
        on_step = (position - nearest).abs() <= self.steps * torch.finfo(torch.float32).eps
        position = torch.where(on_step, nearest, position).clamp(0, self.steps)
        low = position.long().clamp(max=self.steps - 1)
        alpha = torch.lerp(table[low], table[low + 1], position - low)
        return alpha, (1 - alpha.square()).sqrt()

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._on_device:  # Apple's GPUs have no float64
            self._on_device[device] = self._alpha.to(
                device, torch.float32 if device.type == "mps" else torch.float64
            )
        return self._on_device[device]


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the shape, dtype and device of x."""
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def generator_like(x: Tensor, seed: int) -> torch.Generator:
    """A generator on the device of x with this seed; meta tensors have that of the CPU."""
    return torch.Generator("cpu" if x.is_meta else x.device).manual_seed(seed)


def column(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] with as many dimensions as x [B, ...], to broadcast over a sample's own."""
    return values.view(-1, *[1] * (x.ndim - 1))


def level_like(x: Tensor, t: float) -> Tensor:
    """One t for all of x [B, ...] -> [B]."""
    return filled(len(x), float(t), x.device)


Corner = Sequence[float]
"""Upper left corner of a crop (row, column), each a fraction in [0, 1) of the valid range."""


def square(x: Tensor, side: int | None, corner: Corner | None, cell: int = 1) -> Tensor:
    """A square crop of side `cell * side` of x [B, C, H, W], smaller where x is; x if side or
    corner is None.

    Its upper left is a multiple of `cell`, so an image with `cell` pixels per latent and its
    latents give the same crop.
    """
    if side is None or corner is None:
        return x
    for dim, fraction in zip((2, 3), corner, strict=True):
        cells = x.shape[dim] // cell
        size = min(side, cells)
        x = x.narrow(dim, cell * int(fraction * (cells - size + 1)), cell * size)
    return x


def precise(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _checked(t: Tensor) -> Tensor:
    """t in float32 or above. Raises ValueError for a tensor that is no time in [0, 1]."""
    if not t.is_floating_point():
        raise ValueError(
            f"t must be float in [0, 1], got {t.dtype}; VariancePreserving.time converts step"
            " indices"
        )
    # Reading the values would synchronise a GPU in every call; there times.py ensures the range.
    if on_host(t) and len(t) and not (t.min() >= 0 and t.max() <= 1):
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
