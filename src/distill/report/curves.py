"""Training curves: losses of student and discriminator, health of the discriminator, learning
rates, speed.
"""

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from distill.report.page import data_uri, join_html, render
from distill.storage.bounded import text_of
from distill.terminal.shown import shown


class Chart(NamedTuple):
    title: str
    columns: str  # a regular expression for column names; its group is the label of the curve
    about: str
    scale: str = "linear"
    guide: float | None = None


LOSS = r"(?!(?:accuracy|grad_norm|lr|update_ratio|(?:real|fake)(?:_head\d+)?)$)(.+)"
CHARTS = (
    Chart("Student's losses", f"g/{LOSS}", "Weighted terms; their sum is minimised."),
    Chart("Discriminator's losses", f"d/{LOSS}", "Weighted terms; their sum is minimised."),
    Chart("Logits", "d/(real|fake)", "Mean logit of real and of generated samples."),
    Chart("Gap by head", "gap/(.+)", "Real minus fake; a head at 0 sees no difference.", guide=0),
    Chart(
        "Discriminator's accuracy",
        "d/(accuracy)",
        "Share of pairs whose real logit is higher; 0.5 is guessing.",
        guide=0.5,
    ),
    Chart(
        "Preferred pairs",
        "pairs/(preferred)",
        "Share of pairs whose winner the student prefers more than the reference does.",
        guide=0.5,
    ),
    Chart("Gradient norms", "(g|d|f)/grad_norm", "Before clipping, log scale.", "log"),
    Chart("Learning rates", "(g|d|f)/lr", "After warm-up and decay."),
    Chart(
        "Update-to-weight ratio",
        "(g|d)/update_ratio",
        "Norm of an update divided by that of the weights, log scale.",
        "log",
    ),
    Chart("Speed", "(images_per_second)", "Training images per second."),
)
NAMES = {"g": "student", "d": "discriminator", "f": "fake score"}
MANY_HEADS = 6  # if there are more, only the highest, median and lowest are plotted
MOST_BYTES = 256 * 2**20  # ours: limit of a metrics.csv, about a million rows
POINTS = 600  # of a curve; a longer one is averaged to so many, which keeps the page small
GREY = "#7d8189"  # legible on white and on black, as are the colours of the curves
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 8.5, "text.color": GREY, "savefig.transparent": True,
    "legend.frameon": False,
    "axes.prop_cycle": (
        "cycler('color', ['3b7ddd', 'e0662e', '1fa37a', '9a5fd0', 'b8921a', 'd9518f'])"
    ),
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.edgecolor": GREY,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": GREY, "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # a name with $ in it is no formula
    "xtick.color": GREY, "ytick.color": GREY, "ytick.major.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


def charts(path: Path) -> Markup:
    """The section of curves from a metrics.csv."""
    curves, skipped = read(path)
    drawn = (_figure(chart, curves) for chart in CHARTS)
    figures = [figure for figure in drawn if figure is not None]
    if not figures:
        raise ValueError("it holds no numbers to plot")
    left_out = f" {skipped:,} values that are not finite numbers are left out." if skipped else ""
    note = (
        "Over student steps. Bold: running mean over a fortieth of the run; faint: as"
        f" logged.{left_out}"
    )
    return join_html(render("note", note), render("charts", figures))


def read(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """Column -> steps and values [2, N], and the number of values that are not finite numbers.

    Each line is a row: an open quote affects only its own line. Raises OSError, and ValueError for
    a file without column names.
    """
    rows: dict[float, dict[str, float]] = {}  # a resumed run writes a step twice: the last counts
    skipped = 0
    text = text_of(path, MOST_BYTES, errors="replace")
    with io.StringIO(text, newline="") as lines:
        # A kill may have cut the last line short.
        complete = (line.replace("\0", "") for line in lines if line.endswith("\n"))
        columns = _cells(next(complete, "\n"))
        if columns is None:
            raise ValueError(f"{path}: its first line has no readable column names")
        for cells in map(_cells, complete):
            skipped += cells is None
            named = zip(columns, cells or (), strict=False)
            values = {name: _float(cell) for name, cell in named if cell}
            finite = {name: x for name, x in values.items() if math.isfinite(x)}
            skipped += len(values) - len(finite)
            if "step" in finite:
                rows.setdefault(finite.pop("step"), {}).update(finite)
    curves: dict[str, list[tuple[float, float]]] = {}
    for step, values in sorted(rows.items()):
        for name, value in (values | _gaps(values)).items():
            curves.setdefault(name, []).append((step, value))
    return {name: np.array(points).T for name, points in curves.items()}, skipped


def _cells(line: str) -> list[str] | None:
    """The cells of one line; None if it cannot be read, for example with a cell of megabytes."""
    try:
        return next(csv.reader([line]), [])
    except csv.Error:
        return None


def _float(cell: object) -> float:
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _gaps(values: Mapping[str, float]) -> dict[str, float]:
    """Real minus fake logit of one step by head; for many heads the highest, median and lowest."""
    heads = [name.removeprefix("d/fake_head") for name in values if name.startswith("d/fake_head")]
    both = {k: (values.get(f"d/real_head{k}"), values[f"d/fake_head{k}"]) for k in heads}
    gaps = {f"gap/head {k}": real - fake for k, (real, fake) in both.items() if real is not None}
    if len(gaps) <= MANY_HEADS:
        return gaps
    picks = {"highest": max, "median": statistics.median, "lowest": min}
    return {f"gap/{name} of {len(gaps)}": pick(gaps.values()) for name, pick in picks.items()}


def _figure(chart: Chart, curves: Mapping[str, np.ndarray]) -> Markup | None:
    """HTML of a chart; None without curves. The legend has the last smoothed value of each
    curve.
    """
    found = [
        (match[1], curve)
        for name, curve in curves.items()
        if (match := re.fullmatch(chart.columns, name))
    ]
    if not found:
        return None
    return chart_figure(chart.title, chart.about, lambda axes: _plot(axes, chart, found))


def _plot(axes: Any, chart: Chart, found: Sequence[tuple[str, np.ndarray]]) -> None:
    for i, (name, curve) in enumerate(found):
        thin = np.array_split(curve, min(POINTS, curve.shape[1]), axis=1)
        x, y = np.stack([part.mean(axis=1) for part in thin], axis=1)
        smooth, label = smoothed(y), shown(NAMES.get(name, name), 60).replace("_", " ")
        axes.plot(x, y, f"C{i}", linewidth=0.7, alpha=0.3)
        axes.plot(x, smooth, f"C{i}", marker="o" * (len(x) < 4), label=f"{label} {smooth[-1]:.4g}")
    if chart.guide is not None:
        axes.axhline(chart.guide, color=GREY, linewidth=0.8, linestyle="--")
    positive = any((curve[1] > 0).any() for _, curve in found)
    # matplotlib warns of a logarithmic scale without positive values
    axes.set_yscale(chart.scale if positive else "linear")


def smoothed(y: np.ndarray) -> np.ndarray:
    """Running mean of y [N] over a window of N / 40; shorter windows at the ends."""
    window = np.ones(len(y) // 40 + 1)
    return np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")


def chart_figure(title: str, about: str, plot: Callable[[Any], None]) -> Markup:
    """HTML with title, explanation and what `plot` puts on the axes, as an SVG."""
    from matplotlib import rc_context  # takes half a second, which only a report needs
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.5), layout="constrained")
        axes = figure.subplots()
        plot(axes)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if axes.get_yscale() == "linear":
            # a fixed number: the default depends on the height, which changes below
            axes.locator_params(axis="y", nbins=6)
        labels = axes.get_legend_handles_labels()[1]
        longest = max(map(len, labels), default=0)
        columns = 3 if longest < 18 else 2 if longest < 30 else 1
        figure.set_figheight(2.5 + 0.18 * max(0, -(-len(labels) // columns) - 3))
        figure.legend(loc="outside upper left", ncols=columns)
        label_plainly(axes)
        figure.savefig(file := io.BytesIO(), format="svg")
    return render("chart", title, about, data_uri(file, "svg+xml"))


def label_plainly(axes: Any) -> None:
    """Label a logarithmic y axis with numbers. The default labels are formulas, which STYLE shows
    as their source.
    """
    from matplotlib.ticker import LogFormatter

    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())


def legend(group: str) -> str:
    """A label for a legend; matplotlib leaves out labels that start with an underscore."""
    return shown(group.lstrip("_"), 34)
