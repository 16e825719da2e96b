"""Sana: a transformer with linear attention on the rectified flow, v = eps - x0, network time 1000
t, conditioned on a Gemma. Sana-Sprint: the same of few steps, network time t, guidance embedded.

Its autoencoder (DC-AE) encodes 32x32 pixels as one latent, which is one token.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import SanaPipeline, SanaSprintPipeline
from torch import Tensor, nn

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
    # Also the feed-forward layers, but for the convolution of each channel alone.
    targets = (*Transformer.targets, "ff.conv_inverted", "ff.conv_point")

    @property
    def caption_width(self) -> int:
        return self.model.config.caption_channels

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        conditioning = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        return self.model(
            x_t, timestep=1000 * t * self.model.config.timestep_scale, **conditioning
        ).sample


class Sprint(LinearDiT):
    """Sana-Sprint's network is conditioned on guidance: one value here, for teacher and student.

    Its pipeline steps in TrigFlow's angles. It scales their x to the flow's x_t and the network's v
    to TrigFlow's, of which its scheduler makes x0. All this together is x0 = x_t - t v.
    """

    angles = True

    def __init__(self, model: nn.Module, guidance: float):
        super().__init__(model, RectifiedFlow(), "flow")
        self.guidance = guidance

    def with_model(self, model: nn.Module) -> Sprint:
        return Sprint(model, self.guidance)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        conditioning = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        told = torch.full_like(t, self.guidance) * self.model.config.guidance_embeds_scale
        return self.model(x_t, timestep=t, guidance=told, **conditioning).sample


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
        tokens, mask, *_ = self._encode_prompt(captions, **options)
        return Cond(tokens=tokens, mask=mask)

    def _encode_prompt(self, captions: list[str], **options: Any) -> tuple[Tensor, ...]:
        return self.pipeline.encode_prompt(captions, do_classifier_free_guidance=False, **options)


class SanaSprint(Sana):
    """A `SanaSprintPipeline` (folder or hub id): a teacher of few steps, without guidance by the
    empty caption, which its pipeline does not have.

    Args:
        guidance: guidance that the network is conditioned on. Pass the same value to the exported
            student as `guidance_scale`.
    """

    kind = SanaSprintPipeline
    rounds_up = True

    def __init__(
        self, path: str, *, instruction: bool = True, guidance: float = 4.5, **options: Any
    ):
        self.guidance = guidance
        super().__init__(path, instruction=instruction, **options)

    def family_options(self) -> dict[str, Any]:
        return {**super().family_options(), "guidance": self.guidance}

    def call_options(self) -> dict[str, Any]:
        return {**super().call_options(), "guidance_scale": self.guidance}

    def _network(self) -> Sprint:
        return Sprint(self.pipeline.transformer, self.guidance)

    def _encode(self, captions: list[str]) -> Cond:
        return self._read(captions, self.instruction)  # also before the empty one

    def _encode_prompt(self, captions: list[str], **options: Any) -> tuple[Tensor, ...]:
        return self.pipeline.encode_prompt(captions, **options)
