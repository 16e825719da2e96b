"""Sana: a transformer with linear attention on the rectified flow, v = eps - x0, network time 1000
t, told by a Gemma.

Its autoencoder (DC-AE) makes one latent of 32x32 pixels, and that is one token.
"""

import inspect
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.transformer import Transformer

TOKENS = 300  # that the pipeline passes
INSTRUCTION = (
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


class LinearDiT(Transformer):
    @property
    def caption_width(self) -> int:
        return self.model.config.caption_channels

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        return self.model(x_t, timestep=1000 * t * self.model.config.timestep_scale, **told).sample


class Sana(PipelineTeacher):
    """A `SanaPipeline` (folder or hub id). It has no pooled embedding: heads are told of the noise
    level alone.

    With `instruction` the text encoder reads each caption behind the pipeline's instruction to
    enrich it; the empty caption stands without, as the pipeline has it.
    """

    kind = SanaPipeline
    autoencoder = "AutoencoderDC"
    usual_unit = 32
    flow = True
    telling = ("instruction",)

    def __init__(self, path: str, *, instruction: bool = True, **options: Any):
        self.instruction = INSTRUCTION if instruction else None
        super().__init__(path, **options)

    def told(self) -> dict[str, Any]:
        return {"instruction": self.instruction is not None}

    def call(self) -> dict[str, Any]:
        without = {} if self.instruction else {"complex_human_instruction": None}
        binned = {"use_resolution_binning": False}  # it would draw another size, and resize
        return {**super().call(), **self.sides(), **binned, **without}

    def _network(self) -> LinearDiT:
        return LinearDiT(self.pipeline.transformer, RectifiedFlow(), "flow")

    def _latents(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels).latent

    def _reader(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, TOKENS - bool(
            self.instruction
        )  # one more is lost behind the instruction

    def _encode(self, captions: list[str]) -> Cond:
        told = self._read(captions, self.instruction)
        if self.instruction is None or "" not in captions:
            return told
        empty = self._read([""], None)
        kept = torch.tensor([caption != "" for caption in captions], device=told.tokens.device)[
            :, None
        ]
        tokens = torch.where(kept[..., None], told.tokens, empty.tokens)
        return Cond(tokens=tokens, mask=torch.where(kept, told.mask, empty.mask))

    def _negative(self, caption: str) -> Cond:
        return self._read([caption], None)  # no instruction is put before it

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
