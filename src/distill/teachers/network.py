"""A diffusers network with the noise process of its training, for teachers and students.

x0(x_t, t, cond) = process.to_x0(network's prediction)          t in [0, 1], 0 data, 1 noise
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.core.half_weights import HalfWeights
from distill.core.process import Prediction, Process
from distill.core.types import Cond
from distill.teachers.loading.settings import positions_of


class _LastTapReached(Exception):
    """Raised in the network's forward after the last tap, to skip the rest; it holds the feature
    maps.
    """


def ends_at_last_tap(model: nn.Module) -> None:
    """Make the model's forward return the maps where it ends after the last tap, instead of
    raising.

    Other hooks on the forward then run too. Those of FSDP2 free weights, and gather them again when
    gradient arrives; an exception would skip them.
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

    Subclasses define how the diffusers model is called and where it can be tapped.
    """

    # Default layers of a LoRA, by the ends of their names: here those of every attention.
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    rounds_up = False  # set to that of its family
    draws: tuple[int, int] = (0, 0)  # set to that of its family
    angles = False  # whether its pipeline steps in TrigFlow's angles; see `sampling.angles`
    shifts = False  # whether its pipeline tells the scheduler the size of the picture
    one_step = False  # whether it knows pure noise alone, as a GAN's generator does

    def __init__(self, model: nn.Module, process: Process, prediction: Prediction):
        super().__init__()
        self.model, self.process, self.prediction = model, process, prediction
        self.weights = HalfWeights(model)
        self.shift: int | None = None  # NitroFusion's timestep shift, of 1,000 training steps
        self.adapters: nn.Module | None = None  # the adapters of a LoRA student
        self.pass_context: Context = nullcontext  # around every pass
        # Each saves a state that changes a pass, and returns a context that restores it.
        self.context_savers: list[Callable[[], Context]] = []

    def with_model(self, model: Any) -> Network:
        """The same kind of network, with this process and prediction, on another model."""
        return type(self)(model, self.process, self.prediction)

    @property
    def patch(self) -> int:
        """Side of a token in latents; 1 for networks without tokens."""
        return 1

    @property
    def image_channels(self) -> int:
        """Channels that the network reads beside the sample's own, `Cond.image`."""
        return 0

    @property
    def positions(self) -> int | None:
        """Largest number of tokens a side, if positions are embedded; None if there is no limit."""
        return positions_of(self.model.config)

    def mu(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """Shift of the levels of `steps` steps for a picture of so many tokens, or its logarithm
        where it is exponential, as its pipeline tells it a scheduler of this `config`.
        """
        span = config["max_image_seq_len"] - config["base_image_seq_len"]
        share = (tokens - config["base_image_seq_len"]) / span
        return config["base_shift"] + share * (config["max_shift"] - config["base_shift"])

    @property
    @abstractmethod
    def caption_width(self) -> int | None:
        """Width of a caption token in `predict`; None where blocks differ."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The model's own prediction, of the shape of x_t [B, C, H, W]."""

    @abstractmethod
    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        """Tap name -> module and channels of its map, in the order of execution."""

    @property
    @abstractmethod
    def encoder(self) -> list[str]:
        """Taps of the encoder half, for discriminators that read no more."""

    @abstractmethod
    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        """Output of the module at this tap -> map [B, C', H', W'], contiguous."""

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x0 prediction [B, C, H, W] from x_t [B, C, H, W] at t [B], in the dtype of x_t."""
        t = self.process.shifted(t, self.shift) if self.shift else t
        return self.process.to_x0(self._run(x_t, t, cond), x_t, t, self.prediction)

    def rescaled(self, guided: Tensor, conditional: Tensor, x_t: Tensor) -> Tensor:
        """What its pipeline makes of the guided x0 prediction, given that for the caption and x_t,
        all [B, C, H, W]; nothing in most pipelines.
        """
        return guided

    def _run(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The model's prediction, with inputs cast to the dtype of the weights."""
        self.weights.fit(x_t)
        dtype = self.weights.dtype
        x_t = self._beside_image(x_t, cond)
        with self.pass_context():
            return self.predict(x_t.to(dtype), t, cond.to(dtype))

    def _beside_image(self, x_t: Tensor, cond: Cond) -> Tensor:
        """The sample [B, C, H, W] and the conditioning's image channels [B, C', H, W] as the
        network reads them. Raises ValueError for other channels than its own.
        """
        found = 0 if cond.image is None else cond.image.shape[1]
        if found != self.image_channels:
            what = f"reads {self.image_channels} channels of pictures beside the sample"
            raise ValueError(f"this network {what}, and its conditioning has {found}")
        return x_t if cond.image is None else torch.cat([x_t, cond.image.to(x_t.dtype)], 1)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """Maps [B, C', H', W'] at `taps`, differentiable in x_t; the pass ends after the last tap.

        Hooks exist for this call alone, so nested and concurrent calls are safe. Raises ValueError
        for unknown taps.
        """
        known, maps = self.tappable(), {}
        if unknown := [name for name in taps if name not in known]:
            raise ValueError(
                f"no such taps: {', '.join(unknown)}; this network has {', '.join(known)}"
            )

        def read_map(name: str, _module: nn.Module, _inputs: object, output: object) -> None:
            found = self.to_map(name, output, x_t)
            maps[name] = (
                found if torch.is_autocast_enabled(x_t.device.type) else found.to(x_t.dtype)
            )
            stop()

        def stop(*_: object) -> None:
            if len(maps) == len(set(taps)):
                raise _LastTapReached(*maps.values())

        handles = [
            known[name][0].register_forward_hook(partial(read_map, name)) for name in set(taps)
        ]
        handles.append(
            self.model.register_forward_hook(stop)
        )  # after the hooks of `ends_at_last_tap`
        try:
            self._run(x_t, t, cond)
        except _LastTapReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [maps[name] for name in taps]

    def of_patch(self, cond: Cond, full: Sequence[int], corner: Sequence[int]) -> Cond:
        """`cond` for a patch at `corner` (row, column) of `full` latents (H, W). Most networks
        ignore the position.
        """
        return cond

    def enable_checkpointing(self) -> None:
        """Gradient checkpointing: the backward pass computes the activations of blocks again.

        It restores the contexts of the forward pass first. For example, a LoRA's adapters may have
        been switched on or off since then.
        """
        self.model.enable_gradient_checkpointing(self._checkpointed)

    def _checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        contexts = [save() for save in self.context_savers]

        def run(*inputs: Any) -> Any:
            with ExitStack() as stack:
                for context in contexts:
                    stack.enter_context(context())
                return block(*inputs)

        return checkpoint(run, *inputs, use_reentrant=False)

    def trainable_copy(self) -> Network:
        """A trainable float32 copy that shares nothing with this network: a student of the same
        size.
        """
        self.weights.restore()
        return copy.deepcopy(self).float().requires_grad_(True).train()

    def copy_of_base(self) -> Network:
        """As `trainable_copy`, without the adapters that a LoRA student has put into this network,
        and without gradient checkpointing.
        """
        found = self.trainable_copy()
        adapted = {n: m for n, m in found.model.named_modules() if hasattr(m, "get_base_layer")}
        for name, layer in adapted.items():
            parent, _, last = name.rpartition(".")
            setattr(found.model.get_submodule(parent), last, layer.get_base_layer())
        found.model.requires_grad_(True)
        found.model.disable_gradient_checkpointing()
        found.context_savers = []
        return found


def is_block(tap: str) -> bool:
    """Whether this tap is after a whole block, not inside one (`down0.1`) or before all (`in`)."""
    return "." not in tap and tap != "in"
