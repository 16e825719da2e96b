"""What Z-Image and Lumina-Image 2.0 share: networks of NextDiT's kind, one stream of tokens on the
rectified flow, which predict x0 - eps at time 1 - t.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from distill.core.process import RectifiedFlow
from distill.teachers.transformer import Transformer


class NextDiT(Transformer):
    """The blocks that refine image and caption apart, before the stream, are not tapped."""

    def __init__(self, model: nn.Module):
        super().__init__(model, RectifiedFlow(), "flow")

    def with_model(self, model: Any) -> NextDiT:
        return type(self)(model)

    @property
    def caption_width(self) -> int:
        return self.model.config.cap_feat_dim

    def layers(self) -> dict[str, nn.Module]:
        return {f"block{i}": block for i, block in enumerate(self.model.layers)}
