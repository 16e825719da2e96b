"""Write the ratings of `wins.csv`, which `distill.compare judge=...` makes, into the page.

    python experiments/proxy_user_study/write.py [compare/wins.csv]

Without an argument the `wins.csv` beside this file is taken; another one is copied there first.
Writes the tables between the markers of README.md, and `elo.svg`.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from distill.report.curves import STYLE
from distill.storage.atomic import write_text_atomic

HERE = Path(__file__).parent
RIVAL = "teacher, path=shapes:mmdit, 28 steps"
BEGIN, END = "<!-- made by write.py -->", "<!-- end -->"
HEAD = "| model | ELO | 95 % interval | wins against the teacher's 28 steps | 95 % interval |"


def rows_of(file: Path, measure: str) -> list[dict[str, str]]:
    """The rows of a measure, `elo` or `win_rate`, over all prompts."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    return [row for row in rows if row["measure"] == measure and not row["category"]]


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
    won, lines = rates(file), [HEAD, "|---|---|---|---|---|"]
    for row in sorted(rows_of(file, "elo"), key=lambda row: -float(row["value"])):
        elo, low, high = (float(row[key]) for key in ("value", "low", "high"))
        cells = [row["model"], f"{elo:.0f}", f"[{low:.0f}, {high:.0f}]", "", ""]
        if row["model"] in won:
            rate, least, most = won[row["model"]]
            cells[3:] = [f"{rate:.1%}", f"[{least:.1%}, {most:.1%}]"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(file: Path, out: Path) -> None:
    """The ratings with their intervals, the best on top."""
    rows = sorted(rows_of(file, "elo"), key=lambda row: float(row["value"]))
    value, low, high = ([float(row[key]) for row in rows] for key in ("value", "low", "high"))
    below = [v - a for v, a in zip(value, low, strict=True)]
    above = [b - v for v, b in zip(value, high, strict=True)]
    with rc_context({**STYLE, "svg.hashsalt": "distill"}):
        figure = Figure(figsize=(7, 0.28 * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots()
        axes.errorbar(value, range(len(rows)), xerr=[below, above], fmt="o", markersize=4)
        axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
        axes.set_xlabel("ELO by the reader's verdicts")
        figure.savefig(out, format="svg", metadata={"Date": None})


def main(words: list[str]) -> None:
    if words:
        shutil.copy(words[0], HERE / "wins.csv")
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    start, rest = text.split(BEGIN, 1)
    made = f"{BEGIN}\n\n{table(HERE / 'wins.csv')}\n\n{END}"
    write_text_atomic(page, start + made + rest.split(END, 1)[1])
    draw(HERE / "wins.csv", HERE / "elo.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
