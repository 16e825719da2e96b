"""Rotary positions by cosine and sine, and attention with them, for `traceable`.

A rotation [B, L, D / 2, 2] holds cosine and sine of the angle of each pair of a head's D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Tables:
    """Rotations [positions, D_i / 2, 2] of each position of each axis."""

    def __init__(self, tables: Sequence[Tensor]):
        self.tables = [table.float() for table in tables]

    def of(self, *places: Tensor, batch: int) -> Tensor:
        """Rotation of tokens at `places`, [L] or [B, L] or [B, 1] of each axis; 0 of the others."""
        every = [*places, *[torch.zeros_like(places[0])] * (len(self.tables) - len(places))]
        length = max(x.shape[-1] for x in every)
        found = [t[x.expand(batch, length)] for t, x in zip(self.tables, every, strict=True)]
        return torch.cat(found, dim=-2)


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, L, heads, D] with its pairs of channels rotated."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation[:, :, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def heads_of(attn: Any, x: Tensor, layers: Sequence[str], norms: Sequence[str]) -> list[Tensor]:
    """Queries, keys and values [B, L, heads, D] of x [B, L, C], the first two normalised."""
    size = attn.inner_dim // attn.heads
    found = [getattr(attn, layer)(x).unflatten(-1, (-1, size)) for layer in layers]
    for i, norm in enumerate(getattr(attn, name) for name in norms):
        found[i] = found[i] if norm is None else norm(found[i])
    return found


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt D) v of tensors [B, L, heads, D], keys hidden where mask [B, L] is 0."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) if repeats > 1 else x for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)


class Rotated:
    """Attention processor of Z-Image and Lumina-Image 2.0, which name the rotation differently."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        rotation = image_rotary_emb if freqs_cis is None else freqs_cis
        assert rotation is not None
        q, k, v = heads_of(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        mixed = attended(rotated(q, rotation), rotated(k, rotation), v, attention_mask)
        found: Tensor = attn.to_out[0](mixed)
        return found


class JointRotated:
    """Attention processor of Qwen-Image: caption and picture, each with its rotation."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None
        image, text = image_rotary_emb
        own, added = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
        q, k, v = heads_of(attn, hidden_states, own, ("norm_q", "norm_k"))
        q, k = rotated(q, image), rotated(k, image)
        names = ("norm_added_q", "norm_added_k")
        text_q, text_k, text_v = heads_of(attn, encoder_hidden_states, added, names)
        text_q, text_k = rotated(text_q, text), rotated(text_k, text)
        pairs = ((text_q, q), (text_k, k), (text_v, v))
        every = [torch.cat(pair, dim=1) for pair in pairs]
        seen = torch.ones_like(hidden_states[..., 0], dtype=torch.bool)
        mixed = attended(*every, torch.cat([encoder_hidden_states_mask, seen], 1))
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](mixed[:, length:]), attn.to_add_out(mixed[:, :length])


def rows_of(x: Tensor, patch: int) -> Tensor:
    """Latents [B, C, H, W] -> tokens [B, H W / patch^2, patch^2 C], channels last in a token."""
    cells = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def picture_of(tokens: Tensor, like: Tensor, patch: int) -> Tensor:
    """The reverse of `rows_of`, for latents of the size of `like`."""
    height, width = (side // patch for side in like.shape[-2:])
    cells = tokens.unflatten(1, (height, width)).unflatten(3, (patch, patch, -1))
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def grid(x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Row and column [N] of each token of latents [B, C, H, W]."""
    height, width = (side // patch for side in x.shape[-2:])
    place = torch.arange(height * width)
    return place // width, place % width
