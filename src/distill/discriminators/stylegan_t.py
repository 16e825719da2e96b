"""StyleGAN-T's discriminator heads (Sauer et al. 2023), as used in ADD: one per tap of a vision
network.

    h = block_1(tokens);  h = (block_9(h) + h) / sqrt 2;  out = conv_1(h)
    block_k: convolution, local norm, leaky ReLU
    logit of each token = <out, c> / sqrt 64,   c = linear([text, image]) of V numbers
    without conditioning, out is the logit

Convolutions run along the tokens, circular, with spectral norm. Heads compute in float32, also
under autocast, because R1 squares small gradients.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from distill.core.limits import LOCAL_BATCH, check_local_batch
from distill.core.process import precise
from distill.core.types import Cond, Logits
from distill.discriminators.heads import AllHeads, concatenated

PROJECTION = 64


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most LOCAL_BATCH samples, without running statistics.

    x [B, C, N] -> [B, C, N]; mean and biased variance over the samples and tokens of a group, per
    channel, in training and in evaluation. Raises ValueError unless B splits into ceil(B /
    LOCAL_BATCH) equal groups. A sample's logits depend on its group.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        check_local_batch(len(x), "data.batch_size")
        groups = math.ceil(len(x) / LOCAL_BATCH)
        parts = x.unflatten(0, (groups, -1))
        mean = parts.mean((1, 3), keepdim=True)
        variance = parts.var((1, 3), unbiased=False, keepdim=True)
        x = ((parts - mean) * (variance + self.eps).rsqrt()).flatten(0, 1)
        return x * self.weight[:, None] + self.bias[:, None]


class EqualisedLinear(nn.Linear):
    """Weights from N(0, 1), scaled by 1 / sqrt(inputs) in the forward pass: an equalised learning
    rate.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / math.sqrt(self.in_features), self.bias)


def _block(channels: int, kernel: int) -> nn.Sequential:
    # StyleGAN-T's convolution has a bias, which the norm after it removes.
    convolution = nn.Conv1d(
        channels, channels, kernel, padding=kernel // 2, padding_mode="circular", bias=False
    )
    return nn.Sequential(spectral_norm(convolution), LocalBatchNorm(channels), nn.LeakyReLU(0.2))


class TokenHead(nn.Module):
    """Tokens [B, C, N] and conditioning [B, V] (V may be 0) -> logits [B, N]."""

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
    """All heads: maps [B, C_k, N] -> logits [B, K], K = sum of tokens over taps.

    Args:
        channels: channels of each tapped map.
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
            parts = [cond.pooled] if self.pooled else []
            parts += [cond.extra] if self.image else []
            # Heads without conditioning do not read it, so any tensor [B, 1] stands for none.
            condition = torch.cat([precise(p) for p in parts], dim=1) if parts else t[:, None]
            pairs = zip(self.heads.values(), maps, strict=True)
            return concatenated([head(precise(x), condition) for head, x in pairs])
