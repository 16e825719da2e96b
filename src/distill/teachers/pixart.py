"""PixArt-Sigma: a transformer on a process like Stable Diffusion's, predicting eps, step index
0..999, conditioned on a T5.
"""

from typing import Any

from diffusers import PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd import end_in_noise, step_of, trained_on
from distill.teachers.transformer import Transformer

TOKENS = 300  # length of captions in the pipeline


class PixArt(Transformer):
    """Its output has twice the channels of a latent. The second half, the variance, is not used in
    few steps.
    """

    @property
    def caption_width(self) -> int:
        return self.model.config.caption_channels

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        conditioning = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        size = {"resolution": None, "aspect_ratio": None}  # Sigma is conditioned on neither
        step = step_of(self.process, t)
        output = self.model(x_t, timestep=step, added_cond_kwargs=size, **conditioning).sample
        return output[:, : x_t.shape[1]]


class PixArtSigma(PipelineTeacher):
    """A `PixArtSigmaPipeline` (folder or hub id). It has no pooled embedding, so heads are
    conditioned only on the noise level.

    Captions are cleaned as in the pipeline, where beautifulsoup4 and ftfy are installed.
    `zero_terminal_snr` is as for SD, for a fine-tune that predicts v.
    """

    kind = PixArtSigmaPipeline
    usual_unit = 16
    single_file = "transformer"

    def __init__(self, path: str, *, zero_terminal_snr: bool = False, **options: Any):
        super().__init__(path, **options)
        if zero_terminal_snr:
            end_in_noise(self)

    def call_options(self) -> dict[str, Any]:
        # The pipeline cleans captions by default. Binning would generate another size and resize.
        return {**super().call_options(), **self.sides(), "use_resolution_binning": False}

    def _network(self) -> PixArt:
        return PixArt(self.pipeline.transformer, *trained_on(self.pipeline.scheduler))

    def _longest_tokenizer(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, TOKENS

    def _encode(self, captions: list[str]) -> Cond:
        clean = is_bs4_available() and is_ftfy_available()
        options = {"device": self.device, "clean_caption": clean, "max_sequence_length": TOKENS}
        tokens, mask, *_ = self.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, **options
        )
        return Cond(tokens=tokens, mask=mask)
