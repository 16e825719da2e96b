"""Noise that samplers draw as a diffusers pipeline does, from one generator a picture."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise [B, *shape], each row from its own generator, as a diffusers pipeline draws its first
    latents.
    """
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def first_noise(
    student: Any, shape: Sequence[int], generators: Sequence[torch.Generator]
) -> Tensor:
    """The first noise [B, *shape] of the pipeline of this student or teacher.

    From the same generators it draws what it adds to the latents of a picture that it reads.
    """
    before, after = getattr(getattr(student, "network", student), "draws", (0, 0))
    for _ in range(before):
        draw_noise(shape, generators)
    noise = draw_noise(shape, generators)
    for _ in range(after):
        draw_noise(shape, generators)
    return noise


def step_noise(student: Any, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise [B, *shape] of a later step, drawn in the layout of the latents, as a pipeline's
    scheduler does.
    """
    network = getattr(student, "network", student)
    unpacked = getattr(network, "unpacked", None)
    if unpacked is None:
        return draw_noise(shape, generators)
    return unpacked(draw_noise(network.packed_shape(shape), generators), shape)
