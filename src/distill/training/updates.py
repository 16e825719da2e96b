"""An update of a player that is skipped where its gradient is not finite, and the row of an
iteration's values.

On a CPU the norm is read at once. On a device that would wait for all queued work, so a fused Adam
is given `found_inf`: its kernel then leaves weights, moments and step counts as they are. Python
learns of it one iteration late, from the row. Other optimisers have no such kernel: for them the
norm is read at every update, on a device too.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.transfers import Later, send
from distill.training.optimizers import forget

Applied = bool | Tensor
"""Whether an update was applied; a bool [] on the device where Python does not know it yet."""


def step_if_finite(
    optimizer: Any, parameters: Sequence[nn.Parameter], norm: Tensor, limit: float
) -> Applied:
    """Clip the gradients, of total norm `norm`, to `limit` and step, unless it is not finite."""
    inner = optimizer.optimizer
    if not _skips_on_device(inner, norm):
        value = float(norm)
        if not math.isfinite(value):
            return False
        factor = limit / (torch.tensor(value) + 1e-6)  # torch's, in float32
        if factor < 1:  # to multiply by one takes as long
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        optimizer.step()
        return True
    applied = norm.isfinite()
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    inner.found_inf = (~applied).float()
    try:
        optimizer.step()
    finally:
        del inner.found_inf
    return applied


def _skips_on_device(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    return norm.device.type != "cpu" and _is_fused_adam(optimizer)


def _is_fused_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its kernel takes `found_inf`, and its whole state is on the device."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return isinstance(optimizer, torch.optim.Adam) and fused


def refresh_heads(heads: Any, generator: torch.Generator, optimizer: Any, applied: Applied) -> None:
    """Re-initialise heads where they do so after an update that was applied, and clear their
    optimiser state.
    """
    takes_flag = "applied" in inspect.signature(heads.refresh).parameters
    if isinstance(applied, Tensor) and not (takes_flag and _is_fused_adam(optimizer)):
        applied = bool(applied)
    if not isinstance(applied, Tensor):
        for parameter in heads.refresh(generator) if applied else ():
            forget(optimizer, parameter)
        return
    for parameter in heads.refresh(generator, applied):
        # Zeros are what a new state of Adam starts from; that of other optimisers may not.
        for value in optimizer.state.get(parameter, {}).values():
            value.masked_fill_(applied, 0)


@dataclass(kw_only=True)
class Row:
    """The values of an iteration, some of them still on their way from the device.

    step: student updates before it. players: whose update each of `applied` is. updated: whether
    the student's was among them. late: whether reading the values now would wait for the device.
    """

    step: int
    updated: bool
    players: Sequence[str]
    late: bool
    _names: Sequence[str]
    _numbers: dict[str, float]
    _applied: Sequence[bool | None]
    _values: Later

    @classmethod
    def of(
        cls,
        current: dict[str, Tensor | float],
        applied: Sequence[tuple[str, Applied]],
        device: torch.device,
        average: Callable[[Tensor], Tensor] | None,
        signal: int,
        **more: Any,
    ) -> "Row":
        """Queue the copies of the values, averaged over several ranks by `average`.

        They are gathered on `device`, where the ranks can reduce them. `signal` is that of this
        rank, 0 for none; `read` gives whether any rank has one.
        """
        tensors = {name: v for name, v in current.items() if isinstance(v, Tensor)}
        numbers = {name: v for name, v in current.items() if not isinstance(v, Tensor)}
        flags = [flag for _, flag in applied if isinstance(flag, Tensor)]
        every = [send(v.detach().to(torch.float32), device) for v in [*tensors.values(), *flags]]
        values = torch.stack([*every, torch.full((), float(signal > 0), device=device)])
        if average is not None:
            values = average(values)
        rounded = torch.tensor(list(numbers.values()), dtype=torch.float32).tolist()
        return cls(
            players=[player for player, _ in applied],
            late=device.type != "cpu",
            _names=list(current),
            _numbers=dict(zip(numbers, rounded, strict=True)),
            _applied=[None if isinstance(flag, Tensor) else flag for _, flag in applied],
            _values=Later(values),
            **more,
        )

    @property
    def is_assumed(self) -> bool:
        """Whether the device decides about the last update, which counts as applied until then."""
        return self._applied[-1] is None

    @property
    def is_known_bad(self) -> bool:
        """Whether an update is known to have been skipped, without a read."""
        return False in self._applied

    def read(self) -> tuple[dict[str, float], list[bool], bool]:
        """The values by name, whether each update was applied, and whether a rank has a signal."""
        found = self._values.read()
        names = [name for name in self._names if name not in self._numbers]
        values = self._numbers | dict(zip(names, found, strict=False))
        flags = iter(found[len(names) : -1])
        applied = [bool(next(flags)) if known is None else known for known in self._applied]
        return {name: values[name] for name in self._names}, applied, found[-1] > 0
