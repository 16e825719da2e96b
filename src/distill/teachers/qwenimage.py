"""Qwen-Image: an MMDiT on the rectified flow, v = eps - x0, network time t. Its tokens are 2x2
latents.

Captions are those of a Qwen 2.5 VL, in a template. The autoencoder is one of videos, and a picture
is a video of one frame.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from distill.core.process import RectifiedFlow
from distill.core.types import Cond
from distill.teachers.flux import Packed
from distill.teachers.ragged import Ragged, counts, filled, padded
from distill.teachers.rescaling import with_norm_of_caption
from distill.teachers.sized import SizedTeacher
from distill.teachers.transformer import Transformer


class DoubleStream(Packed):
    """Packed as FLUX's, without its single-stream blocks and without guidance as an input."""

    targets = (  # both streams' attention and feed-forward layers
        *Transformer.targets,
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )

    def __init__(self, model: QwenImageTransformer2DModel):
        Transformer.__init__(self, model, RectifiedFlow(), "flow")

    def with_model(self, model: Any) -> DoubleStream:
        return DoubleStream(model)

    @property
    def image_channels(self) -> int:
        return 0

    @property
    def latent_channels(self) -> int:
        return self.model.config.in_channels // self.patch**2

    def layers(self) -> dict[str, nn.Module]:
        return Transformer.layers(self)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        lengths, packed = counts(cond), F.pixel_unshuffle(x_t, self.patch)
        longest = max(lengths)  # padding behind it is masked everywhere
        masked = cond.mask is not None and min(lengths) < longest
        tokens = self.model(
            packed.flatten(2).transpose(1, 2),
            timestep=t,
            encoder_hidden_states=cond.tokens[:, :longest],
            encoder_hidden_states_mask=cond.mask[:, :longest].bool() if masked else None,
            img_shapes=[[(1, *packed.shape[-2:])]] * len(x_t),
        ).sample
        return F.pixel_shuffle(self.grid(tokens, x_t), self.patch)

    def rescaled(self, guided: Tensor, conditional: Tensor, x_t: Tensor) -> Tensor:
        """The guided prediction of each token has the norm of that for the caption."""

        def norm(flow: Tensor) -> Tensor:
            found = F.pixel_unshuffle(flow, self.patch).norm(dim=1, keepdim=True)
            return F.interpolate(found, scale_factor=self.patch)

        return with_norm_of_caption(guided, conditional, x_t, norm)


class QwenImage(Ragged, SizedTeacher):
    """A `QwenImagePipeline` (folder or hub id).

    It has no pooled embedding, so heads are conditioned only on the noise level. Its pipeline's
    scale is `true_cfg_scale`, and guides only with a negative prompt.
    """

    kind = QwenImagePipeline
    autoencoder = "AutoencoderKLQwenImage"
    standardised = True
    packing = 2
    usual_unit = 16
    flow = True
    rounds_up = True
    trailing = True
    single_file = "transformer"

    def call_options(self) -> dict[str, Any]:
        options = super().call_options()
        del options["guidance_scale"]  # of a model that is told its guidance
        return {"true_cfg_scale": 1.0, **options}

    def guided_call(self, scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale, "negative_prompt": ""}

    def _network(self) -> DoubleStream:
        return DoubleStream(self.pipeline.transformer)

    def _latents(self, pixels: Tensor) -> Tensor:
        return super()._latents(pixels.unsqueeze(2)).squeeze(2)

    def _pixels(self, latents: Tensor) -> Tensor:
        return super()._pixels(latents.unsqueeze(2)).squeeze(2)

    def _longest_tokenizer(self) -> tuple[Any, int]:
        # The template's tokens before the caption, most of which the pipeline drops.
        before = self.pipeline.prompt_template_encode.partition("{}")[0]
        left = len(self.pipeline.tokenizer(before).input_ids)
        left -= self.pipeline.prompt_template_encode_start_idx
        return self.pipeline.tokenizer, self.length - left

    def _encode(self, captions: list[str]) -> Cond:
        options = {"device": self.device, "max_sequence_length": self.length}
        tokens, mask = self.pipeline.encode_prompt(captions, **options)
        rows = tokens if mask is None else [x[m.bool()] for x, m in zip(tokens, mask, strict=True)]
        return padded(list(rows), self.length)

    def of_ids(self, ids: Tensor, mask: Tensor) -> Cond:
        template = self.pipeline.prompt_template_encode_start_idx
        ids, mask = (x[:, : template + self.length] for x in (ids, mask))
        found = self.pipeline.text_encoder(
            input_ids=ids, attention_mask=mask, output_hidden_states=True
        )
        return filled(found.hidden_states[-1][:, template:], mask[:, template:], self.length)
