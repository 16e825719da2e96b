"""Exponential moving average (EMA) of the student's trainable parameters, updated once per student
step:

    average <- d * average + (1 - d) * parameter
    d = min(decay, (1 + step) / (warmup_steps + step))

The warm-up keeps the first averages from being mostly the initial weights. The average is float32
for parameters of any dtype: in bfloat16 with a decay of .9999 an update is below one rounding step
and is lost.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.core.process import precise
from distill.core.tensors import like


class Ema:
    """EMA of the parameters of `module` that require grad at construction. Buffers and frozen
    parameters have none.

    Build it after sharding, which replaces parameters. Moving the module to a device later is fine.
    With FSDP2 shard the root with `reshard_after_forward=True`; otherwise its parameters are not
    the sharded ones after a forward without gradient. `warmup_steps` is the constant of the formula
    above; 0 or 1 means no warm-up. With a `device` the averages stay there.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float = 0.999,
        warmup_steps: int = 10,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("nothing to average: no parameter requires grad")
        self.decay, self.warmup_steps = decay, warmup_steps
        self._device = None if device is None else torch.device(device)
        self._averages = {name: precise(p.detach()).clone() for name, p in self._parameters.items()}
        self._swapped = False  # whether parameters hold the averages, and `_averages` their values

    def decay_at(self, step: int) -> float:
        """The decay d at a student step, counted from 0."""
        return min(self.decay, (1 + step) / (max(self.warmup_steps, 1) + step))

    @torch.no_grad()
    def update(self, step: int, values: Callable[[Tensor], Tensor] | None = None) -> None:
        """Update the averages; call once after student step `step`, counted from 0.

        `values` maps each parameter to what is averaged of it, as a new tensor; None: itself.
        """
        self._follow_devices()
        if values is not None or self._device is not None:
            self._update_one_by_one(step, values)
            return
        current = [precise(p.detach()) for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), current, 1 - self.decay_at(step))

    def _update_one_by_one(self, step: int, values: Callable[[Tensor], Tensor] | None) -> None:
        """The same, without room for a copy of all parameters on the device of the averages."""
        for name, p in self._parameters.items():
            average, current = self._averages[name], p if values is None else values(p)
            average.lerp_(precise(current.detach().to(average.device)), 1 - self.decay_at(step))

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within this context the parameters hold the averages; afterwards their own values, bit by
        bit.

        Tensors are exchanged one at a time, so the extra memory is that of the largest tensor.
        Parameters of another dtype than their average are copied instead, at their own size.
        """
        if self._swapped:  # a nested context
            yield
            return
        self._follow_devices()
        saved_values: dict[str, Tensor | None] = {}
        try:
            for name in self._parameters:
                saved_values[name] = self._swap_in(name)
            self._swapped = True
            yield
        finally:
            self._swapped = False
            for name, saved in saved_values.items():
                self._swap_out(name, saved)

    @torch.no_grad()
    def _swap_in(self, name: str) -> Tensor | None:
        """Put the average into a parameter. Return a copy of the parameter where the dtypes differ;
        else the two are exchanged.
        """
        parameter, average = self._parameters[name], self._averages[name]
        if parameter.dtype == average.dtype:
            _exchange(parameter, average)
            return None
        saved = parameter.detach().clone()
        parameter.copy_(like(average, parameter))
        return saved

    @torch.no_grad()
    def _swap_out(self, name: str, saved: Tensor | None) -> None:
        if saved is None:
            _exchange(self._parameters[name], self._averages[name])
        else:
            self._parameters[name].copy_(saved)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, sharing memory with this object as in
        `nn.Module.state_dict`.
        """
        if self._swapped:  # they are in the parameters
            current = {name: p.detach() for name, p in self._parameters.items()}
            return {
                name: current[name] if current[name].dtype == average.dtype else average
                for name, average in self._averages.items()
            }
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load averages saved by `state_dict`. Raises ValueError for other names or shapes."""
        averages = self._averages
        problems = [f"it lacks {name}" for name in averages if name not in state]
        problems += [f"it has an unknown {name}" for name in state if name not in averages]
        for name, x in state.items():
            if name in averages and x.shape != averages[name].shape:
                problems.append(
                    f"{name} is {list(x.shape)} in it and {list(averages[name].shape)} here"
                )
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"the saved average does not fit: {'; '.join(problems[:3])}{more}")
        self._follow_devices()
        _copy_values(state, averages)

    def _follow_devices(self) -> None:
        """Move averages to their device, or to those of their parameters, which may have moved."""
        for name, p in self._parameters.items():
            self._averages[name] = self._averages[name].to(self._device or p.device)


def _exchange(a: Tensor, b: Tensor) -> None:
    """Exchange the values of two tensors of one shape and dtype, in place and bit by bit."""
    saved = a.detach().clone()
    a.copy_(b)
    b.copy_(saved)


@torch.no_grad()
def _copy_values(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    # In place: optimisers, compiled graphs and sharding refer to these tensors.
    for name, target in targets.items():
        target.copy_(like(values[name], target))
