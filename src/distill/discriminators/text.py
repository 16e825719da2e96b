"""c_text of ADD's projection: the caption as an open_clip model embeds it, ViT-g-14 in the paper."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor, nn


class OpenClipText(nn.Module):
    """Captions -> embeddings [B, width], frozen.

    Args:
        name, pretrained: as open_clip names them, or a local file of weights for `pretrained`.
    """

    def __init__(self, name: str = "ViT-g-14", pretrained: str = "laion2b_s34b_b88k"):
        super().__init__()
        model = open_clip.create_model(name, pretrained=pretrained or None, weights_only=True)
        model.visual = None  # half of it, and never used
        self.model, self.tokenizer = model.eval().requires_grad_(False), open_clip.get_tokenizer(name)
        self.width = len(model.text_projection[0]) if hasattr(model, "text_projection") else model.text.output_dim

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(list(captions)).to(device)).float()
