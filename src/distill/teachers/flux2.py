"""FLUX.2: an MMDiT on the rectified flow, v = eps - x0, network time t, conditioned on three hidden
layers of a language model.

A latent is a square of 2x2 of the autoencoder's, standardised by its batch norm, and is one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor

from distill.core.types import Cond
from distill.teachers.chat import ChatTeacher
from distill.teachers.flux import Packed

SQUARE = 2  # side of a latent in the autoencoder's


class Folded(Packed):
    """Joint blocks, then single-stream blocks whose attention and feed-forward share their layers.

    A guidance-distilled model (dev) is conditioned on guidance; klein has no such input.
    """

    shifts = False  # by the size and the number of steps, whatever the scheduler's settings are
    joint_targets = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "to_qkv_mlp_proj",
    )
    single_targets = ("attn.to_out",)

    @property
    def patch(self) -> int:
        return 1

    def mu(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        return compute_empirical_mu(tokens, steps)

    def conditioning(self, positions: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        length = cond.tokens.shape[1]
        order = torch.arange(length, device=positions.device, dtype=positions.dtype)
        return {
            "img_ids": F.pad(positions, (0, 1)),  # picture, row, column, place in the text
            "txt_ids": F.pad(order[:, None], (3, 0)),
            **self.told(t),
        }


class Flux2Family(ChatTeacher):
    """What both pipelines share. They have no pooled embedding, so heads are conditioned only on
    the noise level.
    """

    autoencoder = "AutoencoderKLFlux2"
    folding = 2
    usual_unit = 16
    flow = True
    trailing = True

    def _network(self) -> Folded:
        return Folded(self.pipeline.transformer, getattr(self, "guidance", 1.0))

    def _latents(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(super()._latents(pixels), SQUARE)

    def _pixels(self, latents: Tensor) -> Tensor:
        return super()._pixels(F.pixel_shuffle(latents, SQUARE))

    def _latent_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        mean, std = (y.view(1, -1, 1, 1).to(x) for y in (vae.bn.running_mean, std))
        return mean, std

    def _embedded(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        return Cond(tokens=self.pipeline.encode_prompt(captions, **options)[0])


class Flux2(Flux2Family):
    """A `Flux2Pipeline` (FLUX.2 dev; folder or hub id). Its Mistral reads a system message before
    each caption.

    Args:
        guidance: guidance that the model is conditioned on. Pass the same value to the exported
            student as `guidance_scale`.
        size: side of the pictures in pixels; the pipeline's files do not say it.
        length: tokens of the Mistral, with those of its template.
    """

    kind = Flux2Pipeline
    caption_at = "messages[-1].content[0].text"
    template_options: ClassVar[dict[str, Any]] = {"add_generation_prompt": False}

    def __init__(self, path: str, *, guidance: float = 4.0, **options: Any):
        self.guidance = guidance
        super().__init__(path, **options)

    def family_options(self) -> dict[str, Any]:
        return {"guidance": self.guidance, **super().family_options()}

    def call_options(self) -> dict[str, Any]:
        return {**super().call_options(), "guidance_scale": self.guidance}

    def _conversation(self, caption: str) -> list[dict[str, Any]]:
        (messages,) = format_input([caption], self.pipeline.system_message)
        return list(messages)


class Flux2Klein(Flux2Family):
    """A `Flux2KleinPipeline` (FLUX.2 klein, base or distilled to few steps; folder or hub id).

    A distilled one is a few-step teacher without guidance: its pipeline ignores any.
    """

    kind = Flux2KleinPipeline
    template_options: ClassVar[dict[str, Any]] = {
        "add_generation_prompt": True,
        "enable_thinking": False,
    }

    @property
    def few_steps(self) -> bool:
        return bool(self.pipeline.config.get("is_distilled"))
