"""PixArt-Sigma: a transformer on a process like Stable Diffusion's, predicting eps, step index
0..999, told by a T5.
"""

from typing import Any

from diffusers import PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from distill.core.types import Cond
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd import end_in_noise, step_of, trained_on
from distill.teachers.transformer import Transformer

TOKENS = 300  # that the pipeline passes


class PixArt(Transformer):
    """Its output has twice the channels of a latent; the second half is the variance, which few
    steps do without.
    """

    @property
    def caption_width(self) -> int:
        return self.model.config.caption_channels

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told = {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.mask}
        size = {"resolution": None, "aspect_ratio": None}  # Sigma is told of neither
        step = step_of(self.process, t)
        output = self.model(x_t, timestep=step, added_cond_kwargs=size, **told).sample
        return output[:, : x_t.shape[1]]


class PixArtSigma(PipelineTeacher):
    """A `PixArtSigmaPipeline` (folder or hub id). It has no pooled embedding: heads are told of the
    noise level alone.

    Captions are cleaned as its pipeline does, where beautifulsoup4 and ftfy are installed.
    `zero_terminal_snr` is as SD's, for a fine-tune that predicts v.
    """

    kind = PixArtSigmaPipeline
    usual_unit = 16
    single_file = "transformer"

    def __init__(self, path: str, *, zero_terminal_snr: bool = False, **options: Any):
        super().__init__(path, **options)
        if zero_terminal_snr:
            end_in_noise(self)

    def call(self) -> dict[str, Any]:
        # Clean captions are what the pipeline tries to have by itself; binning would draw another
        # size, and resize.
        return {**super().call(), **self.sides(), "use_resolution_binning": False}

    def _network(self) -> PixArt:
        return PixArt(self.pipeline.transformer, *trained_on(self.pipeline.scheduler))

    def _reader(self) -> tuple[Any, int]:
        return self.pipeline.tokenizer, TOKENS

    def _encode(self, captions: list[str]) -> Cond:
        clean = is_bs4_available() and is_ftfy_available()
        options = {"device": self.device, "clean_caption": clean, "max_sequence_length": TOKENS}
        tokens, mask, *_ = self.pipeline.encode_prompt(
            captions, do_classifier_free_guidance=False, **options
        )
        return Cond(tokens=tokens, mask=mask)
