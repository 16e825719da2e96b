"""PixArt-alpha and PixArt-Sigma: a transformer on a process like Stable Diffusion's, predicting
eps, step index 0..999, conditioned on a T5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from distill.core.process import Prediction, Process
from distill.core.transfers import send
from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd import end_in_noise, step_of, trained_on
from distill.teachers.transformer import Transformer


class PixArt(Transformer):
    """Its output has twice the channels of a latent. The second half, the variance, is not used in
    few steps.

    PixArt-alpha of 1024 pixels is also conditioned on the height, the width and the ratio of the
    picture, in its pipeline those of the latents. For a patch they are those of the full picture,
    which `of_patch` writes into the cond's `extra`, pixels [B, 2].
    """

    targets = (*Transformer.targets, "ff.net.0.proj", "ff.net.2")

    def __init__(self, model: nn.Module, process: Process, prediction: Prediction, cell: int):
        super().__init__(model, process, prediction)
        self.cell = cell  # side of a latent in pixels

    def with_model(self, model: nn.Module) -> PixArt:
        return PixArt(model, self.process, self.prediction, self.cell)

    @property
    def caption_width(self) -> int:
        return self.model.config.caption_channels

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        conditioning = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        step = step_of(self.process, t)
        size = self._size(x_t, cond)
        output = self.model(x_t, timestep=step, added_cond_kwargs=size, **conditioning).sample
        return output[:, : x_t.shape[1]]

    def _size(self, x_t: Tensor, cond: Cond) -> dict[str, Tensor | None]:
        """The size of the picture as the model reads it, for latents [B, C, H, W]."""
        if not self.model.use_additional_conditions:  # Sigma, and alpha of other sizes
            return {"resolution": None, "aspect_ratio": None}
        sides = cond.extra
        if sides is None:
            pixels = [float(side * self.cell) for side in x_t.shape[-2:]]
            sides = send(torch.tensor(pixels), x_t.device).expand(x_t.shape[0], -1)
        ratio = sides[:, :1].float() / sides[:, 1:].float()
        return {"resolution": sides.to(x_t.dtype), "aspect_ratio": ratio.to(x_t.dtype)}

    def of_patch(self, cond: Cond, full: Sequence[int], corner: Sequence[int]) -> Cond:
        if not self.model.use_additional_conditions:
            return cond
        sides = send(torch.tensor(list(full)), cond.tokens.device) * self.cell
        return replace(cond, extra=sides.to(cond.tokens.dtype).expand(len(cond), -1))


class PixArtSigma(PipelineTeacher):
    """A `PixArtSigmaPipeline` (folder or hub id). It has no pooled embedding, so heads are
    conditioned only on the noise level.

    Captions are cleaned as in the pipeline, where beautifulsoup4 and ftfy are installed.
    `zero_terminal_snr` is as for SD, for a fine-tune that predicts v.
    """

    kind = PixArtSigmaPipeline
    usual_unit = 16
    single_file = "transformer"
    tokens = 300  # length of captions in the pipeline

    def __init__(self, path: str, *, zero_terminal_snr: bool = False, **options: Any):
        super().__init__(path, **options)
        if zero_terminal_snr:
            end_in_noise(self)

    def call_options(self) -> dict[str, Any]:
        # The pipeline cleans captions by default. Binning would generate another size and resize.
        return {**super().call_options(), **self.sides(), "use_resolution_binning": False}

    def _network(self) -> PixArt:
        process, prediction = trained_on(self.pipeline.scheduler)
        cell = self.pipeline.vae_scale_factor
        return PixArt(self.pipeline.transformer, process, prediction, cell)

    def _longest_tokenizer(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, self.tokens

    def _encode(self, captions: list[str]) -> Cond:
        clean = is_bs4_available() and is_ftfy_available()
        options = {"device": self.device, "clean_caption": clean}
        tokens, mask, *_ = self.pipeline.encode_prompt(
            captions,
            do_classifier_free_guidance=False,
            max_sequence_length=self.tokens,
            **options,
        )
        return Cond(tokens=tokens, mask=mask)


class PixArtAlpha(PixArtSigma):
    """A `PixArtAlphaPipeline` (folder or hub id), of any of its sizes."""

    kind = PixArtAlphaPipeline
    tokens = 120
