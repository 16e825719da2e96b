"""Shared code of the transformers: taps after their blocks, and tokens arranged on the grid."""

import math
from typing import Any

from torch import Tensor, nn

from distill.teachers.network import Network


class Transformer(Network):
    """Taps `block0`, `block1`, ...: the image tokens after each block, on the grid.

    A block returns image tokens alone, or after the text tokens, in one tensor or as a second one.
    Token k is at row k // W, column k % W.
    """

    @property
    def patch(self) -> int:
        return self.model.config.patch_size

    @property
    def width(self) -> int:
        """Channels of a token after a block."""
        return self.model.config.num_attention_heads * self.model.config.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.model.config.in_channels

    def layers(self) -> dict[str, nn.Module]:
        """Tap name -> block, in the order of execution."""
        return {f"block{i}": block for i, block in enumerate(self.model.transformer_blocks)}

    def tappable(self) -> dict[str, tuple[nn.Module, int]]:
        return {name: (block, self.width) for name, block in self.layers().items()}

    @property
    def encoder(self) -> list[str]:
        """The first half of the blocks: transformers have no part that is named an encoder."""
        names = list(self.layers())
        return names[: (len(names) + 1) // 2]

    def to_map(self, name: str, output: Any, x_t: Tensor) -> Tensor:
        tokens = output[1] if isinstance(output, tuple) else output
        frames, sides = x_t.shape[2:-2], (side // self.patch for side in x_t.shape[-2:])
        return self.grid(tokens[:, -math.prod([*frames, *sides]) :], x_t)  # text comes before them

    def grid(self, tokens: Tensor, x_t: Tensor) -> Tensor:
        """Tokens [B, L, D] -> map [B, D, H / patch, W / patch], contiguous, for latents x_t [B, C,
        H, W]; of videos [B, C, T, H, W] -> [B, D, T, H / patch, W / patch].
        """
        frames, sides = x_t.shape[2:-2], (side // self.patch for side in x_t.shape[-2:])
        return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *frames, *sides).contiguous()
