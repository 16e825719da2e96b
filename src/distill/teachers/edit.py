"""Editing models: they also read the latents of a source picture, and follow an instruction.

InstructPix2Pix (Brooks et al. 2022, arXiv 2211.09800) guides by both, with three passes:

    eps = eps(0, 0) + s_I (eps(image, 0) - eps(0, 0)) + s_T (eps(image, text) - eps(image, 0))
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    FluxKontextPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from torch import Tensor

from distill.core.limits import at_once
from distill.teachers.flux import Flux, Packed
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd import SD
from distill.teachers.sdxl import SDXL

SOURCE = "source"  # name of the pictures before an edit in a batch
CACHED = "image"  # name of what the denoiser reads of them, from distill.cache


def source_latents(teacher: PipelineTeacher, batch: Mapping[str, Any]) -> Tensor:
    """The latents [B, C, h, w] of the batch's source pictures [B, 3, H, W] in [-1, 1].

    As in diffusers' pipelines they are the mean of the autoencoder's posterior. Only sources that
    are read `in_context` are scaled as the sample is. Raises ValueError for data without sources.
    """
    if CACHED in batch:
        return batch[CACHED].float()
    if SOURCE not in batch:
        raise ValueError(
            "this teacher edits pictures, and these data have no source pictures: use data=pairs"
        )
    pixels = batch[SOURCE]
    if teacher.in_context:
        return teacher.encode(pixels)
    parts = pixels.to(teacher.vae.dtype).split(at_once(*pixels.shape[-2:]))
    return torch.cat([teacher._latents(part) for part in parts]).to(pixels.dtype)


class Edits(PipelineTeacher):
    """Part of a teacher that reads a source picture beside the sample."""

    image = "source"
    single_file = None

    def image_of(self, batch: Mapping[str, Any]) -> Tensor:
        return source_latents(self, batch)


class InstructPix2Pix(Edits, SD):
    """A `StableDiffusionInstructPix2PixPipeline` of eight channels (folder or hub id)."""

    kind = StableDiffusionInstructPix2PixPipeline
    embedding_options = ()

    def __init__(self, path: str, *, size: int | None = None, **options: Any):
        # Without clip_skip, which these pipelines do not take.
        super().__init__(path, size=size, **options)

    def _tokens(self, captions: list[str]) -> Tensor:
        return self.pipeline._encode_prompt(captions, self.device, 1, False)  # it has no public one


class InstructPix2PixXL(InstructPix2Pix, SDXL):
    """A `StableDiffusionXLInstructPix2PixPipeline` of eight channels (folder or hub id)."""

    kind = StableDiffusionXLInstructPix2PixPipeline


class InContext(Packed):
    """A transformer that reads the source picture as further tokens, with 1 in place of 0 as the
    first coordinate of their positions. Maps and predictions are of the sample's tokens alone.
    """

    @property
    def image_channels(self) -> int:
        return int(self.model.out_channels) // self.patch**2

    def packed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 2 N, C'] and positions [2 N, 3] of the sample and, after it, of the source, x
        [B, 2 C, H, W].
        """
        (tokens, positions), (source, at) = map(super().packed, x.chunk(2, dim=1))
        return torch.cat([tokens, source], 1), torch.cat([positions, at + at.new_tensor([1, 0, 0])])

    def grid(self, tokens: Tensor, x_t: Tensor) -> Tensor:
        own = x_t.shape[-2] * x_t.shape[-1] // self.patch**2
        return super().grid(tokens[:, :own], x_t)

    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        tokens = output[1] if isinstance(output, tuple) else output
        both = 2 * x_t.shape[-2] * x_t.shape[-1] // self.patch**2
        return self.grid(tokens[:, -both:], x_t)


class FluxKontext(Edits, Flux):
    """A `FluxKontextPipeline` (FLUX.1 Kontext; folder or hub id). See `Flux` for the arguments.

    The source has the size of the sample.
    """

    kind = FluxKontextPipeline
    in_context = True

    def _network(self) -> InContext:
        return InContext(self.pipeline.transformer, self.guidance)

    def call_options(self) -> dict[str, Any]:
        # The pipeline generates pictures of about 1024 x 1024 from sources of such a size, unless
        # it is told otherwise.
        area = self.size**2
        own = {"max_area": area, "_auto_resize": False} if self.size != 1024 else {}
        return {**super().call_options(), **own}
