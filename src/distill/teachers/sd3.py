"""Stable Diffusion 3 and 3.5: an MMDiT on the rectified flow, v = eps - x0, network time 1000 t."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.generator import GeneratorNetwork, StyleGenerator
from distill.teachers.loading.locate import home_of
from distill.teachers.loading.shapes_only import stored
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.silent_token_attention import set_silent_token_attention, token_weights
from distill.teachers.transformer import Transformer

# Tokens that the pipeline passes for an absent third encoder (its default max_sequence_length).
SILENT_TOKENS = 256


class MMDiT(Transformer):
    """The first blocks of SD3.5 medium have a second attention, only among image tokens."""

    shifts = True
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
        self._silent_tokens = set_silent_token_attention(model)
        self.context_savers.append(self._silent_tokens.save_context)

    def with_model(self, model: Any) -> MMDiT:
        return MMDiT(model)

    @property
    def image_channels(self) -> int:
        return int(self.model.config.in_channels - self.model.out_channels)

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
        with token_weights(self._silent_tokens, cond.mask, image_tokens, cond.all_ones):
            return self.model(x_t, **inputs).sample


class SD3(PipelineTeacher):
    """A `StableDiffusion3Pipeline` (SD3, SD3.5; folder, hub id or single file), with or without its
    third text encoder.

    `without=["text_encoder_3", "tokenizer_3"]` leaves it out. An encoder whose tokens are all zeros
    is always left out.
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

    def _generator(self) -> GeneratorNetwork | None:
        if not isinstance(self.pipeline.transformer, StyleGenerator):
            return None
        self._silent()
        return GeneratorNetwork(self.pipeline.transformer)

    def _longest_tokenizer(self) -> tuple[Any, int]:
        if self.pipeline.text_encoder_3 is None:  # then no encoder reads more than CLIP's 77 tokens
            return super()._longest_tokenizer()
        return self.pipeline.tokenizer_3, SILENT_TOKENS

    def _silent(self) -> bool:
        """Whether the third text encoder is absent. This removes one whose tokens are all zeros,
        which is equivalent.
        """
        t5 = self.pipeline.text_encoder_3
        read = t5 is not None and not torch.compiler.is_exporting()  # which has no values
        if read and not self._gain(t5).count_nonzero():
            self.pipeline.text_encoder_3 = None
        return self.pipeline.text_encoder_3 is None

    def _gain(self, t5: Any) -> Tensor:
        """The gain of its last layer; of an encoder without values that of its file."""
        gain: Tensor = t5.encoder.final_layer_norm.weight
        home = Path(home_of(self.folder, "text_encoder_3")) if self.folder else None
        if not gain.is_meta or home is None:
            return gain
        found = stored(home / "text_encoder_3", "encoder.final_layer_norm.weight")
        return torch.ones(1) if found is None else found

    def _encode(self, captions: list[str]) -> Cond:
        silent = self._silent()
        options = {
            "do_classifier_free_guidance": False,
            "max_sequence_length": 1 if silent else SILENT_TOKENS,
        }
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            *[captions] * 3, device=self.device, **options
        )
        counts = torch.ones(tokens.shape[:2], device=tokens.device)
        if silent:  # one zero token replaces all of them
            counts[:, -1] = SILENT_TOKENS
        return Cond(tokens=tokens, pooled=pooled, mask=counts, all_ones=not silent)
