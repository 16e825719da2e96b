"""Lumina-Image 2.0: one stream of caption and image tokens on the rectified flow.

The network predicts x0 - eps, and its time is 1 - t. Captions are those of a Gemma 2, behind the
pipeline's system prompt; the empty one that guidance is against has none. Each has its own length,
and the image tokens follow its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Lumina2Pipeline
from torch import Tensor

from distill.core.types import Cond
from distill.teachers.next_dit import NextDiT
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.ragged import counts
from distill.teachers.rescaling import with_norm_of_caption

START = " <Prompt Start> "  # between system prompt and caption, in the pipeline


class CaptionFirst(NextDiT):
    """Image tokens stand behind each caption's own tokens."""

    targets = (
        *NextDiT.targets,
        *("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3"),
    )

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        conditioning = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        return -self.model(x_t, timestep=1 - t, **conditioning).sample

    def to_map(self, name: str, output: Tensor, x_t: Tensor) -> Tensor:
        return output  # `features` knows where the image tokens of each sample are

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, taps: Sequence[str]) -> list[Tensor]:
        number = x_t.shape[-2] * x_t.shape[-1] // self.patch**2
        starts, maps = counts(cond), []
        for tokens in super().features(x_t, t, cond, taps):
            rows = [x[i : i + number] for x, i in zip(tokens, starts, strict=True)]
            maps.append(self.grid(torch.stack(rows), x_t))
        return maps

    def rescaled(self, guided: Tensor, conditional: Tensor, x_t: Tensor) -> Tensor:
        """The guided prediction has the norm of that for the caption, in each row of a channel."""
        return with_norm_of_caption(
            guided, conditional, x_t, lambda flow: flow.norm(dim=-1, keepdim=True)
        )


class Lumina2(PipelineTeacher):
    """A `Lumina2Pipeline` (folder or hub id).

    It has no pooled embedding, so heads are conditioned only on the noise level.

    Args:
        length: largest number of tokens of a caption, with the system prompt.
    """

    kind = Lumina2Pipeline
    usual_unit = 16
    flow = True
    trailing = True
    embedding_options = ("length",)

    def __init__(self, path: str, *, length: int = 256, **options: Any):
        self.length = length
        super().__init__(path, **options)

    def family_options(self) -> dict[str, Any]:
        return {"length": self.length}

    def call_options(self) -> dict[str, Any]:
        return {**super().call_options(), "max_sequence_length": self.length}

    def _network(self) -> CaptionFirst:
        if self.pipeline.vae:  # the pipeline takes 8 for any autoencoder
            levels = self.pipeline.vae.config.block_out_channels
            self.pipeline.vae_scale_factor = 2 ** (len(levels) - 1)
        return CaptionFirst(self.pipeline.transformer)

    def _longest_tokenizer(self) -> tuple[Any, int]:
        tokenizer = self.pipeline.tokenizer
        before = tokenizer(self.pipeline.system_prompt + START).input_ids
        return tokenizer, self.length - len(before) + len(tokenizer("").input_ids)

    def _encode(self, captions: list[str]) -> Cond:
        prompt = self.pipeline.system_prompt + START
        return self._read([prompt + caption if caption else "" for caption in captions])

    def _negative(self, caption: str) -> Cond:
        return self._read([caption])  # without the system prompt

    def _read(self, texts: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        tokens, mask = self.pipeline._get_gemma_prompt_embeds(texts, **options)
        return Cond(tokens=tokens, mask=mask)
