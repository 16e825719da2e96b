"""A GAN's generator of StyleGAN-T's kind (Sauer et al. 2023, arXiv 2301.09515), small, of latents.

    z = cell means of the noise x_1, of unit variance;  w = [mapping(z), caption]
    h = a learned constant;  at each resolution, from the coarsest:
        h = convolution(upsampled h, w), then  h = h + scale * two convolutions(norm(h), w)
        x0 = upsampled x0 + projection(h, w)
    convolution: weights modulated by the style of w and demodulated (StyleGAN2), noise, leaky ReLU
    style = a(w) b(w) + c(w), of three affine maps

It is a diffusers model that SD3's pipeline can call: it returns the velocity v = x_1 - x0, so that
one step from pure noise gives x0. It knows no other noise level, and ignores the time.

Ours: z is no draw of its own, because the noise of a picture is all that a sampler draws. The noise
of a convolution is x_1 too, averaged to its resolution. Weights are initialised at 1 / sqrt(inputs)
and not scaled in the forward pass, so that learning rates are those of other students.
"""

import math
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional

from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.network import Network

PART = ("distill.teachers.generator", "StyleGenerator")  # in the index of a pipeline
COARSEST = 4  # StyleGAN's: smallest side of the learned constant
GAIN = math.sqrt(2)  # of a leaky ReLU: keeps the variance
EPS = 1e-8


def normalised(x: Tensor) -> Tensor:
    """x [B, N] with a mean square of 1 in each row, in float32."""
    x = x.float()
    return x * (x.square().mean(1, keepdim=True) + EPS).rsqrt()


class Linear(nn.Linear):
    """An affine map with weights of standard deviation 1 / sqrt(inputs) and biases of 0."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.bias)


class Style(nn.Module):
    """w [B, V] -> the scales of channels [B, C], a(w) b(w) + c(w), around 1 at the start."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.affine = Linear(width, 3 * channels)
        nn.init.ones_(self.affine.bias[2 * channels :])

    def forward(self, w: Tensor) -> Tensor:
        a, b, c = self.affine(w).float().chunk(3, dim=1)
        return a * b + c


class ModulatedConvolution(nn.Module):
    """A convolution whose input channels are scaled by the style of w; x [B, C, h, w], w [B, V].

    With `demodulate` the outputs of unit-variance inputs have unit variance again.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, width: int, demodulate: bool = True):
        super().__init__()
        std = 1 / math.sqrt(inputs * kernel**2)
        self.weight = nn.Parameter(std * torch.randn(outputs, inputs, kernel, kernel))
        self.style, self.demodulate = Style(width, inputs), demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.style(w)
        scaled = x * style.to(x.dtype)[:, :, None, None]
        y = functional.conv2d(scaled, self.weight, padding=self.weight.shape[-1] // 2)
        if not self.demodulate:
            return y
        # Not as a matrix product, which autocast would compute in bfloat16.
        squares = self.weight.float().square().sum((2, 3))
        variance = (squares * style.square()[:, None]).sum(2)
        return y * (variance + EPS).rsqrt().to(y.dtype)[:, :, None, None]


class StyledLayer(nn.Module):
    """Modulated convolution, the picture's noise with learned weights that start at 0, bias,
    leaky ReLU.
    """

    def __init__(self, inputs: int, outputs: int, noise: int, width: int):
        super().__init__()
        self.convolution = ModulatedConvolution(inputs, outputs, 3, width)
        self.noise = nn.Conv2d(noise, outputs, 1)
        nn.init.zeros_(self.noise.weight)
        nn.init.zeros_(self.noise.bias)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        y = self.convolution(x, w) + self.noise(noise)
        return functional.leaky_relu(y, 0.2) * GAIN


class ResidualBlock(nn.Module):
    """h + scale * two styled layers of the normalised h, as in StyleGAN-T."""

    def __init__(self, channels: int, noise: int, width: int, layer_scale: float):
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(32, channels), channels)
        self.first = StyledLayer(channels, channels, noise, width)
        self.second = StyledLayer(channels, channels, noise, width)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def forward(self, h: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        return h + self.scale * self.second(self.first(self.norm(h), w, noise), w, noise)


class Resolution(nn.Module):
    """All layers at one resolution: h [B, C, h, w] -> h, and its share of the latents."""

    def __init__(self, channels: int, noise: int, width: int, blocks: int, layer_scale: float):
        super().__init__()
        self.enter = StyledLayer(channels, channels, noise, width)
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, noise, width, layer_scale) for _ in range(blocks)
        )
        self.project = ModulatedConvolution(channels, noise, 1, width, demodulate=False)

    def forward(self, h: Tensor, w: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        h = self.enter(h, w, noise)
        for block in self.blocks:
            h = block(h, w, noise)
        return h, self.project(h, w)


class StyleGenerator(ModelMixin, ConfigMixin):
    """Noise [B, C, H, W] and a pooled caption [B, P] -> the velocity noise - x0 [B, C, H, W].

    Args:
        in_channels, sample_size: C, and H = W of the latents.
        pooled_projection_dim: P. channels: of the layers. blocks: residual blocks a resolution.
        mapping_layers, mapping_width: of the mapping network of z.
        layer_scale: of the residual blocks at the start.
        joint_attention_dim, patch_size: width of a caption's token, and 1; not used here, but SD3's
            pipeline reads them of its transformer.
    """

    _no_split_modules = ("Resolution",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        sample_size: int = 16,
        pooled_projection_dim: int = 256,
        joint_attention_dim: int = 256,
        channels: int = 96,
        blocks: int = 1,
        mapping_layers: int = 2,
        mapping_width: int = 128,
        layer_scale: float = 1e-5,
        patch_size: int = 1,
    ):
        super().__init__()
        side = coarsest(sample_size)
        resolutions = 1 + int(math.log2(sample_size // side))
        self.constant = nn.Parameter(torch.randn(1, channels, side, side))
        widths = [in_channels * side**2, *[mapping_width] * mapping_layers]
        self.mapping = nn.ModuleList(map(Linear, widths[:-1], widths[1:]))
        width = widths[-1] + pooled_projection_dim
        self.resolutions = nn.ModuleList(
            Resolution(channels, in_channels, width, blocks, layer_scale)
            for _ in range(resolutions)
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As of `SD3Transformer2DModel`; only noise and pooled caption are read."""
        assert pooled_projections is not None
        velocity = hidden_states - self.generate(hidden_states, pooled_projections)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def generate(self, noise: Tensor, pooled: Tensor) -> Tensor:
        """Noise [B, C, H, W], pooled caption [B, P] -> x0 [B, C, H, W].

        Raises ValueError for latents of another size than that of its constant.
        """
        expected = (self.config.in_channels, *[self.config.sample_size] * 2)
        if tuple(noise.shape[1:]) != expected:
            what = f"makes latents {list(expected)} alone, not {list(noise.shape[1:])}"
            raise ValueError(f"this generator {what}; leave the size out")
        noises = [self._averaged(noise, 2**k) for k in range(len(self.resolutions))][::-1]
        w = self._style(noises[0].flatten(1), pooled).to(noise.dtype)
        h = self.constant.expand(len(noise), -1, -1, -1)
        x0: Any = 0.0
        for i, (resolution, at) in enumerate(zip(self.resolutions, noises, strict=True)):
            h, share = resolution(h if i == 0 else doubled(h), w, at)
            x0 = share if i == 0 else doubled(x0) + share
        return x0.to(noise.dtype)

    def _style(self, z: Tensor, pooled: Tensor) -> Tensor:
        """w [B, V] from z and the caption, which goes past the mapping as in StyleGAN-T."""
        found = normalised(z).to(z.dtype)
        for layer in self.mapping:
            found = functional.leaky_relu(layer(found), 0.2) * GAIN
        return torch.cat([found.float(), normalised(pooled)], dim=1)

    @staticmethod
    def _averaged(noise: Tensor, cell: int) -> Tensor:
        """Means of cells of this side, of unit variance like the noise."""
        return functional.avg_pool2d(noise, cell) * cell


def doubled(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def coarsest(side: int) -> int:
    """Side of the constant for latents of this side: halved while that leaves COARSEST or more."""
    while side % 2 == 0 and side // 2 >= COARSEST:
        side //= 2
    return side


class GeneratorNetwork(Network):
    """A generator in the place of a denoiser. It has no taps, and makes pictures of one size."""

    targets = ()
    one_step = True

    def __init__(self, model: StyleGenerator):
        super().__init__(model, RectifiedFlow(), "flow")

    def with_model(self, model: Any) -> "GeneratorNetwork":
        return GeneratorNetwork(model)

    @property
    def positions(self) -> int:
        return int(self.model.config.sample_size)

    @property
    def caption_width(self) -> None:
        return None

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        velocity: Tensor = self.model(x_t, pooled_projections=cond.pooled).sample
        return velocity

    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        return {}

    @property
    def encoder(self) -> list[str]:
        return []

    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        raise NotImplementedError("a generator has no taps")
