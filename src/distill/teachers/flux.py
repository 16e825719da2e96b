"""FLUX.1: an MMDiT on the rectified flow, v = eps - x0, network time t. Its tokens are
2x2 latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.transformer import Transformer


class Packed(Transformer):
    """Taps `block0`, ... after the joint blocks, then `single0`, ... after the single-stream
    blocks.

    A guidance-distilled model (dev) is conditioned on guidance: one value here, for teacher and
    student. A model without that input (schnell) ignores it.
    """

    def __init__(self, model: nn.Module, guidance: float):
        super().__init__(model, RectifiedFlow(), "flow")
        self.guidance = guidance

    def with_model(self, model: nn.Module) -> Packed:
        return Packed(model, self.guidance)

    @property
    def patch(self) -> int:
        return 2  # the model's patch_size refers to packed tokens

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Number and channels of the tokens for latents of `shape`, (C, H, W), as in the
        pipeline.
        """
        channels, height, width = shape
        return height * width // self.patch**2, channels * self.patch**2

    def unpacked(self, tokens: Tensor, shape: Sequence[int]) -> Tensor:
        """Tokens [B, N, C'] of the pipeline -> latents [B, *shape], with shape (C, H, W)."""
        rows = tokens.transpose(1, 2).unflatten(2, [side // self.patch for side in shape[1:]])
        return F.pixel_shuffle(rows, self.patch)

    def layers(self) -> dict[str, nn.Module]:
        return super().layers() | {
            f"single{i}": b for i, b in enumerate(self.model.single_transformer_blocks)
        }

    @property
    def caption_width(self) -> int:
        return self.model.config.joint_attention_dim

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        packed = F.pixel_unshuffle(x_t, self.patch)
        rows, columns = (torch.arange(side, device=x_t.device) for side in packed.shape[-2:])
        positions = torch.cartesian_prod(rows, columns).float()
        tokens = self.model(
            packed.flatten(2).transpose(1, 2),
            timestep=t,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.pooled,
            img_ids=F.pad(positions, (1, 0)),
            txt_ids=positions.new_zeros(cond.tokens.shape[1], 3),
            guidance=torch.full_like(t, self.guidance)
            if self.model.config.guidance_embeds
            else None,
        ).sample
        return F.pixel_shuffle(self.grid(tokens, x_t), self.patch)


class Flux(PipelineTeacher):
    """A `FluxPipeline` (FLUX.1 dev or schnell; folder or hub id).

    Args:
        guidance: guidance that a guidance-distilled model is conditioned on. Pass the same value to
            the exported student as `guidance_scale`.
        size: side of the pictures in pixels; the pipeline's files do not say it.
        length: tokens of the T5; schnell was trained with 256.
    """

    kind = FluxPipeline
    unused = ("image_encoder", "feature_extractor")
    packing = 2
    usual_unit = 16
    flow = True
    padded = ("tokenizer",)
    embedding_options = ("length",)
    rounds_up = True
    trailing = True
    single_file = "transformer"

    def __init__(
        self,
        path: str,
        *,
        guidance: float = 3.5,
        size: int = 1024,
        length: int = 512,
        **options: Any,
    ):
        self.guidance, self.size, self.length = guidance, size, length
        super().__init__(path, **options)
        if size % self.unit:
            raise ValueError(
                f"teacher.size={size}: must be a multiple of {self.unit} for this teacher"
            )

    def family_options(self) -> dict[str, Any]:
        return {"guidance": self.guidance, "size": self.size, "length": self.length}

    def call_options(self) -> dict[str, Any]:
        options = {"guidance_scale": self.guidance, "max_sequence_length": self.length}
        return {**options, **self.sides()}

    def _network(self) -> Packed:
        return Packed(self.pipeline.transformer, self.guidance)

    def _shape(self) -> tuple[int, int, int]:
        side = self.size // self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels // self.network.patch**2, side, side

    def _longest_tokenizer(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer_2, self.length

    def _encode(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        tokens, pooled, _ = self.pipeline.encode_prompt(captions, captions, **options)
        return Cond(tokens=tokens, pooled=pooled)
