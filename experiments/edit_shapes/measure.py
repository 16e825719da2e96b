"""What the strength of guidance does to an editing teacher, and to its one-step student.

    python experiments/edit_shapes/measure.py runs/studies/edit_shapes [edits] [seeds]

The folder is that of `python experiments/run.py edit_shapes`. LADD's paper says that a distilled
editor no longer obeys the strength of guidance, and keeps too close to its source. Every model
answers the same edits from the same noise, at several guidances by the instruction (s_T) and by the
source (s_I). Writes `guidance.csv` beside this file, and `pictures.png`: sources, true targets,
then a row for each model at the guidance that the teacher is evaluated with.
"""

from __future__ import annotations

import csv
import io
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.utils import save_image

from distill.config.models import student_of
from distill.evaluation.shapes_edit import edited
from distill.machine.hardware import precision
from distill.sampling import Consistency, in_precision
from distill.sampling.guided import WithGuidance, guided
from distill.storage.atomic import write_text_atomic
from distill.terminal.progress import Bar
from distill.worlds.shapes.edit_judge import EditJudge, judging_edits, rendered

HERE = Path(__file__).parent
STEPS = 28  # of the teacher
SCALES = ((1.0, 1.0), (2.0, 1.0), (3.0, 1.0), (5.0, 1.0), (3.0, 1.5), (3.0, 2.5))  # s_T, s_I
EVALUATED, SHOWN = (3.0, 1.5), 16
MEASURES = ("followed", "kept", "edited", "stuck", "change", "kept_error", "frechet")


def sampler(model: Any, steps: int, scales: tuple[float, float]) -> Any:
    """The function that samples latents of a conditioning: the teacher's, or a student's."""
    chosen = precision("auto", "cpu").name
    how = {"shape": model.latent_shape, "precision": chosen}
    if steps == STEPS:
        given = {"guidance": scales[0], "image_guidance": scales[1], "steps": steps}
        return partial(in_precision, partial(guided, model, **given), **how)
    student = WithGuidance(model, *scales)
    return partial(in_precision, partial(Consistency(), student, steps=steps), **how)


@torch.no_grad()
def main(out: Path, count: int = 200, seeds: int = 3) -> None:
    edits, judge, rows = judging_edits(count, seed=0), EditJudge.load(), []
    shown = [rendered([getattr(e, side) for e in edits[:SHOWN]]) for side in ("source", "target")]
    runs = [("teacher", "shapes:unet_edit", STEPS, "")]
    runs += [("student", str(out / f"ladd/seed_{s}/student"), 1, str(s)) for s in range(seeds)]
    for name, place, steps, seed in runs:
        model = student_of(place)
        for scales in SCALES:
            what = f"{name} {seed}, guidance {scales[0]:g} and {scales[1]:g}"
            with Bar(what, count, unit="image", rate="images") as bar:
                sample = sampler(model, steps, scales)
                pictures = edited(model, sample, edits, range(count), bar)
            scores = judge(pictures, edits)
            numbers = [f"{scores[key]:.4g}" for key in MEASURES]
            rows.append([name, seed, steps, *map("{:g}".format, scales), count, *numbers])
            if scales == EVALUATED and seed in ("", "0"):
                shown.append(pictures[:SHOWN])
    heads = ["model", "seed", "steps", "guidance", "image_guidance", "edits", *MEASURES]
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows([heads, *rows])
    write_text_atomic(HERE / "guidance.csv", text.getvalue())
    save_image(torch.cat(shown) / 2 + 0.5, HERE / "pictures.png", nrow=SHOWN)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
