"""Win rates of the study's models over the plain ones: pictures, their measures, a table.

    python experiments/preference_shapes/measure.py out [prompts]

`out` is the folder of `python experiments/run.py preference_shapes`. Each model draws a picture of
every prompt, from the noise that all share. It wins where the measure of the preference is higher
than for the plain model; `own` is the same against itself without the LoRA. A tie counts half.
Writes `win_rates.csv` and
`pictures.png` beside this file.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from distill.config.models import student_of
from distill.core import distances
from distill.evaluation.statistics import Sample, mean_interval
from distill.machine.hardware import autocast, precision
from distill.sampling import Consistency, seeded
from distill.sampling.guided import guided
from distill.storage.atomic import write_text_atomic
from distill.terminal.progress import track
from distill.worlds.shapes.judge import Judge, fresh_renders, judging_prompts
from distill.worlds.shapes.preference import centred_area
from distill.worlds.shapes.world import Prompt

HERE = Path(__file__).parent
STEPS, GUIDANCE = 28, 4.0  # of the teachers, as in distill.synthesize
BATCH, SHOWN = 32, 16
COLUMNS = (
    "model", "lora_scale", "steps", "against", "prompts", "won", "low", "high", "own", "own_low",
    "own_high", "measure", "prompt_accuracy", "frechet", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A row: `run` is a folder below the study's, or a shipped pipeline."""

    name: str
    run: str
    scale: float = 0.0  # of the LoRA that is added
    steps: int = 1
    against: str = "plain student"


def models(seed: int) -> list[Model]:
    """The teacher before and after, both students without and with the same LoRA."""
    plain, preferred = (f"{job}/seed_{seed}/student" for job in ("plain", "preferred"))
    teacher, against = "shapes:mmdit_small", "teacher"
    return [
        Model("teacher", teacher, steps=STEPS, against=against),
        Model("teacher", teacher, scale=1.0, steps=STEPS, against=against),
        Model("plain student", plain),
        Model("plain student", plain, scale=1.0),
        Model("preferred student", preferred),
        Model("preferred student", preferred, scale=0.5),
        Model("preferred student", preferred, scale=1.0),
    ]


@torch.no_grad()
def pictures(row: Model, out: Path, prompts: list[Prompt]) -> Tensor:
    """Pixels [N, 3, 64, 64] of all prompts; prompt i has seed i."""
    run = row.run if row.run.startswith("shapes:") else str(out / row.run)
    lora = str(out / "prepared" / "dpo") if row.scale else None
    model = student_of(run, lora=lora, lora_scale=row.scale)
    chosen, found = precision("auto", "cpu").name, []
    sample = partial(Consistency(), model)
    if row.steps == STEPS:
        sample = partial(guided, model, guidance=GUIDANCE)
    what = f"{row.name}, LoRA x {row.scale:g}"
    for start in track(range(0, len(prompts), BATCH), what, unit="batch"):
        cond = model.embed([prompt.caption for prompt in prompts[start : start + BATCH]])
        seeds = range(start, start + len(cond))
        with autocast(chosen, model.device.type):
            x0 = sample(cond, seeded(seeds), shape=model.latent_shape, steps=row.steps)
        found.append(model.pictures(x0).clamp(-1, 1))
    return torch.cat(found)


def won(measure: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Share of prompts at which `measure` [N] is above `other`, and its interval over prompts."""
    wins = ((measure > other).double() + (measure == other).double() / 2).numpy()
    found = mean_interval(Sample([float(wins.mean())], wins[None], fixed=True))
    return float(wins.mean()), found.low or 0.0, found.high or 0.0


def main(out: Path, count: int = 200, seed: int = 0) -> None:
    prompts, judge = judging_prompts(count, seed=0), Judge.load()
    real, _ = judge.read(fresh_renders(prompts, seed=0))
    scores: dict[str, Tensor] = {}
    rows, strips = [], []
    for row in models(seed):
        pixels = pictures(row, out, prompts)
        features, answers = judge.read(pixels)
        measure = centred_area(pixels)
        scores.setdefault(row.name, measure)  # the first of a name is without the LoRA
        right = judge.shows_prompt(answers, prompts).double().mean()
        shown = [*won(measure, scores[row.against]), *won(measure, scores[row.name])]
        shown += [measure.mean(), right, distances.frechet(features, real)]
        numbers = [f"{float(x):.4g}" for x in shown]
        rows.append([row.name, row.scale, row.steps, row.against, count, *numbers, seed])
        strips.append(pixels[:SHOWN])
        print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows([COLUMNS, *rows])
    write_text_atomic(HERE / "win_rates.csv", text.getvalue())
    save_image(torch.cat(strips) / 2 + 0.5, HERE / "pictures.png", nrow=SHOWN)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
