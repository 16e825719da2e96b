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
from distill.teachers.sized import SizedTeacher
from distill.teachers.transformer import Transformer


class Packed(Transformer):
    """Taps `block0`, ... after the joint blocks, then `single0`, ... after the single-stream
    blocks.

    A guidance-distilled model (dev) is conditioned on guidance: one value here, for teacher and
    student. A model without that input (schnell) ignores it.
    """

    shifts = True
    joint_targets: tuple[str, ...] = (  # both streams' attention and feed-forward layers
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )
    # Other layers have names that end alike.
    single_targets: tuple[str, ...] = ("proj_out",)

    def __init__(self, model: nn.Module, guidance: float):
        super().__init__(model, RectifiedFlow(), "flow")
        self.guidance = guidance

    def with_model(self, model: nn.Module) -> Packed:
        return type(self)(model, self.guidance)

    @property
    def targets(self) -> Sequence[str]:  # type: ignore[override]
        single = range(len(self.model.single_transformer_blocks))
        named = [f"single_transformer_blocks.{i}.{x}" for i in single for x in self.single_targets]
        return (*self.joint_targets, *named)

    @property
    def patch(self) -> int:
        return 2  # the model's patch_size refers to packed tokens

    @property
    def image_channels(self) -> int:
        return int(self.model.config.in_channels - self.model.out_channels) // self.patch**2

    @property
    def latent_channels(self) -> int:
        return int(self.model.out_channels) // self.patch**2

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
        packed, positions = self.packed(x_t)
        tokens = self.model(
            packed,
            timestep=t,
            encoder_hidden_states=cond.tokens,
            **self.conditioning(positions, t, cond),
        ).sample
        return F.pixel_shuffle(self.grid(tokens, x_t), self.patch)

    def packed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, C'] of what it reads, [B, C, H, W], and their positions [N, 3]: 0, row and
        column.
        """
        cells = F.pixel_unshuffle(x, self.patch)
        rows, columns = (torch.arange(side, device=x.device) for side in cells.shape[-2:])
        positions = torch.cartesian_prod(rows, columns).float()
        return cells.flatten(2).transpose(1, 2), F.pad(positions, (1, 0))

    def conditioning(self, positions: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        """The model's other inputs, for image tokens at `positions` [N, 3]."""
        return {
            "pooled_projections": cond.pooled,
            "img_ids": positions,
            "txt_ids": positions.new_zeros(cond.tokens.shape[1], 3),
            **self.told(t),
        }

    def told(self, t: Tensor) -> dict[str, Tensor]:
        """The guidance [B] of which the model is told, if it is told one."""
        knows = self.model.config.guidance_embeds
        return {"guidance": torch.full_like(t, self.guidance)} if knows else {}


class Flux(SizedTeacher):
    """A `FluxPipeline` (FLUX.1 dev or schnell; folder or hub id).

    Args:
        guidance: guidance that a guidance-distilled model is conditioned on. Pass the same value to
            the exported student as `guidance_scale`.
        few_steps: whether the model is distilled, as schnell: a teacher of few steps, without
            guidance. No file says it.
        size: side of the pictures in pixels; the pipeline's files do not say it.
        length: tokens of the T5; schnell was trained with 256.
    """

    kind = FluxPipeline
    unused = ("image_encoder", "feature_extractor")
    packing = 2
    usual_unit = 16
    flow = True
    padded = ("tokenizer",)
    rounds_up = True
    trailing = True
    single_file = "transformer"

    def __init__(
        self, path: str, *, guidance: float = 3.5, few_steps: bool = False, **options: Any
    ):
        self.guidance, self.few_steps = guidance, few_steps
        super().__init__(path, **options)

    def family_options(self) -> dict[str, Any]:
        own = {"guidance": self.guidance, "few_steps": self.few_steps}
        return {**own, **super().family_options()}

    def call_options(self) -> dict[str, Any]:
        return {**super().call_options(), "guidance_scale": self.guidance}

    def _network(self) -> Packed:
        return Packed(self.pipeline.transformer, self.guidance)

    def _longest_tokenizer(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer_2, self.length

    def _encode(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        tokens, pooled, _ = self.pipeline.encode_prompt(captions, captions, **options)
        return Cond(tokens=tokens, pooled=pooled)
