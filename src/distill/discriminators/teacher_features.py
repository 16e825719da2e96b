"""LADD's eyes: the frozen teacher itself, tapped after its blocks, looking at a re-noised latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.types import Cond, Teacher


class TeacherFeatures:
    """Maps of the frozen teacher; gradient reaches the latents, never the teacher's weights.

    Args:
        teacher: any teacher of ours.
        taps: names as the teacher gives them (`block0`, ... for an MMDiT; `down0`, ..., `mid`, `up0`, ... for a UNet);
            None taps every block. The teacher stops after the last tap.
    """

    space = "latents"

    def __init__(self, teacher: Teacher, *, taps: Sequence[str] | None = None):
        known = teacher.channels
        self.taps = list(teacher.blocks if taps is None else taps)
        unknown = [name for name in self.taps if name not in known]
        if unknown or not self.taps:
            raise ValueError(f"discriminator.features.taps={self.taps}: this teacher's taps are {', '.join(known)}")
        self._teacher = teacher

    @property
    def channels(self) -> Mapping[str, int]:
        return {name: self._teacher.channels[name] for name in self.taps}

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, generator: torch.Generator | None = None) -> list[Tensor]:
        """Noised latents x [B, C, H, W] at t [B] -> maps [B, C_k, h_k, w_k], one per tap."""
        return self._teacher.features(x, t, cond, self.taps)
