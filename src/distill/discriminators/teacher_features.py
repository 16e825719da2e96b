"""The frozen teacher itself as a discriminator's eyes, looking at a re-noised latent.

LADD looks at the whole, after every block. NitroFusion looks at it with the half of the network
that reads, for three tasks: `global`, the whole under its caption; `local`, a square patch under
the caption, whether parts are drawn well; `local_null`, the same patch under the empty caption,
lest each part try to be the whole. The paper gives neither the size of a patch nor how it is cut.
Here it goes through the teacher as a small latent: these networks take any size, and one that is
conditioned on sizes (SDXL) is given the patch's place in the whole.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from distill.core.types import Cond, Teacher

WHOLE, PATCH, UNTOLD = TASKS = ("global", "local", "local_null")


class TeacherFeatures:
    """Maps of the frozen teacher; gradient reaches the latents, never the teacher's weights.

    Args:
        teacher: any teacher of ours.
        taps: `blocks`, after each of them; `encoder`, the half that reads; or names as the teacher
            gives them (`block0`, ... for an MMDiT; `down0`, ..., `mid`, `up0`, ... for a UNet). It
            stops after the last tap.
        tasks: some of global, local and local_null: maps are then named `<task>.<tap>`. None: the
            whole, named `<tap>`.
        patch: side of a patch, as a share of the latents'.
    """

    space = "latents"

    def __init__(
        self,
        teacher: Teacher,
        *,
        taps: str | Sequence[str] = "blocks",
        tasks: Sequence[str] | None = None,
        patch: float = 0.5,
    ):
        named = {"blocks": teacher.blocks, "encoder": teacher.encoder}
        self.taps = list(named.get(taps, [taps]) if isinstance(taps, str) else taps)
        if len(set(self.taps)) < len(self.taps):
            raise ValueError(f"discriminator.features.taps={taps}: names one twice; leave that out")
        if not self.taps or set(self.taps) - set(teacher.channels):
            known = ", ".join(teacher.channels)
            raise ValueError(
                f"discriminator.features.taps={taps}: must be blocks, encoder, or some of {known}"
            )
        if tasks is not None and (not tasks or set(tasks) - set(TASKS)) or not 0 < patch <= 1:
            what = f"tasks={tasks} must be some of {', '.join(TASKS)}, and patch={patch} in (0, 1]"
            raise ValueError(f"discriminator.features: {what}")
        self.named, self.tasks = (
            tasks is not None,
            [task for task in TASKS if task in (tasks or [WHOLE])],
        )
        self._teacher, self.patch = teacher, patch

    @property
    def channels(self) -> Mapping[str, int]:
        names = {tap: self._teacher.channels[tap] for tap in self.taps}
        return (
            {f"{task}.{tap}": c for task in self.tasks for tap, c in names.items()}
            if self.named
            else names
        )

    def __call__(
        self, x: Tensor, t: Tensor, cond: Cond, generator: Generator | None = None
    ) -> list[Tensor]:
        """Noised latents x [B, C, H, W] at t [B] -> maps [B, C_k, h_k, w_k]; `generator` places the
        patch.
        """
        maps = self._teacher.features(x, t, cond, self.taps) if WHOLE in self.tasks else []
        conds = [
            cond.unconditional() if task == UNTOLD else cond for task in self.tasks if task != WHOLE
        ]
        if count := len(conds):  # one pass for both
            small, corner = self._cut(x, generator)
            told = self._teacher.of_patch(Cond.cat(conds), x.shape[-2:], corner)
            small = small.repeat(count, 1, 1, 1)
            found = self._teacher.features(small, t.repeat(count), told, self.taps)
            parts = [m.chunk(count) for m in found]
            maps = maps + [m[i] for i in range(count) for m in parts]
        return maps

    def _cut(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, list[int]]:
        """A patch [B, C, h, w] of whole tokens, at one place for the batch, and its row and
        column.
        """
        corner = []
        cell = self._teacher.patch
        luck = torch.rand(
            2, generator=generator, device=generator.device if generator else None
        ).tolist()
        for dim, u in zip((2, 3), luck, strict=True):
            cells = x.shape[dim] // cell
            size = max(1, round(self.patch * cells))
            corner.append(cell * int(u * (cells - size + 1)))
            x = x.narrow(dim, corner[-1], cell * size)
        return x.contiguous(), corner
