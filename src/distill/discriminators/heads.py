"""Convolutional discriminator heads, one per tap, with projection on noise level and pooled text.

after StyleGAN-T, in 2-D:   h = block_1x1(norm(map))
                            h = (block_nxn(h) + h) / sqrt 2     # n: kernel
                            out = conv(h)
projection discriminator:   logit at each position = <out, c> / sqrt Q
                            c = linear([embedding of t, pooled text])

Q is the width of this projection, V that of the conditioning.
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
    """Heads that are all used in every iteration and never re-initialised."""

    def draw(self, generator: torch.Generator) -> Self:
        return self

    def refresh(
        self, generator: torch.Generator, applied: Tensor | None = None
    ) -> Sequence[nn.Parameter]:
        return ()


def concatenated(parts: Sequence[Tensor]) -> Logits:
    """Logits [B, K_k] of each head -> those of all heads, [B, K]."""
    return Logits(torch.cat(list(parts), dim=1), tuple(part.shape[1] for part in parts))


def by_frame(x: Tensor) -> Tensor:
    """Maps of videos [B, C, T, h, w] -> maps of their frames [B T, C, h, w]; maps of pictures stay.

    So heads with 2-D convolutions read videos. That they mix no frames is ours: the feature network
    has attended to all frames before. Frames put side by side into one map would meet at borders
    that no picture has, and 3-D convolutions would be other heads than those of the papers.
    """
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


def positions(x: Tensor, batch: int) -> Tensor:
    """What was computed `by_frame`, [B T, Q, h, w] -> [B, Q, T h w], with T = 1 for pictures."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)


class ConvHead(nn.Module):
    """One feature map [B, C, h, w] and conditioning [B, V] -> logits [B, h w].

    Of a video [B, C, T, h, w] -> [B, T h w].
    """

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
        normalise = spectral_norm if spectral else lambda module: module
        self.norm = nn.GroupNorm(1, channels) if norm_input else nn.Identity()
        self.enter = nn.Sequential(
            normalise(nn.Conv2d(channels, width, 1)), _norm(width), nn.LeakyReLU(0.2)
        )
        mix = normalise(nn.Conv2d(width, width, kernel, padding=kernel // 2))
        self.mix = nn.Sequential(mix, _norm(width), nn.LeakyReLU(0.2))
        self.out = normalise(nn.Conv2d(width, projection, 1))
        self.condition = nn.Linear(condition, projection)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.enter(self.norm(by_frame(x).contiguous()))
        h = (self.mix(h) + h) / math.sqrt(2)
        out = positions(self.out(h), len(x))  # [B, Q, h w]
        c = self.condition(condition)[:, :, None]
        return (out * c).sum(1) / math.sqrt(c.shape[1])


class ConvHeads(AllHeads):
    """Independent heads, one per tap: maps -> logits [B, K], K = sum of h_k w_k.

    Args:
        channels: channels of each tapped map.
        pooled: width P of the pooled text embedding; 0 for teachers without one.
        width: most hidden channels of a head; a map with fewer has a head of its own width. None:
            the width of the map.
        kernel: kernel size of the residual convolution.
        projection: width Q of the inner product with the conditioning.
        spectral: spectral norm on every convolution, as in StyleGAN-T.
        norm_input: normalise every map first; residual streams grow with depth.
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
        if type(self) is ConvHeads:  # a subclass may mix the samples of a batch
            # Spectral norm moves its estimate at every call.
            self.per_sample = not spectral
        self.embed_time = nn.Sequential(nn.Linear(TIME_FEATURES, TIME_FEATURES), nn.SiLU())
        options = {
            "kernel": kernel,
            "projection": projection,
            "spectral": spectral,
            "norm_input": norm_input,
        }
        heads = {
            k: ConvHead(c, TIME_FEATURES + pooled, width=min(c, width or c), **options)
            for k, c in channels.items()
        }
        self.heads = nn.ModuleDict({name.replace(".", "_"): head for name, head in heads.items()})

    def forward(self, maps: Sequence[Tensor], t: Tensor, cond: Cond) -> Logits:
        parts = [self.embed_time(_time_features(t))]
        if cond.pooled is not None:
            parts.append(cond.pooled)
        condition = torch.cat(parts, dim=1)
        heads_and_maps = zip(self.heads.values(), maps, strict=True)
        return concatenated([head(x, condition) for head, x in heads_and_maps])


def _time_features(t: Tensor) -> Tensor:
    """t [B] in [0, 1] -> sines and cosines [B, 64], with periods from 2 down to 1/32."""
    rates = 2.0 ** torch.linspace(0, 6, TIME_FEATURES // 2, device=t.device) * math.pi
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _norm(width: int) -> nn.GroupNorm:
    """Group norm: statistics per sample, so logits do not depend on the rest of the batch."""
    return nn.GroupNorm(math.gcd(8, width), width)
