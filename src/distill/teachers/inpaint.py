"""Inpainting models: they also read a mask and the latents of the picture around it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    FluxFillPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)
from torch import Tensor

from distill.core.types import FILL
from distill.teachers.flux import Flux
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3
from distill.teachers.sdxl import SDXL

SHIFTLESS = "This pipeline of diffusers decodes without the autoencoder's shift, which is added."


def mask_and_surroundings(teacher: PipelineTeacher, pixels: Tensor, fill: Tensor) -> Tensor:
    """The image channels [B, C', h, w] of pixels [B, 3, H, W] in [-1, 1] and of a mask
    [B, 1, H, W], 1 where the picture is to be filled.

    As in diffusers' pipelines: the latents of the picture with zeros (grey) in the filled part, and
    before them the mask at their size, by the nearest pixel. For a `whole_mask` it comes after
    them, with a channel for each pixel of a latent. The pipelines sample the latents from the
    autoencoder's posterior; these are its mean, so that a sample of the data is always the same.
    Raises ValueError for a mask of another size than the picture's.
    """
    if fill.shape[-2:] != pixels.shape[-2:]:
        sides = ("{}x{}".format(*reversed(x.shape[-2:])) for x in (fill, pixels))
        raise ValueError("a mask of {} pixels for a picture of {}".format(*sides))
    fill = (fill >= 0.5).to(pixels.dtype)
    around = teacher.encode(pixels * (1 - fill))
    if teacher.whole_mask:
        return torch.cat([around, F.pixel_unshuffle(fill, fill.shape[-1] // around.shape[-1])], 1)
    return torch.cat([F.interpolate(fill, size=around.shape[-2:]), around], 1)


class Fills(PipelineTeacher):
    """Part of a teacher that reads a mask and what is around it beside the sample."""

    image = "mask"
    draws = (0, 1)
    single_file = None

    def image_of(self, batch: Mapping[str, Any]) -> Tensor:
        """The mask and the surroundings. Raises ValueError for data without masks or pictures."""
        if "pixels" not in batch or FILL not in batch:
            raise ValueError(
                "this teacher fills masked parts of pictures, and these data have no masks: use"
                " data=images data.masks=true"
            )
        return mask_and_surroundings(self, batch["pixels"], batch[FILL])


class SDInpaint(Fills, SD):
    """A `StableDiffusionInpaintPipeline` of nine channels (SD 1.5 and 2; folder or hub id)."""

    kind = StableDiffusionInpaintPipeline


class SDXLInpaint(Fills, SDXL):
    """A `StableDiffusionXLInpaintPipeline` of nine channels (folder or hub id)."""

    kind = StableDiffusionXLInpaintPipeline


class SD3Inpaint(Fills, SD3):
    """A `StableDiffusion3InpaintPipeline` whose transformer reads 33 channels (folder or hub id).

    Pictures are decoded with the autoencoder's shift, which diffusers' pipeline leaves out: its own
    latents are the same.
    """

    kind = StableDiffusion3InpaintPipeline
    prepares = """decode, shift = pipe.vae.decode, pipe.vae.config.shift_factor
pipe.vae.decode = lambda latents, **options: decode(latents + shift, **options)
"""

    @classmethod
    def remarks(cls, call: Mapping[str, Any]) -> list[str]:
        return [SHIFTLESS]


class FluxFill(Fills, Flux):
    """A `FluxFillPipeline` (FLUX.1 Fill; folder or hub id). See `Flux` for the arguments."""

    kind = FluxFillPipeline
    unused = ()
    whole_mask = True
    draws = (1, 1)

    def __init__(
        self,
        path: str,
        *,
        guidance: float = 30.0,
        size: int = 1024,
        length: int = 512,
        **options: Any,
    ):
        super().__init__(path, guidance=guidance, size=size, length=length, **options)
