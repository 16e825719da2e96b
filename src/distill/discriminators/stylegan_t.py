"""StyleGAN-T's discriminator heads (Sauer et al. 2023), as ADD uses them: one per tap of an image
network.

    h = block_1(tokens);  h = (block_9(h) + h) / sqrt 2;  out = conv_1(h)
    block_k: convolution, local norm, leaky ReLU
    logit of each token = <out, c> / sqrt 64,   c = linear([text, image])
    projection; without c, out is the logit

Convolutions run along the tokens, circular, with spectral norm. Heads compute in float32 whatever
autocast says: R1 squares small gradients.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from distill.core.limits import LOCAL_BATCH, check_local_batch
from distill.core.process import precise
from distill.core.types import Cond, Logits
from distill.discriminators.heads import AllHeads, side_by_side

PROJECTION = 64


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most LOCAL_BATCH samples, in training as in evaluation: no
    running statistics.

    x [B, C, N] -> [B, C, N]; mean and biased variance over the members and tokens of a group, per
    channel. Raises ValueError unless B divides into ceil(B / LOCAL_BATCH) equal groups. Logits so
    depend on the neighbours in a batch.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_local_batch(len(x), "data.batch_size")
        groups = math.ceil(len(x) / LOCAL_BATCH)
        parts = x.unflatten(0, (groups, -1))
        mean, variance = (
            parts.mean((1, 3), keepdim=True),
            parts.var((1, 3), unbiased=False, keepdim=True),
        )
        x = ((parts - mean) * (variance + self.eps).rsqrt()).flatten(0, 1)
        return x * self.weight[:, None] + self.bias[:, None]


class EqualisedLinear(nn.Linear):
    """Weights drawn from N(0, 1) and scaled by 1 / sqrt(inputs) when used, so that all learn at one
    rate.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


def _block(channels: int, kernel: int) -> nn.Sequential:
    # StyleGAN-T's convolution has a bias, which the norm behind it takes away again.
    convolution = nn.Conv1d(
        channels, channels, kernel, padding=kernel // 2, padding_mode="circular", bias=False
    )
    return nn.Sequential(spectral_norm(convolution), LocalBatchNorm(channels), nn.LeakyReLU(0.2))


class TokenHead(nn.Module):
    """Tokens [B, C, N] and condition [B, E] (E may be 0) -> logits [B, N]."""

    def __init__(self, channels: int, condition: int):
        super().__init__()
        self.enter, self.mix = _block(channels, 1), _block(channels, 9)
        self.out = spectral_norm(nn.Conv1d(channels, PROJECTION if condition else 1, 1))
        self.condition = EqualisedLinear(condition, PROJECTION) if condition else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.enter(x)
        out = self.out((self.mix(h) + h) / math.sqrt(2))
        if self.condition is None:
            return out[:, 0]
        return (out * self.condition(condition)[:, :, None]).sum(1) / math.sqrt(PROJECTION)


class StyleGANTHeads(AllHeads):
    """All heads side by side: maps [B, C_k, N] -> logits [B, K], K = sum of tokens over taps.

    Args:
        channels: width of each tapped map.
        pooled: width of the text embedding c_text, `Cond.pooled`; 0 for none.
        image: width of the image embedding c_img, `Cond.extra`; 0 for none.
    """

    def __init__(self, channels: Mapping[str, int], *, pooled: int = 0, image: int = 0):
        super().__init__()
        self.pooled, self.image = pooled, image
        self.heads = nn.ModuleDict(
            {name: TokenHead(c, pooled + image) for name, c in channels.items()}
        )

    def forward(self, maps: Sequence[Tensor], t: Tensor, cond: Cond) -> Logits:
        with torch.autocast(maps[0].device.type, enabled=False):
            wanted = [
                part
                for part, width in ((cond.pooled, self.pooled), (cond.extra, self.image))
                if width
            ]
            condition = (
                torch.cat([precise(part) for part in wanted], dim=1) if wanted else t[:, None]
            )
            pairs = zip(self.heads.values(), maps, strict=True)
            return side_by_side([head(precise(x), condition) for head, x in pairs])
