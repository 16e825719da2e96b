"""An optimiser whose state is on the CPU, and steps there.

The device then holds weights and gradients alone. In every step the gradients and the weights go
to the CPU, and the new weights back: 12 bytes a weight in float32. Nothing of the weights is kept
there between steps, so that whatever else sets them, as a refreshed head does, is seen.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distill.training import optimizers


class OnHost(torch.optim.Optimizer):
    """The optimiser that `factory` makes, for copies of the parameters on the CPU."""

    def __init__(self, factory: Callable[..., Any], params: Any) -> None:
        self._own = [p for group in optimizers.grouped(params) for p in group["params"]]
        super().__init__(self._own, {"lr": 0.0})
        self._copies = {p: _copy_of(p) for p in self._own}
        self._inner = factory(list(self._copies.values()))
        self._follow()

    def _follow(self) -> None:
        """Show the groups of the inner optimiser, whose learning rates the loop sets."""
        self.param_groups = self._inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        learned = [p for p in self._own if p.grad is not None]
        for p, copy in self._copies.items():
            if p.grad is None:
                copy.grad = None
                continue
            copy.copy_(p)
            copy.grad = torch.empty_like(copy) if copy.grad is None else copy.grad
            copy.grad.copy_(p.grad)
        self._inner.step()
        for p in learned:
            p.copy_(self._copies[p])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._own:
            p.grad = None

    def forget(self, parameter: nn.Parameter) -> None:
        """Let a parameter start anew."""
        optimizers.forget(self._inner, self._copies[parameter])

    @property
    def evaluated(self) -> Callable[[Tensor], Tensor]:
        """Parameter -> its values outside training; only of an inner optimiser that has such."""
        inner = optimizers.evaluated(self._inner)
        if inner is None:
            raise AttributeError("evaluated")

        def values(parameter: Tensor) -> Tensor:
            copy = self._copies[parameter]  # type: ignore[index]
            with torch.no_grad():
                copy.copy_(parameter)
            return inner(copy)

        return values

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state_dict)
        self._follow()


def _copy_of(parameter: nn.Parameter) -> Tensor:
    """Room on the CPU for a parameter; pinned where that makes copies faster."""
    pinned = parameter.device.type == "cuda" and torch.cuda.is_available()
    room = torch.empty_like(parameter.detach(), device="cpu", pin_memory=pinned)
    return room.copy_(parameter.detach()).requires_grad_(True)
