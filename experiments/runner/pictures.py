"""The pictures of a study: what its students generate, and their scores along the run."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from distill.evaluation.results import PADDING
from distill.evaluation.tables import MEASURES, steps_text
from distill.report.along_runs import AXES, curves_of, plotted, tables_of
from distill.report.comparison import tiles
from distill.report.curves import STYLE, label_plainly
from distill.report.evaluation import MAIN
from distill.report.runs import Run

SHOWN, LABEL, MOST = 14, 150, 24  # pictures a row at most, pixels of a label at least, rows
DRAWN = {**STYLE, "svg.hashsalt": "distill"}  # the same file for the same numbers
Rows = dict[tuple[str, int], list[Image.Image]]


def rows_of(folder: Path) -> Rows:
    """(who, steps) -> its pictures, cut from the comparison of a run; {} if it kept none."""
    places = (folder / "comparison.png", folder / "samples" / "comparison.png")
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return {}
    judged = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    cut = zip(judged, tiles(path, len(judged), SHOWN), strict=False)
    return {(row["who"], row["steps"]): pictures for row, pictures in cut}


def sheet(lines: Sequence[tuple[str, list[Image.Image]]]) -> Image.Image:
    """One picture: a line for each (label, pictures)."""
    side = lines[0][1][0].width + PADDING
    font, left = ImageFont.load_default(14), _left([label for label, _ in lines])
    columns = max(len(pictures) for _, pictures in lines)
    found = Image.new("RGB", (left + columns * side, side * len(lines)), "white")
    draw = ImageDraw.Draw(found)
    for i, (label, pictures) in enumerate(lines):
        draw.text((4, i * side + side // 2 - 9), label, "black", font)
        for k, picture in enumerate(pictures):
            found.paste(picture, (left + k * side, i * side))
    return found


def _left(labels: Sequence[str]) -> int:
    """Pixels left of the pictures of a sheet with these labels."""
    font = ImageFont.load_default(14)
    return max(LABEL, *(int(font.getlength(label)) + 12 for label in labels))


def labelled(who: str, steps: int) -> str:
    return f"{who}, {steps_text(steps)}"


def rows_of_sheet(folder: Path, table: str) -> Rows:
    """(group, or teacher; steps) -> its pictures, cut from what `write_grid` drew of a table.

    {} if there is no such picture, or one of other rows than those that <table>.csv has.
    """
    path = folder / f"{table}.png"
    if not path.is_file():
        return {}
    names = _names_of(folder / f"{table}.csv")[:MOST]
    with Image.open(path) as opened:
        drawn = opened.convert("RGB")
    side, rest = divmod(drawn.height, len(names))
    left = _left([labelled(*name) for name in names])
    if rest or side <= PADDING or (drawn.width - left) % side:
        return {}
    return {
        name: [
            drawn.crop((x, i * side, x + side - PADDING, (i + 1) * side - PADDING))
            for x in range(left, drawn.width, side)
        ]
        for i, name in enumerate(names)
    }


def _names_of(file: Path) -> list[tuple[str, int]]:
    """(group, or teacher; steps) of the first run of every group, in the order of `write_grid`."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    first = {row["group"]: row["run"] for row in reversed(rows)}
    names: list[tuple[str, int]] = []
    for row in rows:
        if row["who"] == "teacher":
            names.insert(0, ("teacher", int(row["steps"])))
        elif first[row["group"]] == row["run"]:
            names.append((row["group"], int(row["steps"])))
    return names


def write_grid(file: Path, groups: Mapping[str, Sequence[Run]]) -> None:
    """The teacher, then the first run of every job by number of steps; at most MOST rows."""
    lines: list[tuple[str, list[Image.Image]]] = []
    for group, (first, *_) in groups.items():
        found = rows_of(first.folder)
        for (who, steps), pictures in found.items():
            if who == "teacher" and pictures:
                lines.insert(0, (labelled("teacher", steps), pictures))
            elif pictures:
                lines.append((labelled(group, steps), pictures))
    if lines:
        sheet(lines[:MOST]).save(file, optimize=True)


def write_curves(file: Path, groups: Mapping[str, Sequence[Run]]) -> None:
    """Scores along the runs against time and pictures, with bands over seeds; no file without."""
    tables, _ = tables_of(groups)
    found = [(key, axis, curves_of(tables, key, axis)) for key in MAIN for axis in AXES]
    found = [(key, axis, curves) for key, axis, curves in found if curves]
    if not found:
        return
    with rc_context(DRAWN):
        figure = Figure(figsize=(9, 3 * -(-len(found) // 2)), layout="constrained")
        for place, (key, axis, curves) in zip(
            figure.subplots(-(-len(found) // 2), 2, squeeze=False).flat, found, strict=False
        ):
            plotted(curves, key)(place)
            label_plainly(place)
            place.set_title(MEASURES[key].name)
            place.set_xlabel(AXES[axis][1])
        first = figure.axes[0].get_legend_handles_labels()
        figure.legend(*first, loc="outside upper left", ncols=4)
        figure.savefig(file, format="svg", metadata={"Date": None})
