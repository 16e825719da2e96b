"""Stable Diffusion 1.x and 2.x: a UNet on the variance-preserving process, predicting eps or v, step index 0..999."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from distill.process import VariancePreserving
from distill.teachers.network import Network, PipelineTeacher
from distill.teachers.reading import read_pipeline
from distill.types import Cond

PREDICTION = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class UNet(Network):
    """Taps `down0`, `down1`, ..., `mid`, `up0`, ...: the map each block hands to the next."""

    def __init__(self, model: UNet2DConditionModel, alphas_cumprod: Tensor, prediction: str):
        super().__init__(model, VariancePreserving(alphas_cumprod), PREDICTION[prediction])

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.model(x_t, self.process.index(t), encoder_hidden_states=cond.tokens).sample

    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        widths = list(self.model.config.block_out_channels)
        named = {f"down{i}": (b, w) for i, (b, w) in enumerate(zip(self.model.down_blocks, widths, strict=True))}
        named["mid"] = (self.model.mid_block, widths[-1])
        return named | {
            f"up{i}": (b, w) for i, (b, w) in enumerate(zip(self.model.up_blocks, widths[::-1], strict=True))
        }

    def to_map(self, output: object, x_t: Tensor) -> Tensor:
        return (output[0] if isinstance(output, tuple) else output).contiguous()


class SD(PipelineTeacher):
    """A `StableDiffusionPipeline` (SD 1.x, 2.x; folder or hub id)."""

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: str = "float32",
        use_safetensors: bool = True,
    ):
        options = {"revision": revision, "variant": variant, "dtype": dtype, "use_safetensors": use_safetensors}
        without = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
        pipeline = read_pipeline(StableDiffusionPipeline, path, **options, **without)
        scheduler = pipeline.scheduler
        network = UNet(pipeline.unet, scheduler.alphas_cumprod, scheduler.config.prediction_type)
        super().__init__(pipeline, network)

    def _encode(self, captions: list[str]) -> Cond:
        tokens, _ = self.pipeline.encode_prompt(
            captions, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        # SD has no pooled embedding; CLIP's own is its last hidden state at the end-of-text token.
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1).to(tokens.device)
        return Cond(tokens=tokens, pooled=tokens[torch.arange(len(captions), device=tokens.device), end])
