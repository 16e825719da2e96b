"""Chroma: FLUX's blocks without its pooled embedding and guidance input, on the rectified flow, v =
eps - x0, network time t, conditioned on a T5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from diffusers import ChromaPipeline
from torch import Tensor, nn

from distill.core.types import Cond
from distill.teachers.flux import Packed
from distill.teachers.sized import SizedTeacher

OF_A_SINGLE_BLOCK = 3  # inputs with which diffusers computes one again: its mask is forgotten


class Masked(Packed):
    """It is guided against a caption, not by an input.

    diffusers adds the product of the two tokens' masks to an attention score: 1, or 0 for padding
    that is hidden. Computed again, its single-stream blocks would have no mask.
    """

    _mask: Tensor | None = None  # of the joint blocks of the present pass

    def __init__(self, model: nn.Module):
        super().__init__(model, guidance=1.0)

    def with_model(self, model: nn.Module) -> Masked:
        return Masked(model)

    def conditioning(self, positions: Tensor, t: Tensor, cond: Cond) -> dict[str, Any]:
        mask = cond.tokens.new_ones(cond.tokens.shape[:2]) if cond.mask is None else cond.mask
        return {
            "img_ids": positions,
            "txt_ids": positions.new_zeros(cond.tokens.shape[1], 3),
            "attention_mask": F.pad(mask, (0, len(positions)), value=1.0),
        }

    def _checkpointed(self, block: Callable[..., Any], *inputs: Any) -> Any:
        if len(inputs) == OF_A_SINGLE_BLOCK:
            inputs = (*inputs, self._mask)
        else:
            self._mask = inputs[-1]
        return super()._checkpointed(block, *inputs)


class Chroma(SizedTeacher):
    """A `ChromaPipeline` (folder or hub id). It has no pooled embedding, so heads are conditioned
    only on the noise level.

    Of a caption's padding only the first token is read.
    """

    kind = ChromaPipeline
    unused = ("image_encoder", "feature_extractor")
    packing = 2
    usual_unit = 16
    flow = True
    rounds_up = True
    trailing = True

    def _network(self) -> Masked:
        return Masked(self.pipeline.transformer)

    def _longest_tokenizer(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, self.length

    def _encode(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        tokens, _, mask, *_ = self.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, **options
        )
        return Cond(tokens=tokens, mask=mask)
