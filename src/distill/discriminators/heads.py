"""Convolutional discriminator heads, one per tap, projected on noise level and pooled text.

after StyleGAN-T, in 2-D:   h = block_1x1(norm(map))
                            h = (block_kxk(h) + h) / sqrt 2
                            out = conv(h)
projection discriminator:   logit at each place = <out, c> / sqrt P
                            c = linear([embedding of t, pooled text])
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from distill.core.types import Cond, Logits

TIME_FEATURES = 64


class AllHeads(nn.Module):
    """Heads that all answer in every iteration, and stay."""

    def draw(self, generator: torch.Generator) -> Self:
        return self

    def refresh(self, generator: torch.Generator) -> Sequence[nn.Parameter]:
        return ()


def side_by_side(parts: Sequence[Tensor]) -> Logits:
    """Logits [B, K_k] of each head -> all of them, [B, K]."""
    return Logits(torch.cat(list(parts), dim=1), tuple(part.shape[1] for part in parts))


class ConvHead(nn.Module):
    """One map [B, C, h, w] and condition [B, E] -> logits [B, h w]."""

    def __init__(
        self,
        channels: int,
        condition: int,
        *,
        width: int,
        kernel: int,
        projection: int,
        spectral: bool,
        norm_input: bool,
    ):
        super().__init__()
        limit = spectral_norm if spectral else lambda module: module
        self.norm = nn.GroupNorm(1, channels) if norm_input else nn.Identity()
        self.enter = nn.Sequential(
            limit(nn.Conv2d(channels, width, 1)), _norm(width), nn.LeakyReLU(0.2)
        )
        mix = limit(nn.Conv2d(width, width, kernel, padding=kernel // 2))
        self.mix = nn.Sequential(mix, _norm(width), nn.LeakyReLU(0.2))
        self.out = limit(nn.Conv2d(width, projection, 1))
        self.condition = nn.Linear(condition, projection)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.enter(self.norm(x.contiguous()))
        h = (self.mix(h) + h) / math.sqrt(2)
        out = self.out(h).flatten(2)  # [B, P, h w]
        c = self.condition(condition)[:, :, None]
        return (out * c).sum(1) / math.sqrt(c.shape[1])


class ConvHeads(AllHeads):
    """Independent heads, one per tap. All logits side by side: maps -> [B, K], K = sum of h_k w_k.

    Args:
        channels: width of each tapped map.
        pooled: width P of the pooled text embedding; 0 where the teacher has none.
        width: hidden channels; None keeps the map's own.
        kernel: size of the residual convolution.
        projection: width of the inner product with the condition.
        spectral: spectral norm on every convolution (StyleGAN-T has it).
        norm_input: bring every tapped map to unit scale first; residual streams grow with depth.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        *,
        pooled: int,
        width: int | None = None,
        kernel: int = 3,
        projection: int = 64,
        spectral: bool = True,
        norm_input: bool = True,
    ):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0 or projection < 1 or (width is not None and width < 1):
            what = f"kernel={kernel} must be odd, projection={projection} and width={width} above 0"
            raise ValueError(f"discriminator.heads: {what}")
        self.embed_time = nn.Sequential(nn.Linear(TIME_FEATURES, TIME_FEATURES), nn.SiLU())
        how = {
            "kernel": kernel,
            "projection": projection,
            "spectral": spectral,
            "norm_input": norm_input,
        }
        heads = {
            k: ConvHead(c, TIME_FEATURES + pooled, width=c if width is None else width, **how)
            for k, c in channels.items()
        }
        self.heads = nn.ModuleDict({name.replace(".", "_"): head for name, head in heads.items()})

    def forward(self, maps: Sequence[Tensor], t: Tensor, cond: Cond) -> Logits:
        parts = [self.embed_time(_waves(t))]
        if cond.pooled is not None:
            parts.append(cond.pooled)
        condition = torch.cat(parts, dim=1)
        pairs = zip(self.heads.values(), maps, strict=True)
        return side_by_side([head(x, condition) for head, x in pairs])


def _waves(t: Tensor) -> Tensor:
    """t [B] in [0, 1] -> sines and cosines [B, 64] with periods from 2 down to 1/64, a scale a
    half-octave.
    """
    rates = 2.0 ** torch.linspace(0, 6, TIME_FEATURES // 2, device=t.device) * math.pi
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _norm(width: int) -> nn.GroupNorm:
    """Statistics per sample, so that logits of one sample do not depend on its neighbours in the
    batch.
    """
    return nn.GroupNorm(math.gcd(8, width), width)
