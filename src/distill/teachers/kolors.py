"""Kolors: Stable Diffusion XL's UNet, conditioned on a ChatGLM3, which reads Chinese and English.

It predicts eps on a process of its own, 1100 steps for the model on the hub, as its scheduler says.
"""

from __future__ import annotations

from typing import Any

from diffusers import KolorsPipeline

from distill.core.types import Cond
from distill.teachers.sdxl import SDXL

TOKENS = 256  # length of captions in the pipeline


class Kolors(SDXL):
    """A `KolorsPipeline` (folder or hub id).

    Captions are padded at their beginning. Their tokens are those of the layer before the last, and
    the pooled embedding is the last token of the last layer. The empty caption is encoded like any
    other: the pipeline fails where its configuration asks for zeros.
    """

    kind = KolorsPipeline
    standardised = False
    padded = ()
    embedding_options = ()
    single_file = None
    untraced = "whose tokenizer is code of diffusers, which onnxruntime's users do not have"

    def __init__(self, path: str, *, size: int | None = None, **options: Any):
        # Without clip_skip, which this pipeline does not take.
        super().__init__(path, size=size, **options)

    @classmethod
    def lora_base(cls, denoiser: Any, predicts_v: bool) -> None:
        return None

    def _longest_tokenizer(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, TOKENS

    def _encode(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": TOKENS}
        options["do_classifier_free_guidance"] = False
        tokens, _, pooled, _ = self.pipeline.encode_prompt(captions, **options)
        return Cond(tokens=tokens, pooled=pooled)
