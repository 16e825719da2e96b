"""What teacher and student share: a diffusers network together with the process it was trained on.

x0(x_t, t, cond) = process.to_x0(network's prediction)          t in [0, 1], 0 data, 1 noise
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor, nn

from distill.process import Prediction, Process
from distill.teachers.taps import tap
from distill.types import Cond


class Network(nn.Module):
    """A denoiser. Concrete networks say how to call the diffusers model and where it can be tapped."""

    def __init__(self, model: nn.Module, process: Process, prediction: Prediction):
        super().__init__()
        self.model, self.process, self.prediction = model, process, prediction

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The model's own prediction, of the shape of x_t [B, C, H, W]."""

    @abstractmethod
    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        """Tap name -> module and the number of channels of its map, in the order in which they run."""

    @abstractmethod
    def to_map(self, output: object, x_t: Tensor) -> Tensor:
        """Output of a tapped module -> map [B, C', H', W'], contiguous."""

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Clean estimate [B, C, H, W] from x_t [B, C, H, W] at t [B]."""
        return self.process.to_x0(self.predict(x_t, t, cond), x_t, t, self.prediction)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        """Maps [B, C', H', W'] at `taps`; the network stops after the last one. Gradient reaches x_t."""
        known = self.tappable()
        unknown = [name for name in taps if name not in known]
        if unknown:
            raise ValueError(f"no such taps: {', '.join(unknown)}; this network has {', '.join(known)}")
        modules = {name: known[name][0] for name in taps}
        return tap(lambda: self.predict(x_t, t, cond), modules, lambda output: self.to_map(output, x_t))

    def channels(self) -> dict[str, int]:
        """Channels of the map at every tap."""
        return {name: width for name, (_, width) in self.tappable().items()}

    def twin(self) -> Network:
        """A trainable copy with weights of its own: the student of the same size."""
        other = copy.deepcopy(self)
        return other.requires_grad_(True).train()


class Frozen(nn.Module):
    """A module that stays in evaluation mode and takes no gradient for its own weights, whatever is called on it."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Frozen:
        return self


class PipelineTeacher(Frozen):
    """A frozen diffusers pipeline as a teacher: denoiser, features, pixels <-> latents, captions -> Cond."""

    def __init__(self, pipeline: object, network: Network):
        super().__init__()
        self.network, self.vae, self.path = network, pipeline.vae, pipeline.name_or_path
        self._pipeline = (pipeline,)  # in a tuple: its parts that are not ours must not become submodules twice
        self.text_encoders = nn.ModuleList(
            m for n, m in pipeline.components.items() if n.startswith("text_encoder") and m is not None
        )
        self.freeze()
        self._null: Cond | None = None

    @property
    def pipeline(self) -> object:
        """The diffusers pipeline that this teacher was read from."""
        return self._pipeline[0]

    @property
    def folder(self) -> Path:
        """The local files of this pipeline, also when it came from the hub."""
        return Path(self.path)

    @property
    def process(self) -> Process:
        return self.network.process

    @property
    def channels(self) -> dict[str, int]:
        return self.network.channels()

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latents' (C, H, W) at the size the model was trained for."""
        side = self.network.model.config.sample_size
        return self.network.model.config.in_channels, side, side

    @property
    def patch(self) -> int:
        """Latents a side that make one token; 1 where there are no tokens."""
        return self.network.model.config.get("patch_size") or 1

    @property
    def unit(self) -> int:
        """A picture's sides must be multiples of this: pixels a side per latent, times `patch`."""
        return self.patch * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network.x0(x_t, t, cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        return self.network.features(x_t, t, cond, taps)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] -> scaled latents [B, C, H, W] (posterior means)."""
        latents = self.vae.encode(pixels).latent_dist.mode()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H, W] -> pixels [B, 3, S, S] in [-1, 1] (not clamped; gradient flows)."""
        raw = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(raw).sample

    def embed(self, captions: Sequence[str]) -> Cond:
        """Captions -> conditioning that knows its unconditional version."""
        if self._null is None or self._null.tokens.device != self.device:
            self._null = self._encode([""])
        return Cond(**{**vars(self._encode(list(captions))), "null": self._null})

    @abstractmethod
    def _encode(self, captions: list[str]) -> Cond: ...


def read_quietly() -> None:
    """Silence the loading bars of diffusers and transformers: a dozen for one small pipeline."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
