"""Prodigy, which estimates its learning rate."""

from typing import Any

import torch
from prodigyopt import Prodigy as OfProdigyopt


class Prodigy(OfProdigyopt):
    """prodigyopt's, which trains without a gradient for some parameters, or for all.

    Its step fails where no parameter has a gradient, and prints where weights decay.
    """

    def __init__(self, params: Any, *, weight_decay: float, **options: Any) -> None:
        super().__init__(params, weight_decay=0.0, **options)
        for group in self.param_groups:
            group["weight_decay"] = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        every = (p for group in self.param_groups for p in group["params"])
        if all(p.grad is None for p in every):
            return None
        return super().step(closure)
