"""The frozen teacher as the feature network of a discriminator, on renoised latents.

LADD reads the full latent, after every block. NitroFusion reads the encoder half of the network,
for three tasks. `global` is the full latent with its caption. `local` is a square patch with the
caption. `local_null` is the same patch with the empty caption, so that a patch need not show all of
the caption. The paper gives neither the size of a patch nor how it is cut. Here a patch passes
through the teacher as a small latent: these networks take any size. A teacher that is conditioned
on sizes (SDXL) gets the position of the patch in the image.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from distill.core.randomness import uniform
from distill.core.types import Cond, Teacher

GLOBAL, LOCAL, LOCAL_NULL = TASKS = ("global", "local", "local_null")


class TeacherFeatures:
    """Feature maps of the frozen teacher. Gradient flows to the latents; the weights are frozen.

    Args:
        teacher: any teacher of ours.
        taps: `blocks`, after each block; `encoder`, the encoder half; or names of the teacher's
            taps (`block0`, ... of an MMDiT; `down0`, ..., `mid`, `up0`, ... of a UNet). The pass
            ends at the last tap.
        tasks: some of global, local and local_null; maps are then named `<task>.<tap>`. None: the
            full latent, maps named `<tap>`.
        patch: side of a patch, as a share of the latent's.
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
            raise ValueError(
                f"discriminator.features.taps={taps}: names one tap twice; name each once"
            )
        if not self.taps or set(self.taps) - set(teacher.channels):
            known = ", ".join(teacher.channels)
            raise ValueError(
                f"discriminator.features.taps={taps}: must be blocks, encoder, or some of {known}"
            )
        if tasks is not None and (not tasks or set(tasks) - set(TASKS)) or not 0 < patch <= 1:
            what = f"tasks={tasks} must be some of {', '.join(TASKS)}, and patch={patch} in (0, 1]"
            raise ValueError(f"discriminator.features: {what}")
        self.named = tasks is not None
        self.tasks = [task for task in TASKS if task in (tasks or [GLOBAL])]
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
        """Noised latents x [B, C, H, W] at t [B] -> maps [B, C_k, h_k, w_k].

        `generator` draws the position of the patch, which has all frames of a video.
        """
        maps = self._teacher.features(x, t, cond, self.taps) if GLOBAL in self.tasks else []
        conds = [
            cond.unconditional() if task == LOCAL_NULL else cond
            for task in self.tasks
            if task != GLOBAL
        ]
        count = len(conds)
        if count:  # one pass for both local tasks
            patch, corner = self._patch(x, generator)
            part = Cond.cat(conds).crop(corner, patch.shape[-2:])
            patch_cond = self._teacher.of_patch(part, x.shape[-2:], corner)
            patches = torch.cat([patch] * count)
            found = self._teacher.features(patches, t.repeat(count), patch_cond, self.taps)
            parts = [m.chunk(count) for m in found]
            maps = maps + [m[i] for i in range(count) for m in parts]
        return maps

    def _patch(self, x: Tensor, generator: Generator | None) -> tuple[Tensor, list[int]]:
        """A patch [B, C, ..., h, w] of whole tokens, at one position for the batch, and its row and
        column.
        """
        corner = []
        cell = self._teacher.patch
        place = torch.rand(2).tolist() if generator is None else uniform(2, generator, "patch")
        for dim, u in zip((-2, -1), place, strict=True):
            cells = x.shape[dim] // cell
            size = max(1, round(self.patch * cells))
            corner.append(cell * int(u * (cells - size + 1)))
            x = x.narrow(dim, corner[-1], cell * size)
        return x.contiguous(), corner
