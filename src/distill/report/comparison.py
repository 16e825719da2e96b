"""`compare.html`: runs side by side on one page that holds everything it shows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import isfinite, nan
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from distill.evaluation.tables import MEASURES, SPACE
from distill.report.curves import framed, read, smoothed
from distill.report.evaluation import MAIN
from distill.report.page import html, joined, opened, part, within
from distill.report.runs import Line, Run, everyone, lines_of, on_page
from distill.storage.pictures import PADDING
from distill.terminal.shown import shown

SHOWN = 8  # prompts in the grid of pictures


def page(groups: Mapping[str, Sequence[Run]]) -> str:
    """The whole page, as HTML."""
    lines, runs = lines_of(groups), everyone(groups)
    best, said = _headline(lines)
    known = (run.facts.get("train_seconds") or 0 for run in runs)
    seconds = sum(x for x in known if isfinite(x))
    tiles = (
        ("Runs", str(len(runs)), f"in {len(groups)} groups"),
        best,
        (
            "Training",
            f"{seconds / 60:,.0f} min",
            "all runs together",
        ),
    )
    return html(
        f"{len(runs)} runs side by side",
        said,
        tiles,
        pictures=_pictures(groups),
        evaluation=part("compared", on_page(lines)),
        training=part("charts", _charts(groups, lines)),
        facts=_made(groups),
    )


def _headline(lines: Sequence[Line]) -> tuple[tuple[str, str, str], str]:
    """The best group with the fewest steps: as a tile, and in a sentence."""
    for key, pick in {key: min if _is_lower_better(key) else max for key in MAIN}.items():
        found = [line for line in lines if line.who == "student" and key in line.values]
        if found:
            few = min(line.steps for line in found)
            line = pick(
                (line for line in found if line.steps == few), key=lambda line: line.mean(key)
            )
            measure, best = MEASURES[key], f"best with {few} step{'s' * (few > 1)}"
            said, what = line.said(key, measure.words), measure.name.lower()
            return (best.capitalize(), said, line.group), f"{line.group} is {best}: {what} {said}."
    return ("Best", "–", "–"), "No student among them was judged by one of the main measures."


def _is_lower_better(key: str) -> bool:
    return MEASURES[key].better == "lower"


def _charts(groups: Mapping[str, Sequence[Run]], lines: Sequence[Line]) -> Iterator[Markup]:
    """Quality against steps, time and pictures; then whether the discriminators could tell real
    from fake.
    """
    for key in MAIN:
        if any(key in line.values for line in lines):
            title = MEASURES[key].head.replace(SPACE, " ")
            yield framed(
                title,
                "By number of steps; the teacher's where it took as few.",
                _by_steps(lines, key),
            )
            if not any(
                line.who == "student" and line.steps == 1 and key in line.values for line in lines
            ):
                continue
            for cost, unit in (
                ("train_seconds", "training minutes"),
                ("images_seen", "thousand pictures seen"),
            ):
                draw = _by_cost(groups, key, cost, 60 if cost == "train_seconds" else 1000)
                yield framed(f"{title} in one step", f"By {unit}.", draw)
    found = {group: [_accuracy(run) for run in runs] for group, runs in groups.items()}
    for why in (why for curves in found.values() for _, why in curves if why):
        yield part("note", f"A curve is left out: {why}.", kind="none")
    health = {group: [c for c, _ in curves if c is not None] for group, curves in found.items()}
    if any(health.values()):
        yield framed(
            "Discriminator's accuracy",
            "Of each run; 0.5 is guessing.",
            lambda axes: _health(axes, health),
        )


def _by_steps(lines: Sequence[Line], key: str) -> Callable[[Any], None]:
    most = max((line.steps for line in lines if line.who == "student"), default=1)

    def draw(axes: Any) -> None:
        for group in dict.fromkeys(line.group for line in lines):
            found = [
                line
                for line in lines
                if line.group == group and key in line.values and line.steps <= most
            ]
            look = (
                {"color": "#7d8189", "linestyle": "--"}
                if all(line.who == "teacher" for line in found)
                else {}
            )
            points = [line.steps for line in found], [line.mean(key) for line in found]
            axes.plot(*points, marker="o", markersize=3, label=_short(group), **look)
        axes.set_yscale("log" if _is_lower_better(key) else "linear")

    return draw


def _by_cost(
    groups: Mapping[str, Sequence[Run]], key: str, cost: str, unit: float
) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for group, runs in groups.items():
            points = [
                (run.facts[cost] / unit, row.scores[key])
                for run in runs
                for row in run.rows
                if row.who == "student"
                and row.steps == 1
                and key in row.scores
                and isfinite(run.facts.get(cost, nan) or nan)
            ]
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                "o",
                markersize=4,
                label=_short(group),
            )
        axes.set_xlim(left=0)
        axes.set_yscale("log" if _is_lower_better(key) else "linear")

    return draw


def _accuracy(run: Run) -> tuple[Any, str]:
    """Steps and how often the discriminator was right, [2, N], and why its curves cannot be read,
    if they cannot.

    None of a run that has none.
    """
    path = run.folder / "metrics.csv"
    try:
        return (read(path)[0].get("d/accuracy"), "") if path.exists() else (None, "")
    except (OSError, ValueError) as error:
        return None, str(error)


def _health(axes: Any, health: Mapping[str, Sequence[Any]]) -> None:
    for i, (group, curves) in enumerate(health.items()):
        for k, (steps, values) in enumerate(curves):
            axes.plot(
                steps, smoothed(values), f"C{i % 6}", alpha=0.8, label=None if k else _short(group)
            )
    axes.axhline(0.5, color="#7d8189", linewidth=0.8, linestyle="--")


def _short(group: str) -> str:
    """As the legend of a chart, in which matplotlib leaves out what begins with a line below."""
    return shown(group.lstrip("_"), 34)


def _pictures(groups: Mapping[str, Sequence[Run]]) -> Markup:
    """Prompts down, samplers across: the teacher with most steps, then each group's first run by
    number of steps.
    """
    found: list[tuple[str, Any, list[Image.Image]]] = []
    for group, (run, *_) in groups.items():
        path = run.folder / "samples" / run.picture
        drawn = []
        with suppress(OSError, ValueError, SyntaxError):  # the last of some broken PNG
            drawn = tiles(path, len(run.rows)) if run.rows and path.is_file() else []
        found += [(group, row, pictures) for row, pictures in zip(run.rows, drawn, strict=False)]
    taught = [("teacher", row, shown) for _, row, shown in found if row.who == "teacher"]
    columns = sorted(taught, key=lambda column: column[1].steps)[-1:]
    columns += [column for column in found if column[1].who == "student"]
    if not columns:
        return part("note", "None of these runs kept its pictures.", kind="none")
    heads = [(group, f"{n:d} step{'s' * (n > 1)}") for group, (_, n, _), _ in columns]
    drawn = list(zip(*(pictures for *_, pictures in columns), strict=False))[:SHOWN]
    return part("grid", heads, [[within(picture) for picture in row] for row in drawn])


def tiles(path: Path, rows: int) -> list[list[Image.Image]]:
    """The pictures of a `comparison.png` of so many rows, row by row."""
    with opened(path) as grid:
        side, whole = (grid.height - PADDING) // rows, grid.convert("RGB")
    if side <= PADDING:
        return []
    corners = range(PADDING, grid.width - side + PADDING, side)[:SHOWN]
    return [
        [whole.crop((x, y, x + side - PADDING, y + side - PADDING)) for x in corners]
        for y in range(PADDING, side * rows, side)
    ]


def _made(groups: Mapping[str, Sequence[Run]]) -> Markup:
    """How each run was made, and how all were judged."""
    text = ""
    for group, runs in groups.items():
        text += f"{shown(group)}\n"
        for run in runs:
            facts = {
                "seed": run.config.get("seed"),
                **{k: run.facts.get(k) for k in ("hardware", "commit", "command")},
            }
            said = ", ".join(f"{k} {v}" for k, v in facts.items())
            text += f"    {shown(f'{run.folder.name}: {said}')}\n"
    protocols = {
        shown("; ".join(f"{k}: {v}" for k, v in sorted(run.protocol.items())))
        for run in everyone(groups)
    }
    said = part("folded", "Runs and protocol", text + "\n".join(sorted(protocols)), open=True)
    if len(protocols) == 1:
        return said
    return joined(
        part("note", "These runs were not all judged by one protocol.", kind="warn"), said
    )
