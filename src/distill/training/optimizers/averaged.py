"""Schedule-free AdamW: training moves y, and what is used of it is x.

    y = (1 - beta1) z + beta1 x        gradients are taken at y
    z <- z - rate * step               as AdamW without momentum
    x <- (1 - c) x + c z               the mean of the iterates z

The optimiser stores y in the parameters, and z. Its own switch between y and x rounds both ways, so
a run with sample pictures would train another student than one without. Here x is computed beside
the parameters, which stay y.
"""

from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from distill.training.optimizers import grouped

COUNTS = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}  # of a new group


class ScheduleFree(AdamWScheduleFree):
    """schedulefree's, always in training; `evaluated` gives x.

    With `per_tensor` each tensor is a group of its own, whose counts only go on where it has a
    gradient.
    """

    def __init__(self, params: Any, *, per_tensor: bool = False, **options: Any) -> None:
        groups = grouped(params)
        if per_tensor:
            groups = [{**group, "params": [p]} for group in groups for p in group["params"]]
        super().__init__(groups, **options)
        self._per_tensor = per_tensor
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        every = self.param_groups
        # Without any gradient a group makes no step, and its counts must not say so.
        self.param_groups = [
            group for group in every if any(p.grad is not None for p in group["params"])
        ]
        try:
            return super().step(closure) if self.param_groups else None
        finally:
            self.param_groups = every

    @torch.no_grad()
    def evaluated(self, parameter: Tensor) -> Tensor:
        """x of a parameter, a new tensor; the parameter itself before its first step."""
        z = self.state.get(parameter, {}).get("z")
        if z is None:
            return parameter.detach()
        beta1, _ = self.param_groups[0]["betas"]
        return parameter.detach().lerp(z.to(parameter.device), 1 - 1 / beta1)

    def forget(self, parameter: nn.Parameter) -> None:
        """Let a parameter start anew; its counts too where they are its own."""
        self.state.pop(parameter, None)
        if self._per_tensor:
            own = next(g for g in self.param_groups if g["params"][0] is parameter)
            own.update(COUNTS)
