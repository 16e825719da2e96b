"""Stable Diffusion 3 and 3.5: an MMDiT on the rectified flow, v = eps - x0, network time 1000 t."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.silent_token_attention import fold, weights
from distill.teachers.transformer import Transformer

SILENT_TOKENS = (
    256  # what the pipeline passes for an absent third encoder (its default max_sequence_length)
)


class MMDiT(Transformer):
    """SD3.5 medium's first blocks attend a second time, among image tokens alone: a part of their
    output as any.
    """

    targets = (  # both streams' attention and feed-forward layers
        *(
            "to_q",
            "to_k",
            "to_v",
            "to_out.0",
            "add_q_proj",
            "add_k_proj",
            "add_v_proj",
            "to_add_out",
        ),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def __init__(self, model: SD3Transformer2DModel):
        super().__init__(model, RectifiedFlow(), "flow")
        self._folded = fold(model)
        self.holds.append(self._folded.hold)

    def around(self, model: Any) -> MMDiT:
        return MMDiT(model)

    @property
    def caption_width(self) -> int:
        return self.model.config.joint_attention_dim

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        image_tokens = x_t.shape[-1] * x_t.shape[-2] // self.patch**2
        inputs = {
            "encoder_hidden_states": cond.tokens,
            "pooled_projections": cond.pooled,
            "timestep": 1000 * t,
        }
        with weights(self._folded, cond.mask, image_tokens):
            return self.model(x_t, **inputs).sample


class SD3(PipelineTeacher):
    """A `StableDiffusion3Pipeline` (SD3, SD3.5; folder, hub id or single file), with or without its
    third text encoder.

    To leave that out, `without=["text_encoder_3", "tokenizer_3"]`; one that is silent is left out
    by itself.
    """

    kind = StableDiffusion3Pipeline
    spare = ("text_encoder_3", "tokenizer_3")
    usual_unit = 16
    flow = True
    padded = ("tokenizer", "tokenizer_2")
    rounds_up = True
    single_file = "transformer"

    def _network(self) -> MMDiT:
        self._silent()
        return MMDiT(self.pipeline.transformer)

    def _reader(self) -> tuple[Any, int]:
        if self.pipeline.text_encoder_3 is None:  # then nobody reads past CLIP's 77
            return super()._reader()
        return self.pipeline.tokenizer_3, SILENT_TOKENS

    def _silent(self) -> bool:
        """Whether the third text encoder is absent; one whose tokens are all zeros, as without it,
        is left out.
        """
        t5 = self.pipeline.text_encoder_3
        if t5 is not None and not t5.encoder.final_layer_norm.weight.count_nonzero():
            self.pipeline.text_encoder_3 = None
        return self.pipeline.text_encoder_3 is None

    def _encode(self, captions: list[str]) -> Cond:
        silent = self._silent()
        how = {
            "do_classifier_free_guidance": False,
            "max_sequence_length": 1 if silent else SILENT_TOKENS,
        }
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            *[captions] * 3, device=self.device, **how
        )
        counts = torch.ones(tokens.shape[:2], device=tokens.device)
        if silent:  # one zero token stands for all of them
            counts[:, -1] = SILENT_TOKENS
        return Cond(tokens=tokens, pooled=pooled, mask=counts)
