"""Weights of a frozen network in bfloat16, for passes under autocast to bfloat16.

Autocast computes linear and convolutional layers in bfloat16. It keeps a cast of trainable weights
for the iteration, and casts frozen float32 weights anew in every pass. Cast once, they take half
the memory and give the same numbers, bit by bit. The parameters of all other layers stay in
float32, as autocast leaves them.

They may be quantised instead, which changes the numbers: see `quantized_weights`. The weights as
they were read wait on the CPU.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.core.quantized_weights import Kind, quantizable, quantize_layer, restore_layer

log = logging.getLogger(__name__)

# Layers that autocast computes in bfloat16. Classes with a forward of their own are left alone.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FORWARDS = {layer.forward for layer in LAYERS}
META = torch.device("meta")
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
    weights, bit by bit. `load_state_dict` restores them first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._rests: dict[str, _Rest] = {}
        self._originals: dict[str, nn.Parameter] = {}  # of quantised layers, by their names
        self._dtype: torch.dtype | None = None  # of the inputs, while layers are quantised
        self._halved_for_good = False
        self._hooks: list[RemovableHandle] = []

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's first weight before `halve`: the dtype of its inputs. Weights that
        diffusers keeps in float32 beside others do not count.
        """
        if self._rests or self._halved_for_good:
            return torch.float32
        if self._dtype:
            return self._dtype
        kept = set(getattr(self._model, "_keep_in_fp32_modules", None) or ())
        named = self._model.named_parameters()
        found = next((x for name, x in named if kept.isdisjoint(name.split("."))), None)
        return (next(self._model.parameters()) if found is None else found).dtype

    @torch.no_grad()
    def halve(self, *, for_good: bool = False, device: torch.device | None = None) -> None:
        """Cast the frozen float32 weights of linear and convolutional layers to bfloat16.

        Weights with NaN stay. With `for_good` nothing is kept for `restore`: for networks that are
        sharded next. The weights go to `device` one by one, where it never holds all in float32.
        """
        if self._rests or self._halved_for_good:
            return
        if device == META:
            self._halve_shapes()
            return
        for name, parameter in list(frozen_layer_weights(self._model)):
            rounded, rest = _split(parameter.data.to(device or parameter.device))
            if rest is None:
                continue
            parameter.data = rounded
            self._halved_for_good |= for_good
            if not for_good:
                self._rests[name] = rest
        for module in {name.rpartition(".")[0] for name in self._rests}:
            layer = self._model.get_submodule(module)
            self._hooks.append(layer.register_load_state_dict_pre_hook(self._before_loading))

    def _halve_shapes(self) -> None:
        """`halve` for weights without values."""
        for _, parameter in list(frozen_layer_weights(self._model, meta=True)):
            parameter.data = parameter.data.to(torch.bfloat16)
            self._halved_for_good = True

    @torch.no_grad()
    def quantize(self, kind: Kind, *, device: torch.device | None = None) -> None:
        """Quantise the frozen weights of linear and convolutional layers, until `restore`.

        They go to `device` one by one; their own values stay where they are, or go to the CPU.
        """
        if self._originals or self._rests:
            return
        self._dtype = self.dtype
        for name, layer in list(quantizable(self._model, meta=device == META)):
            original = quantize_layer(layer, kind, device)
            if original.is_meta:
                continue
            self._originals[name] = nn.Parameter(original.data.to("cpu"), requires_grad=False)
            self._hooks.append(layer.register_load_state_dict_pre_hook(self._before_loading))

    def restore(self) -> None:
        """Give the weights back the values that they had; no effect on others.

        If these do not fit into the device's memory, the whole model goes to the CPU.
        """
        if not self._fits_in_place():
            self._restore_on_host()
        while self._hooks:
            self._hooks.pop().remove()

    def fit(self, x: Tensor) -> None:
        """Restore the weights unless a pass on x is now under autocast to bfloat16."""
        if not self._rests:
            return
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            return
        more = sum(2 * rest.error.numel() for rest in self._rests.values()) / 2**30
        log.warning(
            "a pass of a frozen %s without autocast needs its float32 weights, which take %.2f GiB"
            " more for the rest of the training; run such passes under torch.autocast",
            type(self._model).__name__,
            more,
        )
        self._restore_in_place()

    def _before_loading(self, *_: Any) -> None:
        self._restore_in_place()

    @torch.no_grad()
    def _restore_in_place(self) -> None:
        for name in list(self._originals):
            restore_layer(self._model.get_submodule(name), self._originals[name])
            del self._originals[name]
        self._dtype = None
        for name in list(self._rests):
            parameter = self._model.get_parameter(name)
            parameter.data = _joined(parameter.data, self._rests[name])
            del self._rests[name]

    def _fits_in_place(self) -> bool:
        """Restore where the weights are; whether its memory was enough. What is done stays."""
        try:
            self._restore_in_place()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            return False
        return True

    def _restore_on_host(self) -> None:
        """Restore on the CPU, and go back if there is room."""
        device = next(self._model.parameters()).device
        self._model.to("cpu")
        self._restore_in_place()
        try:
            self._model.to(device)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self._model.to("cpu")
            kind, what = type(self._model).__name__, "do not fit into the memory of"
            log.warning("the float32 weights of %s %s %s: it stays on the CPU", kind, what, device)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of CUDA, which has a class for it, and of other devices, which have not."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def frozen_layer_weights(
    model: nn.Module, *, meta: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of the frozen float32 parameters that only layers in bfloat16 read.

    With `meta` parameters without values count too.
    """
    read_by_others = {
        id(parameter)
        for module in model.modules()
        if type(module).forward not in FORWARDS
        for parameter in module._parameters.values()
    }
    for name, parameter in model.named_parameters():
        wanted = parameter.dtype == torch.float32 and not parameter.requires_grad
        valued = meta or not parameter.is_meta
        if wanted and id(parameter) not in read_by_others and valued:
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
    """Inverse of `_split`, on the device and in the layout of `rounded`."""
    error = rest.error.to(rounded.device, torch.int32)
    error.view(-1)[rest.largest.to(rounded.device)] += 1
    whole = torch.empty_like(rounded, dtype=torch.float32)
    return whole.copy_((_bits(rounded.float()) + error).view(torch.float32))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)
