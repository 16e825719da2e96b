"""Z-Image: one stream of image and caption tokens on the rectified flow.

The network predicts x0 - eps, and its time is 1 - t. Captions are those of a Qwen 3, in its chat
template. Each has its own length, and so its own positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from distill.core.types import Cond
from distill.teachers.chat import ChatTeacher
from distill.teachers.next_dit import NextDiT
from distill.teachers.ragged import Ragged, filled, padded, tokens_of


class SingleStream(NextDiT):
    """A block returns image tokens, their padding to a multiple of 32, and the caption's tokens."""

    shifts = True
    targets = (*NextDiT.targets, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    @property
    def patch(self) -> int:
        return self.model.config.all_patch_size[0]

    @property
    def width(self) -> int:
        return self.model.config.dim

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        frames = list(x_t.unsqueeze(2))  # a picture is a video of one frame
        time = (1000 - 1000 * t) / 1000  # rounded as in the pipeline
        found = self.model(frames, time, tokens_of(cond), patch_size=self.patch).sample
        return -torch.stack(found).squeeze(2)

    def to_map(self, name: str, output: Tensor, x_t: Tensor) -> Tensor:
        height, width = (side // self.patch for side in x_t.shape[-2:])
        return self.grid(output[:, : height * width], x_t)


class ZImage(Ragged, ChatTeacher):
    """A `ZImagePipeline` (Z-Image or Z-Image-Turbo; folder or hub id).

    It has no pooled embedding, so heads are conditioned only on the noise level. Its pipeline's
    `guidance_scale` is ours minus 1: it adds the scaled difference to the prediction for the
    caption.

    Args:
        few_steps: whether the model is distilled, as Turbo: a teacher of few steps, without
            guidance. No file says it.
    """

    kind = ZImagePipeline
    usual_unit = 16
    flow = True
    rounds_up = True
    trailing = True
    single_file = "transformer"
    template_options: ClassVar[dict[str, Any]] = {
        "add_generation_prompt": True,
        "enable_thinking": True,
    }

    def __init__(self, path: str, *, few_steps: bool = False, **options: Any):
        self.few_steps = few_steps
        super().__init__(path, **options)

    def family_options(self) -> dict[str, Any]:
        return {**super().family_options(), "few_steps": self.few_steps}

    def guided_call(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}

    def _network(self) -> SingleStream:
        return SingleStream(self.pipeline.transformer)

    def _embedded(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        # The pipeline overwrites the list with the templated captions.
        found, _ = self.pipeline.encode_prompt(
            list(captions), do_classifier_free_guidance=False, **options
        )
        return padded(found, self.length)

    def of_ids(self, ids: Tensor, mask: Tensor) -> Cond:
        found = self.pipeline.text_encoder(
            input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True
        )
        return filled(found.hidden_states[-2], mask, self.length)
