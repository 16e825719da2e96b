"""Convolutions with a stride."""

import torch
import torch.nn.functional as F
from torch import Tensor


def strided(
    x: Tensor, kernel: Tensor, bias: Tensor | None = None, *, stride: int, padding: int,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """`F.conv2d`, on a CPU in float32 where its result is one column wide.

    There oneDNN's bfloat16 convolutions with a stride read memory that nobody has written, on CPUs
    with AMX: torch 2.14 gives errors of any size, other ones each time.
    """
    columns = (x.shape[-1] + 2 * padding - kernel.shape[-1]) // stride + 1
    if x.device.type != "cpu" or columns > 1:
        return F.conv2d(x, kernel, bias, stride, padding, groups=groups)
    with torch.autocast("cpu", enabled=False):
        dtype = torch.promote_types(kernel.dtype, torch.float32)
        bias = None if bias is None else bias.to(dtype)
        return F.conv2d(x.to(dtype), kernel.to(dtype), bias, stride, padding, groups=groups)
