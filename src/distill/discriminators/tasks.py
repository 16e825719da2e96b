"""NitroFusion's three tasks: what the frozen teacher makes of a whole latent, and of a patch of it, told and untold.

    global       the whole, under its caption
    local        a square patch, under the caption                    whether parts are drawn well
    local_null   the same patch, under the empty caption              and do not each try to be the whole picture

The paper gives neither the size of a patch nor how it is cut. Here a patch goes through the teacher as a small latent:
diffusion networks take any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from distill.types import Cond, Teacher

TASKS = ("global", "local", "local_null")


class TaskFeatures:
    """Maps named `<task>.<tap>` of the frozen teacher; gradient reaches the latents, never the teacher's weights.

    Args:
        teacher: any teacher of ours.
        taps: names as the teacher gives them; None for its encoder and middle: `Teacher.encoder`.
        tasks: of global, local and local_null, those that there are.
        patch: side of a patch, as a share of the latents'.
    """

    space = "latents"

    def __init__(
        self, teacher: Teacher, *, taps: Sequence[str] | None = None, tasks: Sequence[str] = TASKS, patch: float = 0.5
    ):
        self.taps, self.tasks, self.patch = list(taps or teacher.encoder), [t for t in TASKS if t in tasks], patch
        if unknown := [name for name in self.taps if name not in teacher.channels]:
            known = ", ".join(teacher.channels)
            raise ValueError(f"discriminator.features.taps={unknown}: this teacher's taps are {known}")
        if not tasks or set(tasks) - set(TASKS) or not 0 < patch <= 1:
            what = f"tasks={list(tasks)} must be some of {', '.join(TASKS)}, and patch={patch} in (0, 1]"
            raise ValueError(f"discriminator.features: {what}")
        self._teacher = teacher

    @property
    def channels(self) -> Mapping[str, int]:
        return {f"{task}.{tap}": self._teacher.channels[tap] for task in self.tasks for tap in self.taps}

    def __call__(self, x: Tensor, t: Tensor, cond: Cond, generator: Generator | None = None) -> list[Tensor]:
        """Noised latents x [B, C, H, W] at t [B] -> maps [B, C_k, h_k, w_k]; `generator` places the patch."""
        maps = self._teacher.features(x, t, cond, self.taps) if "global" in self.tasks else []
        told = {"local": cond, "local_null": cond.unconditional()}
        conds = [told[task] for task in self.tasks if task in told]
        if not conds:
            return maps
        small = self._cut(x, generator)
        both = self._teacher.features(  # one pass for both
            small.repeat(len(conds), 1, 1, 1), t.repeat(len(conds)), Cond.cat(conds), self.taps
        )
        chunks = [m.chunk(len(conds)) for m in both]
        return maps + [m[i] for i in range(len(conds)) for m in chunks]

    def _cut(self, x: Tensor, generator: Generator | None) -> Tensor:
        """A patch [B, C, h, w] at a place of the teacher's grid of tokens, one for the batch."""
        cell = self._teacher.patch
        luck = torch.rand(2, generator=generator, device=generator.device if generator else None).tolist()
        for dim, u in zip((2, 3), luck, strict=True):
            cells = x.shape[dim] // cell
            size = max(1, round(self.patch * cells))
            x = x.narrow(dim, cell * int(u * (cells - size + 1)), cell * size)
        return x.contiguous()
