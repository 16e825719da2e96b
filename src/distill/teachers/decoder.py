"""A small decoder (TAESD) in place of the autoencoder's, where gradient through the large one costs
too much.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from distill.storage.loaded_weights import check_all_loaded, check_finite


class TinyDecoder(nn.Module):
    """Scaled latents [B, C, H, W] -> pixels [B, 3, S, S], about in [-1, 1]; frozen, differentiable
    in the latents.

    `path` is a folder or hub id of an `AutoencoderTiny` for the same latents: madebyollin/taesd for
    SD, madebyollin/taesdxl for SDXL, madebyollin/taesd3 for SD3.
    """

    def __init__(self, path: str, *, dtype: str = "float32"):
        super().__init__()
        options = {"use_safetensors": True, "torch_dtype": getattr(torch, dtype)}
        model, report = AutoencoderTiny.from_pretrained(path, output_loading_info=True, **options)
        check_all_loaded(report, f"method.decoder.path={path}", "AutoencoderTiny")
        check_finite(model, f"method.decoder.path={path}")
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> TinyDecoder:
        return self

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.to(self.model.dtype)).sample.to(latents.dtype)
