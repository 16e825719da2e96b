"""The pictures of a study: what its students generate, and their scores along the run."""

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
from distill.report.curves import STYLE
from distill.report.evaluation import MAIN
from distill.report.runs import Run

SHOWN, LABEL, MOST = 14, 150, 24  # pictures a row at most, pixels of a label at least, rows
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
    font = ImageFont.load_default(14)
    left = max(LABEL, *(int(font.getlength(label)) + 12 for label, _ in lines))
    columns = max(len(pictures) for _, pictures in lines)
    found = Image.new("RGB", (left + columns * side, side * len(lines)), "white")
    draw = ImageDraw.Draw(found)
    for i, (label, pictures) in enumerate(lines):
        draw.text((4, i * side + side // 2 - 9), label, "black", font)
        for k, picture in enumerate(pictures):
            found.paste(picture, (left + k * side, i * side))
    return found


def labelled(who: str, steps: int) -> str:
    return f"{who}, {steps_text(steps)}"


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
    with rc_context({**STYLE, "svg.hashsalt": "distill"}):  # the same file for the same numbers
        figure = Figure(figsize=(9, 3 * -(-len(found) // 2)), layout="constrained")
        for place, (key, axis, curves) in zip(
            figure.subplots(-(-len(found) // 2), 2, squeeze=False).flat, found, strict=False
        ):
            plotted(curves, key)(place)
            place.set_title(MEASURES[key].name)
            place.set_xlabel(AXES[axis][1])
        first = figure.axes[0].get_legend_handles_labels()
        figure.legend(*first, loc="outside upper left", ncols=4)
        figure.savefig(file, format="svg", metadata={"Date": None})
