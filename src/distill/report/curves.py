"""Training in curves: the losses of both players, the discriminator's health, the optimisers' pace.

Each chart is an SVG inside the page. Its colours are the page's own variables, so that it follows light and dark.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from distill.report.words import none, number

Curve = tuple[np.ndarray, np.ndarray]  # steps [N], values [N]

NOT_LOSSES = re.compile(r"(real|fake)(_head\d+)?|accuracy|grad_norm|lr|update_ratio")
MANY_HEADS = 6  # more of them than this are drawn as highest, median and lowest
POINTS = 3000  # of a curve; a longer one is thinned to its means, which keeps the page small

# matplotlib does not know the page's variables: it draws in these colours, and the variables take their place.
INK = {f"#0c0c{i:02x}": f"var(--c{i})" for i in range(MANY_HEADS)}
INK |= {"#0d0d00": "var(--rule)", "#0d0d01": "var(--soft)"}
*SERIES, RULE, SOFT = INK
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 8.5, "path.simplify_threshold": 0.5,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.edgecolor": RULE, "axes.labelcolor": SOFT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "xtick.color": RULE, "xtick.labelcolor": SOFT, "ytick.color": RULE, "ytick.labelcolor": SOFT,
    "ytick.major.size": 0, "ytick.minor.size": 0,
}  # fmt: skip


def charts(path: Path) -> str:
    """The section of curves from a metrics.csv."""
    if not path.is_file():
        return none("This run has no metrics.csv, so there are no curves.")
    curves, strange = read(path)
    drawn = [chart for chart in _all_charts(curves) if chart]
    if not drawn:
        return none("metrics.csv holds no numbers to draw.")
    left_out = f" {strange:,} values that are not finite numbers are left out." if strange else ""
    note = f"Over student steps. Bold: running mean over a fortieth of the run; faint: as logged.{left_out}"
    return f'<p class="soft">{note}</p>\n<div class="charts">\n' + "\n".join(drawn) + "\n</div>"


def read(path: Path) -> tuple[dict[str, Curve], int]:
    """Column -> curve, and how many values are not finite. Of a step written twice, as by a resume, the last holds."""
    found: dict[str, dict[float, float]] = {}
    strange = 0
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        for row in csv.DictReader(line.replace("\0", "") for line in lines):
            if not math.isfinite(step := _float(row.get("step"))):
                continue
            for name, cell in row.items():
                if not name or name == "step" or not cell or not isinstance(cell, str):
                    continue
                if math.isfinite(value := _float(cell)):
                    found.setdefault(name, {})[step] = value
                else:
                    strange += 1
    return {name: _thinned(np.array(sorted(points.items())).T) for name, points in found.items()}, strange


def _float(cell: object) -> float:
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _thinned(curve: np.ndarray) -> Curve:
    """A curve [2, N] as means over equal runs of points, at most POINTS of them."""
    parts = [part.mean(axis=1) for part in np.array_split(curve, min(POINTS, curve.shape[1]), axis=1)]
    x, y = np.stack(parts, axis=1)
    return x, y


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred running mean [N] -> [N] over a fortieth of the points, over what there is of it at both ends."""
    n, i = len(y), np.arange(len(y))
    first, end = np.maximum(i - n // 80, 0), np.minimum(i + n // 80 + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(y)])
    return (sums[end] - sums[first]) / (end - first)


def _all_charts(curves: Mapping[str, Curve]) -> list[str]:
    def pick(**names: str) -> dict[str, Curve]:
        return {label.replace("_", " "): curves[name] for label, name in names.items() if name in curves}

    def terms(player: str) -> dict[str, Curve]:
        own = {name[2:]: curve for name, curve in curves.items() if name.startswith(f"{player}/")}
        return {name: curve for name, curve in own.items() if not NOT_LOSSES.fullmatch(name)}

    def both(what: str) -> dict[str, Curve]:
        return pick(student=f"g/{what}", discriminator=f"d/{what}")

    chance = "At 0.5 the discriminator guesses; at 1 the student learns little from it."
    return [
        _chart("Student's losses", terms("g"), "Weighted terms; their sum is minimised."),
        _chart("Discriminator's losses", terms("d"), "Weighted terms; their sum is minimised."),
        _chart("Logits", pick(real="d/real", fake="d/fake"), "Mean verdict on real and on generated samples."),
        _chart("Gap by head", _gaps(curves), "Real minus fake; a head at 0 sees no difference."),
        _chart("Discriminator's accuracy", pick(accuracy="d/accuracy"), chance, guide=0.5, limits=(0, 1.02)),
        _chart("Gradient norms", both("grad_norm"), "Before clipping, log scale.", log=True),
        _chart("Learning rates", both("lr"), "After warm-up and decay."),
        _chart(
            "Update-to-weight ratio", both("update_ratio"), "Length of a step beside the weights', log scale.", log=True
        ),
        _chart("Speed", pick(images_per_second="images_per_second"), "Training images per second."),
    ]


def _gaps(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Real minus fake, per head; of many heads, the highest, median and lowest."""
    gaps: dict[str, Curve] = {}
    numbers = sorted(int(m[1]) for name in curves if (m := re.fullmatch(r"d/real_head(\d+)", name)))
    for k in numbers:
        if fake := curves.get(f"d/fake_head{k}"):
            real = curves[f"d/real_head{k}"]
            x, i, j = np.intersect1d(real[0], fake[0], return_indices=True)
            gaps[f"head {k}"] = x, real[1][i] - fake[1][j]
    if len(gaps) <= MANY_HEADS:
        return gaps
    every = np.concatenate([x for x, _ in gaps.values()])
    values = np.concatenate([y for _, y in gaps.values()])
    x = np.unique(every)
    groups = np.split(values[np.argsort(every, kind="stable")], np.searchsorted(np.sort(every), x)[1:])
    picks: dict[str, Any] = {"highest": np.max, "median": np.median, "lowest": np.min}
    return {f"{name} of {len(gaps)}": (x, np.array([pick(g) for g in groups])) for name, pick in picks.items()}


def _chart(
    title: str,
    curves: Mapping[str, Curve],
    about: str,
    *,
    log: bool = False,
    guide: float | None = None,
    limits: tuple[float, float] | None = None,
) -> str:
    """One figure of the page with its key, which gives each curve's last smoothed value; nothing without curves."""
    keep = {k: (x[y > 0], y[y > 0]) if log else (x, y) for k, (x, y) in curves.items()}
    lines = {k: (x, y, _smooth(y)) for k, (x, y) in keep.items() if len(y)}
    if not lines:
        return ""
    keys = [
        f'<span><i style="background:{INK[_colour(i)]}"></i>{escape(name)} <b>{number(smooth[-1])}</b></span>'
        for i, (name, (_, _, smooth)) in enumerate(lines.items())
    ]
    picture = _draw(title, lines, log=log, guide=guide, limits=limits)
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3><p class="soft">{escape(about)}</p>'
        f'<div class="keys">{"".join(keys)}</div>{picture}</figure>'
    )


def _colour(i: int) -> str:
    return SERIES[i % len(SERIES)]


def _draw(title: str, lines: Mapping[str, tuple], *, log: bool, guide: float | None, limits: tuple | None) -> str:
    from matplotlib import rc_context  # half a second that only a report should cost
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    with rc_context(STYLE | {"svg.hashsalt": title}):  # the salt keeps the ids of the page's charts apart
        figure = Figure(figsize=(4.4, 2.2), layout="constrained")
        axes = figure.subplots()
        for i, (x, y, smooth) in enumerate(lines.values()):
            axes.plot(x, y, color=_colour(i), linewidth=0.7, alpha=0.3)
            axes.plot(x, smooth, color=_colour(i), linewidth=1.6, marker="o" if len(x) < 4 else "", markersize=3)
        if guide is not None:
            axes.axhline(guide, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            if high < 300 * low:  # or there would be one label on the axis, or none
                axes.yaxis.set_major_locator(MaxNLocator(5) if high < 5 * low else LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if limits:
            axes.set_ylim(*limits)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inlined(file.getvalue(), title)


def _inlined(svg: str, title: str) -> str:
    """A drawing as part of a page: in its colours, as wide as its place, without a prologue and names that clash."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    names = f'xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{escape(title)}"'
    opening = f"<svg {box[0] if box else ''} {names}>"
    svg = re.sub(r"<svg[^>]*>", opening, svg, count=1)
    return re.sub("|".join(INK), lambda match: INK[match[0]], svg).strip()
