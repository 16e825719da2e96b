"""Weights of frozen layers in 8 or 4 bits, which every pass turns back into numbers.

    int8   w ~ scale q          q in -127..127, a scale for each output channel
    fp8    w ~ scale q          q in float8 e4m3, a scale for each output channel
    nf4    w ~ scale level[q]   16 levels, quantiles of a normal distribution, and a scale for each
                                64 weights (QLoRA, arXiv 2305.14314)

A layer computes with the weights that this gives, forward and backward: the gradient with respect
to its input is exact for them. Neither pass keeps them. Under autocast they are cast as autocast
casts weights.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["int8", "fp8", "nf4"]
KINDS = ("int8", "fp8", "nf4")
BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.5}  # of a weight; scales of channels are left out
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SMALLEST = 1024  # ours: layers with fewer weights stay as they are
BLOCK = 64  # weights that share a scale in nf4
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
LARGEST = {"int8": 127.0, "fp8": 448.0}


# -- weights ---------------------------------------------------------------------------------------


def quantized(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes in 8 bits, two weights each in nf4, and scales in float32, on the device of `weight`.

    Rounded to the nearest; scales are such that the largest value of a channel or block is exact.
    """
    x = weight.detach().float()
    if kind == "nf4":
        flat = F.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
        scale = flat.abs().amax(1, keepdim=True)
        levels = torch.tensor(LEVELS, device=x.device)
        ends = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(flat / _no_zero(scale), ends).to(torch.uint8).view(-1, 2)
        return codes[:, 0] * 16 + codes[:, 1], scale
    scale = x.flatten(1).abs().amax(1) / LARGEST[kind]
    shape = (-1, *[1] * (x.ndim - 1))
    q = x / _no_zero(scale).view(shape)
    if kind == "int8":
        return q.round().to(torch.int8), scale
    q = q.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn)
    return q.view(torch.uint8), scale  # as bytes: few operations know float8


def dequantized(
    codes: Tensor, scale: Tensor, kind: Kind, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """The weights of these codes, computed in float32 and cast to `dtype`."""
    if kind == "nf4":
        pairs = torch.stack([codes >> 4, codes & 15], dim=1).flatten().int()
        levels = torch.tensor(LEVELS, device=codes.device)
        x = levels.index_select(0, pairs).view(-1, BLOCK) * scale
        count = shape.numel()
        return x.flatten()[:count].view(shape).to(dtype)
    q = codes.view(torch.float8_e4m3fn) if kind == "fp8" else codes
    return (q.float() * scale.view(-1, *[1] * (len(shape) - 1))).to(dtype)


def _no_zero(scale: Tensor) -> Tensor:
    """Of a channel of zeros any scale gives zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


# -- layers ----------------------------------------------------------------------------------------


class QuantizedLayer:
    """Mixed into the class of a layer whose weight is `codes` and `scale`, by `quantize_layer`.

    `weight` gives the dequantised weight, a new tensor in the dtype that it had.
    """

    kind: Kind
    codes: Tensor
    scale: Tensor
    shape: torch.Size
    dtype: torch.dtype
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        return dequantized(self.codes, self.scale, self.kind, self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Pass.apply(x.to(dtype), self.codes, self.scale, bias, self)


class _Pass(torch.autograd.Function):
    """A linear or convolutional layer, whose backward pass dequantises the weights again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, layer: Any
    ) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(codes, scale)
        weight = dequantized(codes, scale, layer.kind, layer.shape, x.dtype)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return layer._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        layer = ctx.layer
        weight = dequantized(codes, scale, layer.kind, layer.shape, grad.dtype)
        if isinstance(layer, nn.Linear):
            return grad @ weight, None, None, None, None
        return _conv_input_gradient(layer, ctx.shape, weight, grad), None, None, None, None


def _conv_input_gradient(layer: Any, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
    found, _, _ = torch.ops.aten.convolution_backward(
        grad,
        grad.new_empty(1).expand(shape),
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0] * len(layer.stride),
        layer.groups,
        [True, False, False],
    )
    return found


_classes: dict[type, type] = {}


def quantize_layer(layer: Any, kind: Kind, device: torch.device | None = None) -> nn.Parameter:
    """Quantise the weight of a layer, in place; returns the weight, where it was.

    The layer stays the same object, of a subclass: hooks, taps and adapters on it stay. Codes and
    scales are on `device`; None: where the weight is.
    """
    weight = layer.weight
    codes, scale = quantized(weight.data.to(device or weight.device), kind)
    own = type(layer)
    if own not in _classes:
        _classes[own] = type(f"Quantized{own.__name__}", (QuantizedLayer, own), {})
    layer._parameters["weight"] = None  # keeps its place in the order of parameters
    layer.__class__ = _classes[own]
    layer.kind, layer.shape, layer.dtype = kind, weight.shape, weight.dtype
    layer.register_buffer("codes", codes)
    layer.register_buffer("scale", scale)
    return weight


def restore_layer(layer: Any, weight: nn.Parameter) -> None:
    """Give a quantised layer its weight back, on the device of its codes."""
    weight = nn.Parameter(weight.data.to(layer.codes.device), requires_grad=False)
    del layer._buffers["codes"], layer._buffers["scale"]
    layer.__class__ = type(layer).__mro__[2]
    for name in ("kind", "shape", "dtype"):
        delattr(layer, name)
    layer._parameters["weight"] = weight


def quantizable(model: nn.Module, *, meta: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Name and layer of the frozen weights that a linear or convolutional layer alone reads.

    Classes with a forward of their own are left alone, and so are adapters and small layers. With
    `meta` weights without values count too.
    """
    forwards = {layer.forward for layer in LAYERS}
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        if type(module).forward not in forwards or not _pads_by_numbers(module):
            continue
        weight = module._parameters.get("weight")
        if weight is None or weight.requires_grad or uses[id(weight)] > 1:
            continue
        if weight.is_meta and not meta:
            continue
        if weight.is_floating_point() and weight.numel() >= SMALLEST:
            yield name, module


def _pads_by_numbers(module: nn.Module) -> bool:
    """Whether a convolution pads by zeros, a number of them; True for other layers."""
    padding = getattr(module, "padding", 0)
    return getattr(module, "padding_mode", "zeros") == "zeros" and not isinstance(padding, str)
