"""A frozen diffusers pipeline as a teacher; its families say how the denoiser is called and
captions are encoded.
"""

from __future__ import annotations

import inspect
import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.limits import AT_ONCE, at_once
from distill.core.process import Prediction, Process
from distill.core.tensors import fingerprint
from distill.core.types import Cond
from distill.machine.faults import silent
from distill.teachers.families import Family
from distill.teachers.loading.autoencoder import Autoencoder, scale_of, tiled
from distill.teachers.loading.locate import SINGLE
from distill.teachers.loading.reading import (
    check_parts,
    check_without,
    read_pipeline,
    read_quietly,
    told_of,
)
from distill.teachers.loading.single import read_single
from distill.teachers.loading.weights import put_on
from distill.teachers.network import Network, is_block
from distill.terminal.progress import stage

ENCODERS = ("vae", "text_encoder")  # what the names of a pipeline's parts begin with that encode
log = logging.getLogger(__name__)


class PipelineTeacher(nn.Module, Family):
    """A frozen diffusers pipeline as a teacher: denoiser, features, pixels <-> latents,
    captions -> Cond.

    With `checkpointing` a gradient through `decode` computes the decoder's activations again, block
    by block. `weights` is a file to put on the pipeline's denoiser, as few-step teachers come
    (DMD2, Hyper-SD): see `teachers/weights.py`. `vae` is a folder or hub id of an autoencoder in
    the pipeline's place, which its students keep. Where `path` is a single file, `config` is the
    pipeline that says what is in it: see `teachers/single.py`. `deferred`, text_encoder and vae,
    are read when they are first needed, and `release` lets them go again; what a run on cached
    embeddings wants, which sets `null`, the embedded empty caption.

    It stays in evaluation mode and takes no gradient for its own weights, whatever is called on it.
    Its attributes: `folder`, the local files, also of a pipeline of the hub, None for a single
    file's; `without`, parts that were left out; `channels`, of the map at every tap; `blocks` and
    `encoder`, the taps behind whole blocks and those of the half that reads; `latent_shape`, (C, H,
    W) at the size it was trained for; `patch`, latents a side that make one token, 1 where there
    are no tokens; `unit`, of which a picture's sides must be multiples: pixels a side per latent,
    times `patch`.
    """

    _said = False  # that a caption was too long
    own: tuple[str, ...] = ()  # options that this family alone has

    def __init_subclass__(cls) -> None:
        """A family with options of its own shows the shared ones too: a configuration is checked
        against them all.
        """
        shared, own = (
            inspect.signature(kind.__init__).parameters for kind in (PipelineTeacher, cls)
        )
        named = [
            p
            for p in {**shared, **own}.values()
            if p.name != "self" and p.kind is not p.VAR_KEYWORD
        ]
        cls.__signature__ = inspect.Signature(named)
        cls.own = tuple(p.name for p in named if p.name not in shared)

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        config: str | None = None,
        dtype: str = "float32",
        use_safetensors: bool = True,
        without: Sequence[str] = (),
        checkpointing: bool = False,
        weights: str | None = None,
        vae: str | None = None,
        deferred: Sequence[str] = (),
    ):
        super().__init__()
        read_quietly()
        check_without(self.kind, without)
        files = {"dtype": dtype, "use_safetensors": use_safetensors}
        own = Autoencoder(vae, self, **files) if vae else None
        left = (*self.unused, *without, *(["vae"] if own else []))
        options: dict[str, Any] = {**files, "without": left}
        name = Path(path).name if Path(path).exists() else path
        with stage(f"loading {name} ({self.kind.__name__})"):
            if Path(path).suffix in SINGLE:
                pipeline = read_single(self, path, config=config, **options)
            else:
                options |= {"revision": revision, "variant": variant, "deferred": deferred}
                pipeline = read_pipeline(self, path, **options)
        check_parts(path, pipeline.components)
        self.pipeline = pipeline
        self.folder = Path(pipeline.name_or_path) if pipeline.name_or_path else None
        pipeline.sampler = told_of(str(self.folder))["sampler"] if self.folder else {}
        if own:
            own.put_on(pipeline, later="vae" in deferred)
        elif pipeline.vae is None:  # deferred, and the pipeline guessed
            pipeline.vae_scale_factor = scale_of(self.folder)
        if weights:
            put_on(pipeline, weights)
        if pipeline.vae:
            self._upcast(pipeline.vae)
        if checkpointing and pipeline.vae:
            pipeline.vae.enable_gradient_checkpointing()
        self.network, self.without = self._network(), tuple(without)
        self.network.rounds_up = self.rounds_up
        self.variant, self.own_parts = variant, {"vae": own.home} if own else {}
        self.network.shift = pipeline.scheduler.config.get("shifted_timestep")
        self._encoders, self._brought = nn.ModuleList(self._coders()), set[str]()
        self.channels = {name: width for name, (_, width) in self.network.tappable().items()}
        self.blocks, self.encoder = (
            [tap for tap in self.channels if is_block(tap)],
            self.network.encoder,
        )
        self.latent_shape, self.patch = self._shape(), self.network.patch
        self.unit = self.patch * pipeline.vae_scale_factor
        if own:
            own.check(self.latent_shape[0])
        self.null: Cond | None = None
        super().train(False).requires_grad_(False)

    def train(self, mode: bool = True) -> PipelineTeacher:
        return self

    @abstractmethod
    def _network(self) -> Network:
        """The denoiser of `pipeline`, just read."""

    @abstractmethod
    def _encode(self, captions: list[str]) -> Cond: ...

    @property
    def part(self) -> str:
        """Which part of its pipeline is the denoiser."""
        return "transformer" if getattr(self.pipeline, "transformer", None) else "unet"

    def told(self) -> dict[str, Any]:
        """The family's own options that the files do not tell: a student's folder keeps them."""
        return {}

    def call(self) -> dict[str, Any]:
        """Arguments for which diffusers' pipeline makes the pictures that this makes, besides
        prompt and steps.
        """
        return {"guidance_scale": 0.0}

    def sides(self) -> dict[str, int]:
        """Height and width in pixels of the pictures that it makes unless told."""
        height, width = (side * self.unit // self.patch for side in self.latent_shape[1:])
        return {"height": height, "width": width}

    def _shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents at the size it was trained for."""
        config = self.network.model.config
        return config.in_channels, config.sample_size, config.sample_size

    def shape_of(self, size: Any, key: str = "size") -> tuple[int, int, int]:
        """(C, H, W) of latents of `size`, pixels a side or [width, height]; None: at the size it
        was trained for.

        Raises ValueError, with the setting's `key`, for sides that it cannot make.
        """
        if size is None:
            return self.latent_shape
        sides = list(size) if isinstance(size, Sequence) else [size, size]
        most = self.unit * (self.network.positions or math.inf)
        if [isinstance(x, int) and 0 < x <= most and x % self.unit == 0 for x in sides] != [
            True,
            True,
        ]:
            what = f"a side, or [width,height], in multiples of {self.unit}"
            raise ValueError(
                f"{key}={size}: must be {what}{f' up to {most}' if most < math.inf else ''}"
            )
        width, height = (side * self.patch // self.unit for side in sides)
        return self.latent_shape[0], height, width

    def sides_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels of a picture whose latents have this shape, [..., H, W]."""
        height, width = (side * self.unit // self.patch for side in shape[-2:])
        return height, width

    def _latents(self, pixels: Tensor) -> Tensor:
        """The autoencoder's own latents: the mean of its posterior."""
        return self.vae.encode(pixels).latent_dist.mode()

    def _upcast(self, vae: nn.Module) -> None:
        """Keep an autoencoder in float32 that says it overflows in float16, as its pipeline
        does.
        """
        if self.upcasts and vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.float()

    def _spread(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and spread of the autoencoder's own latents, to go with x [B, C, H, W]; 0 and 1
        where it names none.
        """
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not mean or not std:  # a pipeline wants both
            return config.get("shift_factor") or 0.0, 1.0
        mean, std = (torch.tensor(y, dtype=x.dtype, device=x.device) for y in (mean, std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def _reader(self) -> tuple[Any, int]:
        """The tokenizer that reads most of a caption, and how many tokens, its marks included, are
        not cut off.
        """
        return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length

    def _bring(self, kind: str) -> None:
        """Read the parts of this kind that were deferred and are not there."""
        for name, read in self.pipeline.deferred.items():
            if name.startswith(kind) and name not in self._brought:
                self._brought.add(name)
                with stage(f"loading the teacher's {name}, which the cached data do without"):
                    part = read().eval().requires_grad_(False).to(self.device)
                if name == "vae":
                    self._upcast(part)
                setattr(self.pipeline, name, part)

    def release(self) -> None:
        """Let the deferred parts go that were read since."""
        for name in self._brought:
            setattr(self.pipeline, name, None)
        self._brought.clear()

    def only_encode(self, device: torch.device) -> None:
        """Move to the device without the denoiser, whose weights are let go."""
        self.network.model.to("meta")
        self._encoders.to(device)

    def marks(self, model: Any, *, scheduled: bool) -> list[Any]:
        """All that makes the pictures of `model`, itself or a student, with its encoders, but noise
        and steps.

        `scheduled` by its own scheduler; a student's sampler has its levels.
        """
        self._bring("text_encoder")
        network = getattr(model, "network", model)
        own = [
            getattr(network, "shift", None),
            getattr(network, "guidance", None),
            network.prediction,
        ]
        own += [network.process.alpha(torch.linspace(0, 1, 9)).tolist()]
        # what begins with _ is diffusers' own, its list of keys that the file lacks in any order
        if scheduled:
            own += sorted(
                (k, str(v))
                for k, v in self.pipeline.scheduler.config.items()
                if not k.startswith("_")
            )
        return [*own, *map(fingerprint, [network, self.vae, *self._coders()])]

    def _coders(self) -> list[nn.Module]:
        """The autoencoder and text encoders that are here."""
        parts = self.pipeline.components.items()
        return [part for name, part in parts if part is not None and name.startswith(ENCODERS)]

    @property
    def vae(self) -> Any:
        self._bring("vae")
        return self.pipeline.vae

    @property
    def process(self) -> Process:
        return self.network.process

    @property
    def prediction(self) -> Prediction:  # a sampler asks a student of either kind
        return self.network.prediction

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.parameters() if not p.is_meta)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network.x0(x_t, t, cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        return self.network.features(x_t, t, cond, taps)

    def of_patch(self, cond: Cond, whole: Sequence[int], corner: Sequence[int]) -> Cond:
        return self.network.of_patch(cond, whole, corner)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] -> scaled latents [B, C, H, W] (posterior means), a few at
        a time.
        """
        parts = pixels.to(self.vae.dtype).split(at_once(*pixels.shape[-2:]))
        latents = torch.cat([self._latents(part) for part in parts]).to(pixels.dtype)
        mean, std = self._spread(latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """As `decode`, of any number of latents and any size, for looking at: no gradient, memory
        of a few pictures.

        As many at a time as `limits.at_once` says. Pictures of more pixels than that are decoded in
        tiles that overlap, as diffusers' `enable_tiling` has it, where the autoencoder knows how.
        """
        height, width = self.sides_of(latents.shape)
        with tiled(self.vae, height * width > AT_ONCE):
            return torch.cat([self.decode(part) for part in latents.split(at_once(height, width))])

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H, W] -> pixels [B, 3, S, S] in [-1, 1] (not clamped; gradient
        flows).
        """
        mean, std = self._spread(latents)
        raw = latents * std / self.vae.config.scaling_factor + mean
        return self.vae.decode(raw.to(self.vae.dtype)).sample.to(latents.dtype)

    def save_memory(self, *, slicing: bool = False, tiling: bool = False) -> None:
        """Have the autoencoder work picture by picture, and in tiles of large ones, as diffusers
        does it.
        """
        if slicing:
            self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()

    def embed_negative(self, caption: str) -> Cond:
        """What guidance leads away from, of batch size 1, in float32: as its pipeline reads a
        negative prompt.
        """
        with silent():
            self._bring("text_encoder")
            return self._negative(caption).to(torch.float32)

    def _negative(self, caption: str) -> Cond:
        return self._encode([caption])

    def embed(self, captions: Sequence[str]) -> Cond:
        """Captions -> conditioning in float32 that knows its unconditional version.

        Warns once of one too long.
        """
        with silent():  # the pipelines say at every call what they cut
            if self.null is None:
                self._bring("text_encoder")
                self.null = self._encode([""]).to(torch.float32)
            self.null = self.null.to(self.device)
            if self.pipeline.deferred and not any(captions):  # known without an encoder
                return replace(
                    self.null.index(torch.zeros(len(captions), dtype=torch.long)), null=self.null
                )
            self._bring("text_encoder")
            if cut := None if self._said else self.unread(captions):
                self._said = True
            cond = replace(self._encode(list(captions)).to(torch.float32), null=self.null)
        if cut:
            log.warning(
                "a caption is longer than this teacher reads, and ends before %r; others are not"
                " named",
                cut,
            )
        return cond

    def unread(self, captions: Sequence[str]) -> str | None:
        """What the teacher does not read of the first caption that is too long for it."""
        tokenizer, most = self._reader()
        for caption in captions:
            if len(caption.encode()) + 2 <= most:  # a token is a byte at least
                continue
            ids = tokenizer(caption).input_ids
            if len(ids) > most:
                last = int(ids[-1] == tokenizer.eos_token_id)  # kept, behind what is left
                return tokenizer.decode(ids[most - last : len(ids) - last])
        return None
