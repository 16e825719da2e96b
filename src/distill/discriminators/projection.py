"""Conditioning of ADD's heads: an embedding of the caption, and one of the real image.

c_text = text encoder(caption), of length 1 as in StyleGAN-T
c_img = class token of the real image; zero where the student's input is pure noise, because its
        sample cannot depend on that image
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.core.types import Batch, Cond
from distill.discriminators.images import ImageFeatures
from distill.machine.meta_device import is_shapes_only
from distill.storage.loaded_weights import check_finite


class OpenClipText(nn.Module):
    """Captions -> embeddings [B, width]; frozen.

    Args:
        name, pretrained: names of open_clip, or a local file of weights for `pretrained`.
    """

    def __init__(self, name: str = "ViT-g-14", pretrained: str = "laion2b_s34b_b88k"):
        super().__init__()
        if is_shapes_only():
            model = open_clip.create_model(name, device="meta")
        else:
            model = open_clip.create_model(name, pretrained=pretrained or None, weights_only=True)
        model.visual = None  # the image encoder is not used
        if not is_shapes_only():
            check_finite(model, f"discriminator.condition.text: {name}, {pretrained},")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.width = self(["a"]).shape[1]

    def train(self, mode: bool = True) -> OpenClipText:
        return self

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(list(captions)).to(device)).float()


class Projection(nn.Module):
    """Computes the conditioning of ADD's heads from a batch and its real images.

    Args:
        teacher, features: those of the run.
        text: "teacher" takes the teacher's pooled embedding; or a network that embeds captions;
            None: no text.
        image: "features" takes the class token of the feature network; or another network; None: no
            image.
        normalize_text: divide c_text by its length.
    """

    def __init__(
        self,
        teacher: Any,
        features: Any,
        *,
        text: OpenClipText | str | None = "teacher",
        image: ImageFeatures | str | None = "features",
        normalize_text: bool = True,
    ):
        super().__init__()
        for name, value, known in (("text", text, "teacher"), ("image", image, "features")):
            if isinstance(value, str) and value != known:
                raise ValueError(
                    f"discriminator.condition.{name}={value}: must be {known}, null or a network"
                )
        self.normalize_text = normalize_text
        self.text, self.image = text, features if image == "features" else image
        pooled = teacher.embed([""]).pooled if text == "teacher" else None
        if text == "teacher" and pooled is None:
            raise ValueError(
                "discriminator.condition.text=teacher: this teacher has no pooled embedding; use"
                " null"
            )
        self.pooled_width = pooled.shape[1] if pooled is not None else getattr(text, "width", 0)
        self.image_width = getattr(self.image, "width", 0)

    def forward(self, batch: Batch, real: Tensor, pure_noise: Tensor) -> Cond:
        """Real images [B, 3, H, W]; `pure_noise`, bool [B], the student's input -> pooled c_text,
        extra c_img.
        """
        pooled = batch.cond.pooled
        if self.text != "teacher":
            pooled = self.text and self.text(batch.captions)
        if pooled is not None and self.normalize_text:
            pooled = F.normalize(pooled, dim=-1)
        extra = self.image and self.image.describe(real) * ~pure_noise[:, None]
        return replace(batch.cond, pooled=pooled, extra=extra, null=None)
