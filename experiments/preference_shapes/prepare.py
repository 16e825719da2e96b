"""The prompts and the pairs of the study: samples of the small teacher, ranked by a measure.

    python experiments/preference_shapes/prepare.py out [captions] [candidates]

Leaves `out/prompts.txt`, captions as in the training of the teacher, and `out/pairs`, a shard of
latents of a winner and a loser for those with two candidates or more that show the caption.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from distill.config.compose import shipped
from distill.data.write import write_preferences
from distill.machine.hardware import autocast, precision
from distill.sampling import seeded
from distill.sampling.guided import guided
from distill.storage.atomic import write_text_atomic
from distill.teachers.sd3 import SD3
from distill.terminal.progress import track
from distill.worlds.shapes import preference
from distill.worlds.shapes.world import sample

SEED = 5  # of captions and noise: neither training nor judging of the models has seen these scenes
STEPS, GUIDANCE = 16, 4.0  # fewer than the 28 of distill.synthesize, to save time
AT_ONCE = 16  # captions


def candidates(teacher: SD3, captions: list[str], each: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Latents and pixels of `each` samples of every caption."""
    chosen = precision("auto", "cpu").name
    options = {"shape": teacher.latent_shape, "steps": STEPS, "guidance": GUIDANCE}
    for start in track(range(0, len(captions), AT_ONCE), "candidates", unit="batch"):
        part = captions[start : start + AT_ONCE]
        repeated = [caption for caption in part for _ in range(each)]
        seeds = range(1_000_000 + start * each, 1_000_000 + start * each + len(repeated))
        with torch.no_grad(), autocast(chosen, teacher.device.type):
            latents = guided(teacher, teacher.embed(repeated), seeded(seeds), **options).float()
        pixels = teacher.pictures(latents)
        yield from zip(latents.split(each), pixels.split(each), strict=True)


def main(out: Path, count: int = 600, each: int = 5) -> None:
    captions = [sample(SEED, i)[0].caption for i in range(count)]
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "prompts.txt", "\n".join(captions) + "\n")
    teacher = SD3(shipped("shapes:mmdit_small"))
    made = candidates(teacher, captions, each)
    pairs = preference.pairs(captions, made)
    write_preferences(str(out / "pairs" / "pairs-%06d.tar"), pairs, per_shard=count)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
