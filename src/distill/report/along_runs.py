"""Curves of quality along runs, from their scores.csv: against training time and pictures seen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from distill.evaluation.results import SCORES
from distill.evaluation.tables import MEASURES, SPACE
from distill.report.curves import chart_figure, legend, read
from distill.report.evaluation import MAIN
from distill.report.page import render
from distill.report.runs import Run
from distill.storage.safe_paths import check_own

AXES = {  # column of scores.csv -> divisor, unit
    "train_seconds": (60.0, "training minutes"),
    "images_seen": (1000.0, "thousand pictures seen"),
}
LINES = ("-", "--", ":")  # of the first six groups, the next six, ...


class Curve(NamedTuple):
    """A measure of a group along its runs, at the steps that all its seeds have.

    x [N] is the mean over seeds; mean, low and high [N] are over seeds.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def along_runs(groups: Mapping[str, Sequence[Run]]) -> Iterator[Markup]:
    """A chart by time and one by pictures for each main measure that was scored along runs."""
    tables, errors = tables_of(groups)
    for error in errors:
        yield render("note", f"A curve is left out: {error}.", kind="none")
    for key in MAIN:
        for axis, (_, unit) in AXES.items():
            curves = curves_of(tables, key, axis)
            if curves:
                title = f"{MEASURES[key].head.replace(SPACE, ' ')} along the run"
                about = f"By {unit}. Line: mean over seeds; band: lowest to highest seed."
                yield chart_figure(title, about, plotted(curves, key))


def curves_of(
    tables: Mapping[str, Sequence[Mapping[str, np.ndarray]]], key: str, axis: str
) -> dict[str, Curve]:
    """The curve of each group that has this measure; `tables` are of its seeds."""
    found = {
        group: [table for table in seeds if key in table and axis in table]
        for group, seeds in tables.items()
    }
    return {group: _curve(seeds, key, axis) for group, seeds in found.items() if seeds}


def _curve(tables: Sequence[Mapping[str, np.ndarray]], key: str, axis: str) -> Curve:
    steps = set.intersection(*(set(table[key][0]) & set(table[axis][0]) for table in tables))
    chosen = sorted(steps)
    values = np.array([_at(table[key], chosen) for table in tables])
    x = np.array([_at(table[axis], chosen) for table in tables]).mean(0) / AXES[axis][0]
    return Curve(x, values.mean(0), values.min(0), values.max(0), len(tables))


def _at(curve: np.ndarray, steps: Sequence[float]) -> list[float]:
    """The values of a curve [2, N] at these of its steps."""
    known = dict(zip(*curve.tolist(), strict=True))
    return [known[step] for step in steps]


def plotted(curves: Mapping[str, Curve], key: str) -> Callable[[Any], None]:
    """What draws the curves of a measure on axes."""

    def plot(axes: Any) -> None:
        for i, (group, curve) in enumerate(curves.items()):
            colour, style = f"C{i % 6}", LINES[i // 6 % len(LINES)]  # six colours
            marks = {"marker": "o", "markersize": 3, "label": legend(group)}
            axes.plot(curve.x, curve.mean, color=colour, linestyle=style, **marks)
            if curve.seeds > 1:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, lw=0)
        positive = all((curve.low > 0).all() for curve in curves.values())
        axes.set_yscale("log" if MEASURES[key].better == "lower" and positive else "linear")
        axes.set_xlim(left=0)

    return plot


def tables_of(
    groups: Mapping[str, Sequence[Run]],
) -> tuple[dict[str, list[dict[str, np.ndarray]]], list[str]]:
    """The columns of every run's scores.csv, by group; and the errors of reading."""
    found: dict[str, list[dict[str, np.ndarray]]] = {group: [] for group in groups}
    errors = []
    for group, runs in groups.items():
        for run in runs:
            try:
                if table := columns_in(run, SCORES):
                    found[group].append(table)
            except (OSError, ValueError) as error:
                errors.append(str(error))
    return found, errors


def columns_in(run: Run, name: str) -> dict[str, np.ndarray]:
    """The columns of a table in the folder of a run, each [2, N]; {} if it has none.

    Raises OSError or ValueError for one that cannot be read, or that is a link to another file.
    """
    path = run.folder / name
    check_own(path, run.folder)
    return read(path)[0] if path.exists() else {}
