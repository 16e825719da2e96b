"""Joint attention in which one token has the weight of several equal ones.

In a softmax n equal keys weigh as one key with log n added. `StableDiffusion3Pipeline` passes 256
tokens of the third encoder to the transformer. Where that encoder is absent or silent they are 256
equal zeros. One of them with weight 256 gives the same output, to rounding, at a quarter of the
cost.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from distill.core.transfers import on_host
from distill.teachers.attention import attend


class SilentTokenAttention:
    """Attention processor for SD3's joint blocks, with an additive bias on the keys.

    The bias is [1 or B, 1, 1, keys] or None.
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None

    def save_context(self) -> Callable[[], AbstractContextManager[None]]:
        """A function that returns a context with the present bias."""
        return partial(self.biased, self.bias)

    @contextmanager
    def biased(self, bias: Tensor | None) -> Iterator[None]:
        before, self.bias = self.bias, bias
        try:
            yield
        finally:
            self.bias = before

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        streams = [(hidden_states, "to_{}", attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            streams.append(
                (encoder_hidden_states, "add_{}_proj", attn.norm_added_q, attn.norm_added_k)
            )
        parts = []
        for x, names, norm_q, norm_k in streams:  # [B, L, D] -> [B, heads, L, D / heads] each
            q, k, v = (
                getattr(attn, names.format(n))(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for n in "qkv"
            )
            parts.append((norm_q(q) if norm_q else q, norm_k(k) if norm_k else k, v))
        q, k, v = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        bias = None if self.bias is None else self.bias.to(q.dtype)
        mixed = attend(q, k, v, bias).transpose(1, 2).flatten(2)
        image, text = mixed.tensor_split([hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:  # SD3.5's second attention: image tokens alone
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def set_silent_token_attention(transformer: nn.Module) -> SilentTokenAttention:
    """Give all joint blocks of `transformer` one shared processor, and return it."""
    processor = SilentTokenAttention()
    for block in transformer.transformer_blocks:
        block.attn.set_processor(processor)
        if getattr(block, "attn2", None) is not None:
            block.attn2.set_processor(SilentTokenAttention())
    return processor


def token_weights(
    processor: SilentTokenAttention,
    counts: Tensor | None,
    image_tokens: int,
    all_ones: bool = False,
) -> AbstractContextManager[None]:
    """Within this context text token i has the weight of counts[:, i] tokens (0 hides it).

    `counts` is [B, L] or None; `all_ones` says that it holds nothing but 1. On a device it is not
    read: unless it is known to be so, 1 is a weight like any other.
    """
    bias = None
    if counts is not None and on_host(counts):
        all_ones = bool((counts == 1).all())
    if counts is not None and not all_ones:
        no_bias = counts.new_zeros(counts.shape[0], image_tokens, dtype=torch.float32)
        bias = torch.cat([no_bias, counts.float().log()], dim=1)[:, None, None]
    return processor.biased(bias)
