"""Guidance that keeps the norm of the prediction: some pipelines scale the guided flow so that it
is as long as that for the caption.

v <- v |v(caption)| / |v|,  v = (x_t - x0) / t      # t cancels
"""

from collections.abc import Callable

from torch import Tensor

TINY = 1e-12  # ours: a flow of norm 0 has no direction to rescale


def with_norm_of_caption(
    guided: Tensor, conditional: Tensor, x_t: Tensor, norm: Callable[[Tensor], Tensor]
) -> Tensor:
    """The rescaled x0 prediction, from the guided one, that for the caption, and x_t, all [B, C, H,
    W].

    `norm` returns the norms that are kept, [B, C, H, W] or a shape that broadcasts to it.
    """
    flow = x_t - guided
    return x_t - flow * (norm(x_t - conditional) / norm(flow).clamp_min(TINY))
