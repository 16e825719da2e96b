"""Write the tables of two studies' own measurements into their pages, from the CSV files beside
them.

    python experiments/measured.py

`edit_shapes/measure.py` makes `guidance.csv`, and `preference_shapes/measure.py` `win_rates.csv`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev

from runner.pages import read_rows, replace_parts, table_of

from distill.evaluation.tables import steps_text

HERE = Path(__file__).parent
Rows = list[dict[str, str]]
GUIDANCE_HEADS = (
    "guidance by instruction, by source", "model", "followed", "right", "change", "Fréchet",
)  # fmt: skip
WIN_HEADS = (
    "model", "LoRA", "steps", "won over plain", "won over itself", "measure", "prompt accuracy",
    "Fréchet distance",
)  # fmt: skip


def guidance(rows: Rows) -> str:
    """A line for each guidance and model, over the seeds of a model."""

    def scales(row: dict[str, str]) -> tuple[float, float]:
        return float(row["guidance"]), float(row["image_guidance"])

    def model(row: dict[str, str]) -> tuple[float, float, int]:
        return (*scales(row), -int(row["steps"]))  # the teacher, of more steps, first

    lines = []
    for _, found in groupby(sorted(rows, key=model), key=model):
        of_model = list(found)
        cells = [_spread(of_model, key, "{:.0%}") for key in ("followed", "edited")]
        cells += [_spread(of_model, "change", "{:.2f}"), _spread(of_model, "frechet", "{:,.0f}")]
        name = f"{of_model[0]['model']}, {steps_text(int(of_model[0]['steps']))}"
        lines.append(["{:g}, {:g}".format(*scales(of_model[0])), name, *cells])
    return table_of(GUIDANCE_HEADS, lines)


def win_rates(rows: Rows) -> str:
    """A line for each model and scale of its LoRA."""
    lines = []
    for row in rows:
        plain, scale = row["model"] == row["against"], float(row["lora_scale"])
        lines.append(
            [
                row["model"],
                f"{scale:g}" if scale else "",
                row["steps"],
                "" if plain and not scale else _interval(row, "won", "low", "high"),
                _interval(row, "own", "own_low", "own_high") if scale else "",
                *(f"{float(row[key]):.3f}" for key in ("measure", "prompt_accuracy")),
                f"{float(row['frechet']):,.0f}",
            ]
        )
    return table_of(WIN_HEADS, lines)


def _spread(rows: Rows, key: str, form: str) -> str:
    """The mean over seeds, with the standard deviation if there are several."""
    values = [float(row[key]) for row in rows]
    text = form.format(fmean(values))
    return f"{text} ± {form.format(stdev(values))}" if len(values) > 1 else text


def _interval(row: dict[str, str], *keys: str) -> str:
    """A share with the ends of its interval."""
    value, low, high = (float(row[key]) for key in keys)
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


# The file of a study -> the table of its rows.
TABLES: dict[str, Callable[[Rows], str]] = {
    "edit_shapes/guidance": guidance,
    "preference_shapes/win_rates": win_rates,
}


def main() -> None:
    for name, table in TABLES.items():
        file = HERE / f"{name}.csv"
        parts = {file.stem: table(read_rows(file))}
        replace_parts(file.parent / "README.md", parts, by=Path(__file__).name)


if __name__ == "__main__":
    main()
