"""Weights of a frozen network in bfloat16, for passes under autocast to bfloat16.

Autocast computes linear and convolutional layers in bfloat16. It keeps a cast of trainable weights
for the iteration, and casts frozen float32 weights anew in every pass. Cast once, they take half
the memory and give the same numbers, bit by bit. The parameters of all other layers stay in
float32, as autocast leaves them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Layers that autocast computes in bfloat16. Classes with a forward of their own are left alone.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FORWARDS = {layer.forward for layer in LAYERS}
ERROR = 2**15  # the largest rounding error of bfloat16, in units of the last bit of float32


@dataclass(frozen=True)
class _Rest:
    """What rounding to bfloat16 took from a float32 tensor, in units of its last bit."""

    error: Tensor  # int16 of its shape, on the CPU; ERROR is stored as ERROR - 1
    largest: Tensor  # flat indices where the error is ERROR, about one in 100,000


class HalfWeights:
    """The frozen weights of `model`: float32, or between `halve` and `restore` bfloat16 where
    autocast would cast them.

    What rounding took is kept on the CPU, 2 bytes a weight, so `restore` gives the same float32
    weights, bit by bit.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rests: dict[str, _Rest] = {}
        self._halved_for_good = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's first weight before `halve`: the dtype of its inputs."""
        if self._rests or self._halved_for_good:
            return torch.float32
        return next(self._model.parameters()).dtype

    @torch.no_grad()
    def halve(self, *, for_good: bool = False) -> None:
        """Cast the frozen float32 weights of linear and convolutional layers to bfloat16.

        Weights with NaN stay. With `for_good` nothing is kept for `restore`: for networks that are
        sharded next.
        """
        if self._rests or self._halved_for_good:
            return
        for name, parameter in frozen_layer_weights(self._model):
            rounded, rest = _split(parameter.data)
            if rest is None:
                continue
            parameter.data = rounded
            self._halved_for_good |= for_good
            if not for_good:
                self._rests[name] = rest

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights back their float32 values; no effect on others."""
        for name, rest in self._rests.items():
            parameter = self._model.get_parameter(name)
            parameter.data = _joined(parameter.data, rest)
        self._rests = {}

    def fit(self, x: Tensor) -> None:
        """Restore the weights unless a pass on x is now under autocast to bfloat16."""
        if not self._rests:
            return
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            return
        self.restore()


def frozen_layer_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of the frozen float32 parameters that only layers in bfloat16 read."""
    read_by_others = {
        id(parameter)
        for module in model.modules()
        if type(module).forward not in FORWARDS
        for parameter in module._parameters.values()
    }
    for name, parameter in model.named_parameters():
        wanted = parameter.dtype == torch.float32 and not parameter.requires_grad
        if wanted and id(parameter) not in read_by_others and not parameter.is_meta:
            yield name, parameter


def _split(x: Tensor) -> tuple[Tensor, _Rest | None]:
    """x in bfloat16, and what rounding took; None for a tensor with NaN, whose bits are lost."""
    rounded = x.to(torch.bfloat16)
    error = _bits(x) - _bits(rounded.float())
    if x.numel() and int(error.abs().max()) > ERROR:
        return rounded, None
    largest = (error == ERROR).flatten().nonzero().flatten().cpu()
    return rounded, _Rest(error.clamp(max=ERROR - 1).to(torch.int16).cpu(), largest)


def _joined(rounded: Tensor, rest: _Rest) -> Tensor:
    """Inverse of `_split`, on the device of `rounded`."""
    error = rest.error.to(rounded.device, torch.int32)
    error.view(-1)[rest.largest.to(rounded.device)] += 1
    return (_bits(rounded.float()) + error).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)
