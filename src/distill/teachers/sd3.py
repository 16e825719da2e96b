"""Stable Diffusion 3 and 3.5: an MMDiT on the rectified flow, v = eps - x0, network time 1000 t."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from distill.process import RectifiedFlow
from distill.teachers.folded import fold, weights
from distill.teachers.network import Network, PipelineTeacher
from distill.types import Cond

SILENT_TOKENS = 256  # what the pipeline passes for an absent third encoder (its default max_sequence_length)


class MMDiT(Network):
    """Taps `block0`, `block1`, ...: image tokens after each joint block, put back on the 2-D grid."""

    targets = (  # both streams' attention and feed-forward layers
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, model: SD3Transformer2DModel):
        super().__init__(model, RectifiedFlow(), "flow")
        self._folded = fold(model)
        self.holds.append(self._folded.hold)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        image_tokens = x_t.shape[-1] * x_t.shape[-2] // self.model.config.patch_size**2
        inputs = {"encoder_hidden_states": cond.tokens, "pooled_projections": cond.pooled, "timestep": 1000 * t}
        with weights(self._folded, cond.mask, image_tokens):
            return self.model(x_t, **inputs).sample

    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        return {f"block{i}": (b, self.model.inner_dim) for i, b in enumerate(self.model.transformer_blocks)}

    @property
    def encoder(self) -> list[str]:
        """The first half of the blocks: no part of an MMDiT is an encoder by name."""
        names = list(self.tappable())
        return names[: (len(names) + 1) // 2]

    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        tokens = output[1]  # a joint block returns (text tokens, image tokens)
        height, width = (side // self.model.config.patch_size for side in x_t.shape[-2:])
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width).contiguous()


class SD3(PipelineTeacher):
    """A `StableDiffusion3Pipeline` (SD3, SD3.5; folder or hub id), with or without its third text encoder.

    To leave that out, `without=["text_encoder_3", "tokenizer_3"]`; one that is silent is left out by itself.
    """

    kind = StableDiffusion3Pipeline

    def _network(self) -> MMDiT:
        t5 = self.pipeline.text_encoder_3
        if t5 is not None and not t5.encoder.final_layer_norm.weight.count_nonzero():
            self.pipeline.text_encoder_3 = None  # all its tokens are zeros, as the pipeline makes them without it
        return MMDiT(self.pipeline.transformer)

    def _encode(self, captions: list[str]) -> Cond:
        silent = self.pipeline.text_encoder_3 is None
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            *[captions] * 3,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=1 if silent else SILENT_TOKENS,
        )
        counts = torch.ones(tokens.shape[:2], device=tokens.device)
        if silent:  # one zero token stands for all of them
            counts[:, -1] = SILENT_TOKENS
        return Cond(tokens=tokens, pooled=pooled, mask=counts)
