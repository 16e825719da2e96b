"""Exponential moving average of the student's trainable parameters, one move per student step:

    average <- d * average + (1 - d) * parameter
    d = min(decay, (1 + step) / (warmup_steps + step))

The warm-up keeps the first averages from being mostly the initial weights. The average is float32
whatever the dtype of the parameters, because with bfloat16 and a decay of .9999 each move is
smaller than one rounding step and is lost.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distill.core.process import precise
from distill.core.tensors import like


class Ema:
    """Averages of the parameters of `module` that require grad now; buffers and frozen parameters
    have none.

    Build this after the module is sharded, since that replaces parameters; moving it to a device
    later is fine. With FSDP2 shard the root with `reshard_after_forward=True`: otherwise its
    parameters are not the sharded ones after a forward without gradient. warmup_steps is the
    constant in the formula above; 0 or 1 means no warm-up.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999, warmup_steps: int = 10) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("nothing to average: no parameter requires grad")
        self.decay, self.warmup_steps = decay, warmup_steps
        self._averages = {name: precise(p.detach()).clone() for name, p in self._parameters.items()}
        self._shown = False  # whether the averages are in the parameters, and these in `_averages`

    def decay_at(self, step: int) -> float:
        """The decay used at a student step, counted from 0."""
        return min(self.decay, (1 + step) / (max(self.warmup_steps, 1) + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters; call once after student step `step`, counted
        from 0.
        """
        self._follow_devices()
        current = [precise(p.detach()) for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._averages.values()), current, 1 - self.decay_at(step))

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within this context the parameters hold the averages; afterwards they are what they were,
        bit by bit.

        Values change places one tensor at a time, so that no second copy of the weights is made:
        the memory is that of the largest tensor. Parameters of another dtype than their averages
        are kept beside, at their own size.
        """
        if self._shown:  # inside another one
            yield
            return
        self._follow_devices()
        moved: dict[str, Tensor | None] = {}
        try:
            for name in self._parameters:
                moved[name] = self._show(name)
            self._shown = True
            yield
        finally:
            self._shown = False
            for name, kept in moved.items():
                self._restore(name, kept)

    @torch.no_grad()
    def _show(self, name: str) -> Tensor | None:
        """Give a parameter its average, which takes the parameter's value if it can; else that
        value is returned.
        """
        parameter, average = self._parameters[name], self._averages[name]
        if parameter.dtype == average.dtype:
            _exchange(parameter, average)
            return None
        kept = parameter.detach().clone()
        parameter.copy_(like(average, parameter))
        return kept

    @torch.no_grad()
    def _restore(self, name: str, kept: Tensor | None) -> None:
        if kept is None:
            _exchange(self._parameters[name], self._averages[name])
        else:
            self._parameters[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, sharing memory with this object as `nn.Module.state_dict`
        does.
        """
        if self._shown:  # they are in the parameters
            same = {name: p.detach() for name, p in self._parameters.items()}
            return {
                name: same[name] if same[name].dtype == average.dtype else average
                for name, average in self._averages.items()
            }
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take averages saved by `state_dict`; raises ValueError unless names and shapes are the
        same.
        """
        ours = self._averages
        problems = [f"it lacks {name}" for name in ours if name not in state]
        problems += [f"it has an unknown {name}" for name in state if name not in ours]
        for name, x in state.items():
            if name in ours and x.shape != ours[name].shape:
                problems.append(
                    f"{name} is {list(x.shape)} in it and {list(ours[name].shape)} here"
                )
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(f"the saved average does not fit: {'; '.join(problems[:3])}{more}")
        self._follow_devices()
        _write(state, ours)

    def _follow_devices(self) -> None:
        """Averages live beside their parameters, which may have moved since."""
        for name, p in self._parameters.items():
            self._averages[name] = self._averages[name].to(p.device)


def _exchange(a: Tensor, b: Tensor) -> None:
    """Let two tensors of one shape and dtype change values, in place and bit by bit."""
    kept = a.detach().clone()
    a.copy_(b)
    b.copy_(kept)


@torch.no_grad()
def _write(values: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    # In place: optimisers, compiled graphs and sharding all hold on to these very tensors.
    for name, target in targets.items():
        target.copy_(like(values[name], target))
