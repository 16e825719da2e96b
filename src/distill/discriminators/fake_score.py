"""DMD2's discriminator: a fake score, the denoiser of the student's samples, that is trained, and
heads on its features.

It starts as a copy of the teacher. Its middle is tapped, as in the paper: a UNet's mid block, or of
a transformer the last block of the first half (ours: the paper has UNets). A head reads this map by
convolutions that halve it:

    head:  [conv 4x4, stride 2 -> group norm -> SiLU] x layers -> conv 1x1 -> mean over positions

The paper's code ends with a convolution over all positions that are left, which needs pictures of
one size. The mean is ours.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.core.process import Prediction, Process
from distill.core.types import Cond, Logits
from distill.discriminators.heads import AllHeads, by_frame, concatenated, positions
from distill.discriminators.strided import strided

MIDDLE = "middle"
GROUPS = 32  # of the group norms, as in the paper's code, for its 1280 channels
NORM_CHANNELS = 16  # of a group, at least: norming few values leaves little but their signs


class FakeScore(nn.Module):
    """A trained denoiser, and a feature network at once. All of its weights learn.

    Args:
        teacher: the pipeline whose denoiser it starts as.
        taps: middle; or names of the teacher's taps. A pass for features ends at the last one.
        checkpointing: the backward pass computes the activations of blocks again.
    """

    space = "a fake score"

    def __init__(
        self, teacher: Any, *, taps: str | Sequence[str] = MIDDLE, checkpointing: bool = False
    ):
        super().__init__()
        named = list(teacher.encoder[-1:]) if taps == MIDDLE else taps
        self.taps = [named] if isinstance(named, str) else list(named)
        if not self.taps or set(self.taps) - set(teacher.channels):
            what = f"must be {MIDDLE}, or some of {', '.join(teacher.channels)}"
            raise ValueError(f"discriminator.features.taps={taps}: {what}")
        self.channels = {tap: teacher.channels[tap] for tap in self.taps}
        self.network = teacher.network.copy_of_base()
        if checkpointing:
            self.network.enable_checkpointing()

    @property
    def process(self) -> Process:
        return self.network.process

    @property
    def prediction(self) -> Prediction:
        return self.network.prediction

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x0 prediction [B, C, H, W] from x_t [B, C, H, W] at t [B]."""
        return self.network.x0(x_t, t, cond)

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Noised latents x [B, C, H, W] at t [B] -> maps [B, C_k, h_k, w_k]."""
        return self.network.features(x, t, cond, self.taps)


class Halving(nn.Module):
    """[B, C, h, w] -> [B, C', h / 2, w / 2], rounded up."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(math.gcd(GROUPS, width // NORM_CHANNELS, width) or 1, width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % 2 or width % 2:  # also a single position stays one
            x = F.pad(x, (0, width % 2, 0, height % 2))
        kernel, bias = self.convolution.weight, self.convolution.bias
        return F.silu(self.norm(strided(x, kernel, bias, stride=2, padding=1)))


class Classifier(nn.Module):
    """One feature map [B, C, h, w], of a video [B, C, T, h, w] -> one logit [B, 1]."""

    def __init__(self, channels: int, width: int, layers: int):
        super().__init__()
        widths = [channels, *[width] * layers]
        self.layers = nn.Sequential(*(Halving(*pair) for pair in pairwise(widths)))
        self.out = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = positions(self.out(self.layers(by_frame(x))), len(x))
        return logits.flatten(1).mean(1, keepdim=True)


class Classifiers(AllHeads):
    """Real or fake: one head for each map, with one logit. They are not conditioned; the fake score
    is.

    Args:
        channels: channels of each map.
        pooled: accepted and ignored.
        width: channels of the convolutions; None: those of the map, as in the paper's code.
        layers: number of the convolutions of stride 2.
    """

    per_sample = True  # group norm: a logit does not depend on the other samples

    def __init__(
        self,
        channels: Mapping[str, int],
        *,
        pooled: int = 0,
        width: int | None = None,
        layers: int = 3,
    ):
        super().__init__()
        if layers < 0 or (width is not None and width < 1):
            what = f"width={width} must be above 0, and layers={layers} not below"
            raise ValueError(f"discriminator.heads: {what}")
        heads = {name: Classifier(c, width or c, layers) for name, c in channels.items()}
        self.heads = nn.ModuleDict({name.replace(".", "_"): head for name, head in heads.items()})

    def forward(self, maps: Sequence[Tensor], t: Tensor, cond: Cond) -> Logits:
        """maps [B, C_k, h_k, w_k] -> logits [B, K] of K heads."""
        pairs = zip(self.heads.values(), maps, strict=True)
        return concatenated([head(x) for head, x in pairs])
