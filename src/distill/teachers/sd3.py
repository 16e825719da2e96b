"""Stable Diffusion 3 and 3.5: an MMDiT on the rectified flow, v = eps - x0, network time 1000 t."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from distill.process import RectifiedFlow
from distill.teachers.folded import fold, weights
from distill.teachers.network import Network, PipelineTeacher
from distill.teachers.reading import read_pipeline
from distill.types import Cond

SILENT_TOKENS = 256  # what the pipeline passes for an absent third encoder (its default max_sequence_length)


class MMDiT(Network):
    """Taps `block0`, `block1`, ...: image tokens after each joint block, put back on the 2-D grid."""

    def __init__(self, model: SD3Transformer2DModel):
        super().__init__(model, RectifiedFlow(), "flow")
        self._folded = fold(model)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        image_tokens = x_t.shape[-1] * x_t.shape[-2] // self.model.config.patch_size**2
        with weights(self._folded, cond.mask, image_tokens):
            return self.model(
                x_t, encoder_hidden_states=cond.tokens, pooled_projections=cond.pooled, timestep=1000 * t
            ).sample

    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        return {f"block{i}": (b, self.model.inner_dim) for i, b in enumerate(self.model.transformer_blocks)}

    def to_map(self, output: object, x_t: Tensor) -> Tensor:
        tokens = output[1]  # a joint block returns (text tokens, image tokens)
        height, width = (side // self.model.config.patch_size for side in x_t.shape[-2:])
        return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width).contiguous()

    def twin(self) -> MMDiT:
        other = super().twin()
        other._folded = fold(other.model)  # a processor of its own: the copy must not share state with the original
        return other


class SD3(PipelineTeacher):
    """A `StableDiffusion3Pipeline` (SD3, SD3.5; folder or hub id), with or without its third text encoder."""

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        use_safetensors: bool = True,
        t5: bool = True,
    ):
        options = {"revision": revision, "variant": variant, "dtype": dtype, "use_safetensors": use_safetensors}
        without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = read_pipeline(StableDiffusion3Pipeline, path, **options, **without)
        if pipeline.text_encoder_3 is not None and _silent(pipeline.text_encoder_3):
            pipeline.text_encoder_3 = None  # all its tokens are zeros, as the pipeline makes them without it
        super().__init__(pipeline, MMDiT(pipeline.transformer))

    def _encode(self, captions: list[str]) -> Cond:
        silent = self.pipeline.text_encoder_3 is None
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            captions,
            captions,
            captions,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=1 if silent else SILENT_TOKENS,
        )
        counts = torch.ones(tokens.shape[:2], device=tokens.device)
        if silent:  # one zero token stands for all of them
            counts[:, -1] = SILENT_TOKENS
        return Cond(tokens=tokens, pooled=pooled, mask=counts)


def _silent(encoder: nn.Module) -> bool:
    """Whether a T5's output is zero whatever it reads: its last norm scales by zero."""
    return int(encoder.encoder.final_layer_norm.weight.count_nonzero()) == 0
