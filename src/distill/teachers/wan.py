"""Wan 2.1 and 2.2: a transformer of videos on the rectified flow, v = eps - x0, network time 1000
t, conditioned on a UMT5.

Latents are [B, C, T, H, W]. Its autoencoder encodes the first frame alone, and then four frames
together, so 4 k + 1 frames are k + 1 of latents. A token is 1 x 2 x 2 latents. Wan 2.2 TI2V tells
each token its own time; without a first picture all of them are equal, which is one time for all.
"""

from typing import Any

from diffusers import WanPipeline
from torch import Tensor, nn

from distill.core.limits import FRAMES, check_frames
from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.transformer import Transformer


class WanTransformer(Transformer):
    """Taps `block0`, ... after the blocks, maps [B, C', T, H', W']."""

    targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    @property
    def patch(self) -> int:
        return int(self.model.config.patch_size[-1])

    @property
    def caption_width(self) -> int:
        return int(self.model.config.text_dim)

    def layers(self) -> dict[str, nn.Module]:
        return {f"block{i}": block for i, block in enumerate(self.model.blocks)}

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        velocity: Tensor = self.model(x_t, 1000 * t, encoder_hidden_states=cond.tokens).sample
        return velocity


class Wan(PipelineTeacher):
    """A `WanPipeline` with one transformer (Wan 2.1 T2V, Wan 2.2 TI2V 5B; folder or hub id). It has
    no pooled embedding, so heads are conditioned only on the noise level.

    Its pipeline cleans captions, also where ftfy is not installed, and pads them with zeros that
    the transformer reads. The autoencoder computes in float32, as the pipeline's documentation has
    it.

    Args:
        frames: of a video, 4 k + 1; the pipeline's files do not say it.
        height, width: of a video in pixels; they do not say these either.
        length: tokens of the UMT5.
        fps: frames per second at which videos are played; nothing is computed from it.
    """

    kind = WanPipeline
    autoencoder = "AutoencoderKLWan"
    standardised = True
    usual_unit = 16
    flow = True
    in_float32 = True
    video = True
    embedding_options = ("length",)

    def __init__(
        self,
        path: str,
        *,
        frames: int = 81,
        height: int = 480,
        width: int = 832,
        length: int = 512,
        fps: int = 16,
        **options: Any,
    ):
        check_frames(frames)
        self.frames, self.height, self.width = frames, height, width
        self.length, self.fps = length, fps
        super().__init__(path, **options)
        self.shape_of([width, height], "teacher.width and height")

    def family_options(self) -> dict[str, Any]:
        names = ("frames", "height", "width", "length", "fps")
        return {name: getattr(self, name) for name in names}

    def call_options(self) -> dict[str, Any]:
        size = {**self.sides(), "num_frames": self.frames}
        return {**super().call_options(), **size, "max_sequence_length": self.length}

    def encode(self, pixels: Tensor) -> Tensor:
        """Videos [B, 3, F, H', W'] in [-1, 1] of 4 k + 1 frames -> latents [B, C, k + 1, H, W].

        Raises ValueError for pictures.
        """
        if pixels.ndim != 5:
            what = "this teacher makes videos, and reads no pictures"
            raise ValueError(f"data: {what}; give its own samples, made by distill.synthesize")
        check_frames(pixels.shape[2])
        return super().encode(pixels)

    def _network(self) -> WanTransformer:
        if not hasattr(self.pipeline, "vae_scale_factor"):
            self.pipeline.vae_scale_factor = self.pipeline.vae_scale_factor_spatial
        return WanTransformer(self.pipeline.transformer, RectifiedFlow(), "flow")

    def _shape(self) -> tuple[int, ...]:
        cell = self.pipeline.vae_scale_factor
        sides = (self.height // cell, self.width // cell)
        return self.network.model.config.in_channels, (self.frames - 1) // FRAMES + 1, *sides

    def _longest_tokenizer(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, self.length

    def _encode(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        options["do_classifier_free_guidance"] = False
        return Cond(tokens=self.pipeline.encode_prompt(captions, **options)[0])
