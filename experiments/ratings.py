"""Write the ratings of `wins.csv`, which `distill.compare judge=...` makes, into the page.

    python experiments/ratings.py [compare/wins.csv]

Without an argument the `wins.csv` beside the page is taken; another one is copied there first.
Writes the table of `proxy_user_study/README.md`, and `elo.svg`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from runner.pages import read_rows, replace_parts, table_of
from runner.pictures import DRAWN

FOLDER = Path(__file__).parent / "proxy_user_study"
RIVAL = "teacher, path=shapes:mmdit, 28 steps"
PART = "ratings"
HEADS = ("model", "ELO", "95 % interval", "wins against the teacher's 28 steps", "95 % interval")


def rows_of(file: Path, measure: str) -> list[dict[str, str]]:
    """The rows of a measure, `elo` or `win_rate`, over all prompts."""
    found = read_rows(file)
    return [row for row in found if row["measure"] == measure and not row["category"]]


def rates(file: Path) -> dict[str, tuple[float, float, float]]:
    """Model -> its win rate against RIVAL with the ends of the interval."""
    found = {}
    for row in rows_of(file, "win_rate"):
        value, low, high = (float(row[key]) for key in ("value", "low", "high"))
        if row["against"] == RIVAL:
            found[row["model"]] = (value, low, high)
        elif row["model"] == RIVAL:
            found[row["against"]] = (1 - value, 1 - high, 1 - low)
    return found


def table(file: Path) -> str:
    """The ratings as a table, the best first."""
    won, lines = rates(file), []
    for row in sorted(rows_of(file, "elo"), key=lambda row: -float(row["value"])):
        elo, low, high = (float(row[key]) for key in ("value", "low", "high"))
        cells = [row["model"], f"{elo:.0f}", f"[{low:.0f}, {high:.0f}]", "", ""]
        if row["model"] in won:
            rate, least, most = won[row["model"]]
            cells[3:] = [f"{rate:.1%}", f"[{least:.1%}, {most:.1%}]"]
        lines.append(cells)
    return table_of(HEADS, lines)


def draw(file: Path, out: Path) -> None:
    """The ratings with their intervals, the best on top."""
    rows = sorted(rows_of(file, "elo"), key=lambda row: float(row["value"]))
    value, low, high = ([float(row[key]) for row in rows] for key in ("value", "low", "high"))
    below = [v - a for v, a in zip(value, low, strict=True)]
    above = [b - v for v, b in zip(value, high, strict=True)]
    with rc_context(DRAWN):
        figure = Figure(figsize=(7, 0.28 * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots()
        axes.errorbar(value, range(len(rows)), xerr=[below, above], fmt="o", markersize=4)
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.set_xlabel("ELO by the reader's verdicts")
        figure.savefig(out, format="svg", metadata={"Date": None})


def main(words: list[str]) -> None:
    if words:
        shutil.copy(words[0], FOLDER / "wins.csv")
    made = {PART: table(FOLDER / "wins.csv")}
    replace_parts(FOLDER / "README.md", made, by=Path(__file__).name)
    draw(FOLDER / "wins.csv", FOLDER / "elo.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
