"""Muon for matrices and AdamW for the rest, as one optimiser."""

from typing import Any

import torch

from distill.training.optimizers import grouped


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimisers of torch that share one state and one list of groups.

    Args:
        params: parameters, or groups of them; matrices are those with two dimensions.
        matrices, others: options of Muon, and of AdamW.
        options: those of both.
    """

    def __init__(
        self, params: Any, *, matrices: dict[str, Any], others: dict[str, Any], **options: Any
    ) -> None:
        every = [p for group in grouped(params) for p in group["params"]]
        two, rest = ([p for p in every if (p.ndim == 2) is flat] for flat in (True, False))
        self._parts: list[torch.optim.Optimizer] = []
        if two:
            self._parts.append(torch.optim.Muon(two, **matrices, **options))
        if rest:
            self._parts.append(torch.optim.AdamW(rest, **others, **options))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimiser's groups and state, which loading replaces."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for part in self._parts:
            part.step()
        return None
