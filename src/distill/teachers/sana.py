"""Sana: a transformer with linear attention on the rectified flow, v = eps - x0, network time 1000
t, conditioned on a Gemma.

Its autoencoder (DC-AE) encodes 32x32 pixels as one latent, which is one token.
"""

import inspect
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from distill.core.process import RectifiedFlow
from distill.core.transfers import send
from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.transformer import Transformer

TOKENS = 300  # length of captions in the pipeline
INSTRUCTION = (
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


class LinearDiT(Transformer):
    @property
    def caption_width(self) -> int:
        return self.model.config.caption_channels

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        conditioning = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        return self.model(
            x_t, timestep=1000 * t * self.model.config.timestep_scale, **conditioning
        ).sample


class Sana(PipelineTeacher):
    """A `SanaPipeline` (folder or hub id). It has no pooled embedding, so heads are conditioned
    only on the noise level.

    With `instruction` the text encoder reads the pipeline's instruction before each caption, but
    not before the empty one, as in the pipeline.
    """

    kind = SanaPipeline
    autoencoder = "AutoencoderDC"
    usual_unit = 32
    flow = True
    embedding_options = ("instruction",)

    def __init__(self, path: str, *, instruction: bool = True, **options: Any):
        self.instruction = INSTRUCTION if instruction else None
        super().__init__(path, **options)

    def family_options(self) -> dict[str, Any]:
        return {"instruction": self.instruction is not None}

    def call_options(self) -> dict[str, Any]:
        without = {} if self.instruction else {"complex_human_instruction": None}
        binned = {"use_resolution_binning": False}  # it would generate another size and resize
        return {**super().call_options(), **self.sides(), **binned, **without}

    def _network(self) -> LinearDiT:
        return LinearDiT(self.pipeline.transformer, RectifiedFlow(), "flow")

    def _latents(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent

    def _longest_tokenizer(self) -> tuple[Any, int]:
        # After an instruction there is room for one token less.
        return self.pipeline.tokenizer, TOKENS - bool(self.instruction)

    def _encode(self, captions: list[str]) -> Cond:
        cond = self._read(captions, self.instruction)
        if self.instruction is None or "" not in captions:
            return cond
        empty = self._read([""], None)
        has_text = torch.tensor([caption != "" for caption in captions])[:, None]
        has_text = send(has_text, cond.tokens.device)
        tokens = torch.where(has_text[..., None], cond.tokens, empty.tokens)
        return Cond(tokens=tokens, mask=torch.where(has_text, cond.mask, empty.mask))

    def _negative(self, caption: str) -> Cond:
        return self._read([caption], None)  # without the instruction

    def _read(self, captions: list[str], instruction: list[str] | None) -> Cond:
        options = {
            "device": self.device,
            "max_sequence_length": TOKENS,
            "complex_human_instruction": instruction,
        }
        tokens, mask, *_ = self.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, **options
        )
        return Cond(tokens=tokens, mask=mask)
