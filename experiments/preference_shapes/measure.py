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
from statistics import mean

import torch
from torch import Tensor
from torchvision.utils import save_image

from distill.config.models import student_of
from distill.core import distances
from distill.machine.hardware import autocast, precision
from distill.report.wins import votes, win_rate
from distill.sampling import Consistency, seeded
from distill.sampling.guided import guided
from distill.storage.atomic import write_text_atomic
from distill.terminal.progress import track
from distill.worlds.shapes.judge import Judge, judging_prompts
from distill.worlds.shapes.preference import centred_area
from distill.worlds.shapes.world import Prompt

HERE = Path(__file__).parent
STEPS, GUIDANCE = 28, 4.0  # of the teachers, as in distill.synthesize
BATCH, SHOWN = 32, 16
COLUMNS = (
    "model", "lora_scale", "steps", "against", "seeds", "prompts", "won", "low", "high", "own",
    "own_low", "own_high", "measure", "prompt_accuracy", "frechet",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A row: `run` is a folder below the study's, with the place of the seed, or a shipped
    pipeline.
    """

    name: str
    run: str
    scale: float = 0.0  # of the LoRA that is added
    steps: int = 1
    against: str = "plain student"


TEACHER = "shapes:mmdit_small"
STUDENTS = ("plain", "preferred")
MODELS = (
    Model("teacher", TEACHER, steps=STEPS, against="teacher"),
    Model("teacher", TEACHER, scale=1.0, steps=STEPS, against="teacher"),
    *(
        Model(f"{job} student", f"{job}/seed_{{seed}}/student", scale)
        for job, scales in zip(STUDENTS, ((0.0, 1.0), (0.0, 0.5, 1.0)), strict=True)
        for scale in scales
    ),
)


@dataclass(frozen=True)
class Drawn:
    """The pictures of a model of one seed: their measure [N], and their scores."""

    measure: Tensor
    prompt_accuracy: float
    frechet: float


@torch.no_grad()
def pictures(row: Model, seed: int, out: Path, prompts: list[Prompt]) -> Tensor:
    """Pixels [N, 3, 64, 64] of all prompts; prompt i has seed i."""
    run = row.run if row.run == TEACHER else str(out / row.run.format(seed=seed))
    lora = str(out / "prepared" / "dpo") if row.scale else None
    model = student_of(run, lora=lora, lora_scale=row.scale)
    chosen, found = precision("auto", "cpu").name, []
    sample = partial(Consistency(), model)
    if row.steps == STEPS:
        sample = partial(guided, model, guidance=GUIDANCE)
    what = f"{row.name}, LoRA x {row.scale:g}, seed {seed}"
    for start in track(range(0, len(prompts), BATCH), what, unit="batch"):
        cond = model.embed([prompt.caption for prompt in prompts[start : start + BATCH]])
        seeds = range(start, start + len(cond))
        with autocast(chosen, model.device.type):
            x0 = sample(cond, seeded(seeds), shape=model.latent_shape, steps=row.steps)
        found.append(model.pictures(x0).clamp(-1, 1))
    return torch.cat(found)


def won(measures: list[Tensor], others: list[Tensor]) -> tuple[float, float, float]:
    """The share of prompts at which each seed's measure [N] is above the other's, and its interval
    over seeds and prompts.
    """
    found = win_rate(votes(torch.stack(measures).numpy(), torch.stack(others).numpy()))
    return found.value, found.low or 0.0, found.high or 0.0


def seeds_of(out: Path) -> list[int]:
    """The seeds of which both students are finished."""
    having = [
        {int(run.parent.name.removeprefix("seed_")) for run in out.glob(f"{job}/seed_*/student")}
        for job in STUDENTS
    ]
    return sorted(set.intersection(*having))


def main(out: Path, count: int = 200) -> None:
    prompts, judge = judging_prompts(count, seed=0), Judge.load()
    real = judge.reference(prompts, seed=0).features
    strips: list[Tensor] = []

    def drawn(row: Model, seed: int, shown: bool) -> Drawn:
        pixels = pictures(row, seed, out, prompts)
        features, answers = judge.read(pixels)
        strips.extend([pixels[:SHOWN]] if shown else [])
        right = judge.shows_prompt(answers, prompts).double().mean().item()
        return Drawn(centred_area(pixels), right, distances.frechet(features, real))

    of_name: dict[str, list[Tensor]] = {}
    rows = []
    for row in MODELS:
        seeds = [0] if row.run == TEACHER else seeds_of(out)
        found = [drawn(row, seed, seed == seeds[0]) for seed in seeds]
        measures = [one.measure for one in found]
        of_name.setdefault(row.name, measures)  # the first of a name is without the LoRA
        numbers = [*won(measures, of_name[row.against]), *won(measures, of_name[row.name])]
        numbers += [torch.stack(measures).mean().item()]
        numbers += [mean(one.prompt_accuracy for one in found), mean(one.frechet for one in found)]
        texts = [f"{x:.4g}" for x in numbers]
        rows.append([row.name, row.scale, row.steps, row.against, len(seeds), count, *texts])
        print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows([COLUMNS, *rows])
    write_text_atomic(HERE / "win_rates.csv", text.getvalue())
    save_image(torch.cat(strips) / 2 + 0.5, HERE / "pictures.png", nrow=SHOWN)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
