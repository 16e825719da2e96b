"""Joint attention over tokens that stand for several: in a softmax n equal keys weigh like one with log n added.

`StableDiffusion3Pipeline` hands the transformer 256 third-encoder tokens. Where that encoder is absent (or silent) they
are 256 equal zeros; carrying one of them with weight 256 gives the same output, to rounding, at a quarter of the cost.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator


class FoldedJointAttention:
    """Attention processor for SD3's joint blocks, with an additive bias on the keys [1 or B, 1, 1, keys] (or None)."""

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor | tuple[Tensor, Tensor]:
        image = _project(attn, hidden_states, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is None:  # SD3.5's second attention: image tokens alone
            mixed = _merge_heads(F.scaled_dot_product_attention(*image))
            return attn.to_out[1](attn.to_out[0](mixed))
        text = _project(
            attn,
            encoder_hidden_states,
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            (attn.norm_added_q, attn.norm_added_k),
        )
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        bias = None if self.bias is None else self.bias.to(q.dtype)
        mixed = _merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        of_image, of_text = mixed.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        of_image = attn.to_out[1](attn.to_out[0](of_image))
        return of_image, of_text if attn.context_pre_only else attn.to_add_out(of_text)


def _project(
    attn: nn.Module, x: Tensor, names: tuple[str, str, str], norms: tuple[nn.Module | None, nn.Module | None]
) -> list[Tensor]:
    """x [B, L, D] -> query, key, value [B, heads, L, D / heads], query and key normalised."""
    q, k, v = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for name in names)
    return [norms[0](q) if norms[0] else q, norms[1](k) if norms[1] else k, v]


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def fold(transformer: nn.Module) -> FoldedJointAttention:
    """Give every joint block of `transformer` one shared folded processor, and return it."""
    processor = FoldedJointAttention()
    for block in transformer.transformer_blocks:
        block.attn.set_processor(processor)
        if getattr(block, "attn2", None) is not None:
            block.attn2.set_processor(FoldedJointAttention())
    return processor


@contextmanager
def weights(processor: FoldedJointAttention, counts: Tensor | None, image_tokens: int) -> Iterator[None]:
    """Within: text token i stands for counts[:, i] tokens (0 hides it). `counts` [B, L] or None."""
    if counts is None or bool((counts == 1).all()):
        yield
        return
    bias = torch.cat([counts.new_zeros(len(counts), image_tokens, dtype=torch.float32), counts.float().log()], dim=1)
    processor.bias = bias[:, None, None]
    try:
        yield
    finally:
        processor.bias = None
