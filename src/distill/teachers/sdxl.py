"""Stable Diffusion XL: SD's UNet, also conditioned on a pooled caption and on the
picture's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from distill.core.process import Prediction, Process
from distill.core.transfers import send
from distill.core.types import Cond
from distill.teachers.sd import SD, UNet, step_of


class UNetXL(UNet):
    """The taps are those of SD. It is conditioned on the latents' size, without cropping, which is
    the default of its pipeline.

    For a patch it is conditioned on the size of the full picture and on the position of the patch,
    as for crops in its training. `of_patch` writes these into the cond's `extra`, pixels [B, 4]:
    height and width of the full picture, row and column of the corner.
    """

    def __init__(self, model: nn.Module, process: Process, prediction: Prediction, cell: int):
        super().__init__(model, process, prediction)
        self.cell = cell  # side of a latent in pixels

    def with_model(self, model: nn.Module) -> UNetXL:
        return UNetXL(model, self.process, self.prediction, self.cell)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        height, width = (side * self.cell for side in x_t.shape[-2:])
        size = send(torch.tensor([height, width], dtype=x_t.dtype), x_t.device).expand(
            x_t.shape[0], -1
        )
        placement = (
            torch.cat([size, torch.zeros_like(size)], 1) if cond.extra is None else cond.extra
        )
        added = {"text_embeds": cond.pooled, "time_ids": torch.cat([placement, size], 1)}
        conditioning = {"encoder_hidden_states": cond.tokens, "added_cond_kwargs": added}
        return self.model(x_t, step_of(self.process, t), **conditioning).sample

    def of_patch(self, cond: Cond, full: Sequence[int], corner: Sequence[int]) -> Cond:
        placement = send(torch.tensor([*full, *corner]), cond.tokens.device) * self.cell
        extra = placement.to(cond.tokens.dtype).expand(len(cond), -1)
        return replace(cond, extra=extra)


class SDXL(SD):
    """A `StableDiffusionXLPipeline` (folder or hub id).

    Its autoencoder overflows in float16, so it stays in float32.
    """

    kind = StableDiffusionXLPipeline
    unused = ("feature_extractor", "image_encoder")
    upcasts = True
    standardised = True
    addition_embed_type = "text_time"
    padded = ("tokenizer", "tokenizer_2")

    @classmethod
    def remarks(cls, call: Mapping[str, Any]) -> list[str]:
        return []

    @classmethod
    def lora_base(cls, denoiser: Mapping[str, Any], predicts_v: bool) -> tuple[str, str]:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"

    def _unet(self, process: Process, prediction: Prediction) -> UNetXL:
        return UNetXL(self.pipeline.unet, process, prediction, self.pipeline.vae_scale_factor)

    def _encode(self, captions: list[str]) -> Cond:
        options: dict[str, Any] = {"device": self.device, "do_classifier_free_guidance": False}
        if self.clip_skip:  # editing pipelines do not take it
            options["clip_skip"] = self.clip_skip
        tokens, _, pooled, _ = self.pipeline.encode_prompt(captions, **options)
        if self.pipeline.config.force_zeros_for_empty_prompt:  # the empty caption is all zeros
            has_text = send(torch.tensor([caption != "" for caption in captions]), tokens.device)
            tokens, pooled = tokens * has_text[:, None, None], pooled * has_text[:, None]
        return Cond(tokens=tokens, pooled=pooled)
