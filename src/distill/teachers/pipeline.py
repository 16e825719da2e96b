"""A frozen diffusers pipeline as a teacher.

Subclasses, the families, define how the denoiser is called and how captions are encoded.
"""

from __future__ import annotations

import inspect
import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.limits import AT_ONCE, at_once
from distill.core.process import Prediction, Process, column
from distill.core.quantized_weights import Kind
from distill.core.tensors import fingerprint, strips
from distill.core.transfers import send
from distill.core.types import Cond
from distill.machine.faults import quiet_logging
from distill.teachers.families import Family
from distill.teachers.held_weights import HeldWeights, follow
from distill.teachers.loading.autoencoder import Autoencoder, scale_of, tiled
from distill.teachers.loading.locate import SINGLE
from distill.teachers.loading.reading import (
    check_parts,
    check_without,
    read_pipeline,
    read_quietly,
    student_info,
)
from distill.teachers.loading.single import read_single
from distill.teachers.loading.weights import put_on
from distill.teachers.network import Network, is_block
from distill.teachers.picture_sizes import PictureSizes
from distill.terminal.progress import stage

ENCODERS = ("vae", "text_encoder")  # names of a pipeline's encoding parts start with these
log = logging.getLogger(__name__)


class PipelineTeacher(nn.Module, Family, PictureSizes, HeldWeights):
    """A frozen diffusers pipeline as a teacher: denoiser, features, pixels <-> latents, captions ->
    Cond.

    checkpointing: gradient through `decode` computes the decoder's activations again, block by
    block. weights: a file to load into the denoiser, such as DMD2 or Hyper-SD publish; see
    `teachers/loading/weights.py`. vae: a folder or hub id of an autoencoder that replaces the
    pipeline's, also in its students. config: for a `path` that is a single file, the pipeline that
    describes it; see `teachers/loading/single.py`. tiling: pictures larger than the
    autoencoder's own pass it in tiles, as in diffusers. deferred: text_encoder or vae; such parts
    are loaded when first needed, and `release` removes them again. A run on cached embeddings uses
    this, and sets `null`, the embedded empty caption. quantize: int8, fp8 or nf4, what
    `hold_quantized` makes of the denoiser's frozen weights in training.

    The teacher stays in eval mode and its weights take no gradient, whatever is called on it.
    Attributes: `folder`, the local files, also of a hub pipeline; None for a single file.
    `without`, parts that were left out. `channels`, of the map at every tap. `blocks`, the taps
    after whole blocks. `encoder`, the taps of the encoder half. `latent_shape`, (C, H, W) at the
    size of its training. `patch`, side of a token in latents, 1 without tokens. `unit`, pixels per
    latent times `patch`: a picture's sides must be multiples of it.
    """

    frames = 1  # of a sample, in pixels; above 1 for videos
    _warned = False  # whether a warning about a too long caption was given
    family_keys: tuple[str, ...] = ()  # options that only this family has

    def __init_subclass__(cls) -> None:
        """Add the shared options to the signature of a family, so that configurations can be
        checked.
        """
        shared = inspect.signature(PipelineTeacher.__init__).parameters
        every = dict(shared)
        for kind in reversed(cls.__mro__[: cls.__mro__.index(PipelineTeacher)]):
            if "__init__" in vars(kind):  # else it is that of its base
                every |= inspect.signature(kind.__init__).parameters
        named = [p for p in every.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]
        cls.__signature__ = inspect.Signature(named)
        cls.family_keys = tuple(p.name for p in named if p.name not in shared)

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
        tiling: bool = False,
        quantize: Kind | None = None,
        deferred: Sequence[str] = (),
    ):
        super().__init__()
        read_quietly()
        check_without(self.kind, without)
        files = {"dtype": dtype, "use_safetensors": use_safetensors}
        autoencoder = Autoencoder(vae, self, **files) if vae else None
        left_out = (*self.unused, *without, *(["vae"] if autoencoder else []))
        options: dict[str, Any] = {**files, "without": left_out}
        name = Path(path).name if Path(path).exists() else path
        with stage(f"loading {name} ({self.kind.__name__})"):
            if Path(path).suffix in SINGLE:
                pipeline = read_single(self, path, config=config, variant=variant, **options)
            else:
                options |= {"revision": revision, "variant": variant, "deferred": deferred}
                pipeline = read_pipeline(self, path, **options)
        check_parts(path, pipeline.components)
        self.pipeline = pipeline
        self.folder = Path(pipeline.name_or_path) if pipeline.name_or_path else None
        pipeline.sampler = student_info(str(self.folder))["sampler"] if self.folder else {}
        if autoencoder:
            autoencoder.put_on(pipeline, later="vae" in deferred)
        elif pipeline.vae is None:  # deferred: diffusers assumed a scale
            pipeline.vae_scale_factor = scale_of(self.folder)
        if weights:
            put_on(pipeline, weights)
        self.tiling, self.quantize, self.variant = tiling, quantize, variant
        if pipeline.vae:
            self._prepare(pipeline.vae)
        if checkpointing and pipeline.vae:
            pipeline.vae.enable_gradient_checkpointing()
        self.network, self.without = self._generator() or self._network(), tuple(without)
        self.network.rounds_up, self.network.draws = self.rounds_up, self.draws
        self.own_parts = {"vae": autoencoder.home} if autoencoder else {}
        self.network.shift = pipeline.scheduler.config.get("shifted_timestep")
        self._encoders, self._loaded_parts = nn.ModuleList(self._encoding_parts()), set[str]()
        self.channels = {name: width for name, (_, width) in self.network.tappable().items()}
        self.blocks = [tap for tap in self.channels if is_block(tap)]
        self.encoder, self.patch = self.network.encoder, self.network.patch
        self.unit = self.patch * self.folding * pipeline.vae_scale_factor
        self.latent_shape = self._shape()
        if autoencoder:
            autoencoder.check(self.latent_shape[0] // self.folding**2)
        self.null: Cond | None = None
        super().train(False).requires_grad_(False)

    def train(self, mode: bool = True) -> PipelineTeacher:
        return self

    @abstractmethod
    def _network(self) -> Network:
        """The denoiser of the loaded `pipeline`."""

    def _generator(self) -> Network | None:
        """The GAN's generator in the place of the denoiser, in families that can call one."""
        return None

    @abstractmethod
    def _encode(self, captions: list[str]) -> Cond: ...

    @property
    def part(self) -> str:
        """Name of the pipeline's part that is the denoiser."""
        return "transformer" if getattr(self.pipeline, "transformer", None) else "unet"

    def family_options(self) -> dict[str, Any]:
        """Options that the pipeline's files do not hold. A student's folder saves them."""
        return {}

    def call_options(self) -> dict[str, Any]:
        """Arguments with which diffusers' pipeline generates the same pictures, without prompt and
        steps.
        """
        return {"guidance_scale": 0.0}

    def guided_call(self, scale: float) -> dict[str, Any]:
        """Arguments with which diffusers' pipeline guides by `scale` against the empty caption."""
        return {"guidance_scale": scale}

    def _latents(self, pixels: Tensor) -> Tensor:
        """Unscaled latents: the mean of the autoencoder's posterior."""
        return self.vae.encode(pixels).latent_dist.mode()

    def _pixels(self, latents: Tensor) -> Tensor:
        """The reverse of `_latents`."""
        pixels: Tensor = self.vae.decode(latents).sample
        return pixels

    def _prepare(self, vae: Any) -> None:
        """In the dtype that its pipeline decodes in; in tiles if asked."""
        dtype = str(vae.dtype).removeprefix("torch.")
        if self.autoencoder_dtype(dtype, vae.config) != dtype:
            vae.float()  # diffusers' `to` warns, though no module of it stays in float32
        if self.tiling and hasattr(vae, "enable_tiling"):
            vae.enable_tiling()

    def _latent_statistics(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of the unscaled latents, to go with x [B, C, H, W].

        0 and 1 where the autoencoder names none.
        """
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not mean or not std:  # a pipeline needs both
            return config.get("shift_factor") or 0.0, 1.0
        mean, std = (send(torch.tensor(y, dtype=x.dtype), x.device) for y in (mean, std))
        return column(mean, x[0])[None], column(std, x[0])[None]

    @property
    def _latent_scale(self) -> float:
        """Factor of the latents; 1 where the autoencoder names none."""
        return float(self.vae.config.get("scaling_factor") or 1.0)

    def _longest_tokenizer(self) -> tuple[Any, int]:
        """The tokenizer with the largest maximum length, and that length with special tokens."""
        return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length

    def _load_deferred(self, kind: str) -> None:
        """Load the deferred parts of this kind. Loaded ones follow the teacher to its device."""
        for name in [name for name in self.pipeline.deferred if name.startswith(kind)]:
            if name not in self._loaded_parts:
                self._loaded_parts.add(name)
                with stage(f"loading the teacher's {name}, which is needed now"):
                    part = self.pipeline.deferred[name]().eval().requires_grad_(False)
                if name == "vae":
                    self._prepare(part)
                setattr(self.pipeline, name, part)
                check_parts(str(self.folder), self.pipeline.components)
            follow(getattr(self.pipeline, name), self.device)

    def release(self) -> None:
        """Remove the deferred parts that were loaded since."""
        for name in self._loaded_parts:
            setattr(self.pipeline, name, None)
        self._loaded_parts.clear()

    def only_encode(self, device: torch.device) -> None:
        """Move to the device without the denoiser, whose weights are freed."""
        self.network.model.to("meta")
        self._encoders.to(device)

    def provenance(self, model: Any, *, scheduled: bool) -> list[Any]:
        """All that determines the pictures of `model`, itself or a student, but noise and steps.

        `scheduled`: whether the pipeline's scheduler samples; a student's sampler sets its levels
        itself.
        """
        self._load_deferred("text_encoder")
        network = getattr(model, "network", model)
        alphas = network.process.alpha(torch.linspace(0, 1, 9)).tolist()
        values = [getattr(network, key, None) for key in ("shift", "guidance")]
        values += [network.prediction, alphas]
        # keys that start with _ are set by diffusers, and their lists have no fixed order
        if scheduled:
            values += sorted(
                (k, str(v))
                for k, v in self.pipeline.scheduler.config.items()
                if not k.startswith("_")
            )
        return [*values, *map(fingerprint, [network, self.vae, *self._encoding_parts()])]

    def _encoding_parts(self) -> list[nn.Module]:
        """The loaded autoencoder and text encoders."""
        parts = self.pipeline.components.items()
        return [part for name, part in parts if part is not None and name.startswith(ENCODERS)]

    @property
    def vae(self) -> Any:
        self._load_deferred("vae")
        return self.pipeline.vae

    @property
    def process(self) -> Process:
        return self.network.process

    @property
    def prediction(self) -> Prediction:  # for samplers: networks and teachers have it
        return self.network.prediction

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("meta"))

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.network.x0(x_t, t, cond)

    def rescaled(self, guided: Tensor, conditional: Tensor, x_t: Tensor) -> Tensor:
        return self.network.rescaled(guided, conditional, x_t)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        return self.network.features(x_t, t, cond, taps)

    def of_patch(self, cond: Cond, full: Sequence[int], corner: Sequence[int]) -> Cond:
        return self.network.of_patch(cond, full, corner)

    @property
    def image_channels(self) -> int:
        """Channels of `image_of`; 0 for a text-to-image model."""
        return self.network.image_channels

    def image_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        """What the denoiser reads of a batch's pictures beside the sample, `Cond.image`; None for a
        text-to-image model.
        """
        return None

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [-1, 1] -> scaled latents [B, C, H, W] (posterior means), in small
        batches.
        """
        parts = pixels.to(self.vae.dtype).split(at_once(*pixels.shape[-2:]))
        latents = torch.cat([self._latents(part) for part in parts]).to(pixels.dtype)
        mean, std = self._latent_statistics(latents)
        return (latents - mean) * self._latent_scale / std

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """As `decode`, for any number and size of latents, without gradient, with the memory of a
        few pictures.

        Batches are those of `limits.at_once`. Larger pictures are decoded in overlapping tiles, as
        with diffusers' `enable_tiling`, where the autoencoder supports it.
        """
        height, width = self.sides_of(latents.shape)
        with tiled(self.vae, height * width > AT_ONCE):
            batches = latents.split(at_once(height, width * self.frames))
            return torch.cat([self.decode(part) for part in batches])

    def pictures(self, latents: Tensor) -> Tensor:
        """As `decoded`; of videos pictures [B, 3, S, n S] of n of their frames, side by side."""
        return strips(self.decoded(latents))

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, H, W] -> pixels [B, 3, S, S] in [-1, 1], not clamped;
        differentiable.
        """
        mean, std = self._latent_statistics(latents)
        raw = latents * std / self._latent_scale + mean
        return self._pixels(raw.to(self.vae.dtype)).to(latents.dtype)

    def save_memory(self, *, slicing: bool = False, tiling: bool = False) -> None:
        """Have the autoencoder work picture by picture, and in tiles for large ones, as in
        diffusers.
        """
        if slicing:
            self.vae.enable_slicing()
        if tiling:
            self.vae.enable_tiling()

    def embed_negative(self, caption: str) -> Cond:
        """Embedded negative prompt, of batch size 1, in float32, as its pipeline embeds it."""
        with quiet_logging():
            self._load_deferred("text_encoder")
            return self._precise(self._negative, caption)

    def _precise(self, encode: Callable[..., Cond], captions: Any) -> Cond:
        """Encoded outside autocast: the result may be kept, and serves calls without it too."""
        with torch.autocast(self.device.type, enabled=False):
            return encode(captions).to(torch.float32)

    def _negative(self, caption: str) -> Cond:
        return self._encode([caption])

    def embed(self, captions: Sequence[str]) -> Cond:
        """Captions -> conditioning in float32, with its unconditional version.

        Warns once of a caption that is too long.
        """
        with quiet_logging():  # pipelines warn of truncation at every call
            if self.null is None:
                self._load_deferred("text_encoder")
                self.null = self._precise(self._encode, [""])
            self.null = self.null.to(self.device)
            if list(captions) == [""]:  # cached data ask for it in every step
                return replace(self.null, null=self.null)
            if self.pipeline.deferred and not any(captions):  # needs no encoder
                rows = torch.zeros(len(captions), dtype=torch.long)
                return replace(self.null.index(rows), null=self.null)
            self._load_deferred("text_encoder")
            if cut := None if self._warned else self.unread(captions):
                self._warned = True
            cond = replace(self._encode(list(captions)).to(torch.float32), null=self.null)
        if cut:
            log.warning(
                "a caption is longer than this teacher reads, and ends before %r; others are not"
                " named",
                cut,
            )
        return cond

    def unread(self, captions: Sequence[str]) -> str | None:
        """The unread end of the first caption that is too long for the teacher, or None."""
        tokenizer, most = self._longest_tokenizer()
        # A token has at least one byte. One call for all: each takes about a millisecond.
        long = [caption for caption in captions if len(caption.encode()) + 2 > most]
        for ids in tokenizer(long).input_ids if long else ():
            if len(ids) > most:
                last = int(ids[-1] == tokenizer.eos_token_id)  # kept after truncation
                return tokenizer.decode(ids[most - last : len(ids) - last])
        return None
