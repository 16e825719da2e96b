"""A diffusers network together with the process it was trained on: what teacher and student share.

x0(x_t, t, cond) = process.to_x0(network's prediction)          t in [0, 1], 0 data, 1 noise
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.core.process import Prediction, Process
from distill.core.types import Cond


class _LastTapReached(Exception):
    """Thrown through the network's forward, which needs nothing past the last tap; it holds the
    maps.
    """


def ends_at_last_tap(model: nn.Module) -> None:
    """Have the model's forward return the maps, where it stops after the last tap, instead of
    throwing.

    So hooks that something else has put around it run then too. FSDP2's let go of weights, and
    gather them again when a gradient comes to what was returned: an exception would pass them by.
    """
    forward = model.forward

    def ending(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except _LastTapReached as reached:
            return list(reached.args)

    model.forward = ending


Context = Callable[[], AbstractContextManager[Any]]


class Network(nn.Module):
    """A denoiser.

    Concrete networks say how to call the diffusers model and where it can be tapped.
    """

    # Layers that a LoRA adapts unless told otherwise, by the ends of their names: here what all
    # attention has.
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    rounds_up = False  # as its family says

    def __init__(self, model: nn.Module, process: Process, prediction: Prediction):
        super().__init__()
        self.model, self.process, self.prediction = model, process, prediction
        self.shift: int | None = (
            None  # NitroFusion's: what the last of 1,000 training steps is taken for
        )
        self.adapters: nn.Module | None = None  # of a LoRA student: all that it owns
        self.within: Context = nullcontext  # around every pass
        self.holds: list[
            Callable[[], Context]
        ] = []  # each keeps what a pass depends on besides its inputs

    def around(self, model: Any) -> Network:
        """A network of this kind, with this process and prediction, around another model."""
        return type(self)(model, self.process, self.prediction)

    @property
    def patch(self) -> int:
        """Latents a side that make one token; 1 where there are none."""
        return 1

    @property
    def positions(self) -> int | None:
        """Tokens a side for which it has positions; None where it takes any number."""
        return self.model.config.get("pos_embed_max_size") or None

    @property
    @abstractmethod
    def caption_width(self) -> int | None:
        """Of a token of a caption, as `predict` takes it; None where there is no one width."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The model's own prediction, of the shape of x_t [B, C, H, W]."""

    @abstractmethod
    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        """Tap name -> module and the number of channels of its map, in the order in which they
        run.
        """

    @property
    @abstractmethod
    def encoder(self) -> list[str]:
        """Taps of the half that reads, for discriminators that look at no more of it."""

    @abstractmethod
    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        """What the module behind this tap returned -> map [B, C', H', W'], contiguous."""

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Clean estimate [B, C, H, W] from x_t [B, C, H, W] at t [B], in the precision of x_t."""
        t = self.process.shifted(t, self.shift) if self.shift else t
        return self.process.to_x0(self._run(x_t, t, cond), x_t, t, self.prediction)

    def _run(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction, with what goes in cast to the precision of the weights, which may be
        half.
        """
        dtype = next(self.model.parameters()).dtype
        with self.within():
            return self.predict(x_t.to(dtype), t, cond.to(dtype))

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """Maps [B, C', H', W'] at `taps`; the network stops after the last one. Gradient reaches
        x_t.

        Hooks live for this call alone, so nested and concurrent uses are safe. Raises ValueError
        for unknown taps.
        """
        known, seen = self.tappable(), {}
        if unknown := [name for name in taps if name not in known]:
            raise ValueError(
                f"no such taps: {', '.join(unknown)}; this network has {', '.join(known)}"
            )

        def keep(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
            found = self.to_map(name, output, x_t)
            seen[name] = (
                found if torch.is_autocast_enabled(x_t.device.type) else found.to(x_t.dtype)
            )
            stop()

        def stop(*_: object) -> None:
            if len(seen) == len(set(taps)):
                raise _LastTapReached(*seen.values())

        handles = [known[name][0].register_forward_hook(partial(keep, name)) for name in set(taps)]
        handles.append(self.model.register_forward_hook(stop))  # behind those of `ends_at_last_tap`
        try:
            self._run(x_t, t, cond)
        except _LastTapReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [seen[name] for name in taps]

    def of_patch(self, cond: Cond, whole: Sequence[int], corner: Sequence[int]) -> Cond:
        """`cond` for a patch at `corner` (row, column) of latents `whole` (H, W): most networks ask
        no place.
        """
        return cond

    def recompute(self) -> None:
        """From now on keep no activations inside the model's blocks; a backward pass computes them
        again.

        It does so under what held at first, which by then may be something else: the adapters of a
        LoRA on or off.
        """
        self.model.enable_gradient_checkpointing(self._recomputed)

    def _recomputed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        held = [hold() for hold in self.holds]

        def run(*inputs: Any) -> Any:
            with ExitStack() as stack:
                for context in held:
                    stack.enter_context(context())
                return block(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False)

    def twin(self) -> Network:
        """A trainable copy in float32 that shares nothing with this one: the student of the same
        size.
        """
        return copy.deepcopy(self).float().requires_grad_(True).train()


def is_block(tap: str) -> bool:
    """Whether this tap stands behind a whole block, and not at a part of one (`down0.1`) or before
    them all (`in`).
    """
    return "." not in tap and tap != "in"
