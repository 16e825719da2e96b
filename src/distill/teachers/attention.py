"""Attention with the fastest kernel for each device."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.machine.meta_device import kind_of

SHORT = 512  # tokens up to which all scores are kept in memory


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt d + bias) v, for q, k, v [B, heads, L, d]; bias broadcasts to [B, heads,
    L, L].

    On a CPU the fused kernel of torch 2.13 has a backward pass five times as slow in bfloat16 as
    plain matrix products.
    """
    if kind_of(v) != "cpu" or v.dtype != torch.bfloat16 or v.shape[2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1).to(v.dtype) @ v


class Attention:
    """Attention processor for a UNet's transformer blocks, with `attend` in place of torch's
    kernel.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Image tokens [B, L, D], text [B, M, E] or None for self-attention -> [B, L, D]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        inputs = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in inputs)
        bias = None if attention_mask is None else attention_mask.unflatten(0, (len(q), -1))
        mixed = attend(q, k, v, bias).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))
