"""AdamW whose moments have 8 bits, by torchao."""

from collections.abc import Mapping
from typing import Any

import torch
from torchao.optim import AdamW8bit as OfTorchao
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

CODES, SCALE, SIGNED = "codes", "scale", "signed"  # fields of a quantised tensor in a state


class AdamW8bit(OfTorchao):
    """torchao's, with a state of plain tensors: {codes, scale, signed} of each quantised moment.

    Its own tensor class cannot be copied, nor read without torchao. With `compile` the step is
    compiled on a GPU, as torchao means it to be. On a CPU it is not: that takes longer than it
    saves.
    """

    def __init__(self, params: Any, *, compile: bool = True, **options: Any) -> None:
        super().__init__(params, **options)
        self._compile = compile

    def step(self, closure: Any = None) -> Any:
        first = self.param_groups[0]["params"][0]
        if self._compile and first.device.type != "cpu":
            return super().step(closure)
        with torch.compiler.set_stance("force_eager"):
            return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        state = {
            i: {name: _plain(value) for name, value in values.items()}
            for i, values in found["state"].items()
        }
        groups = [{**group, "lr": float(group["lr"])} for group in found["param_groups"]]
        return {**found, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        state = {
            i: {name: _quantised(value) for name, value in values.items()}
            for i, values in state_dict["state"].items()
        }
        groups = [
            {**group, "lr": torch.tensor(float(group["lr"]))}
            for group in state_dict["param_groups"]
        ]
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups})


def _plain(value: Any) -> Any:
    if not isinstance(value, OptimState8bit):
        return value
    return {CODES: value.codes, SCALE: value.scale, SIGNED: value.signed}


def _quantised(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    codes, scale, signed = value[CODES], value[SCALE], bool(value[SIGNED])
    levels = torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned())
    levels = levels.to(codes.device, torch.float32)
    return OptimState8bit(codes, scale, levels, signed, dtype=torch.float32)
