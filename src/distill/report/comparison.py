"""`compare.html`: runs side by side on one self-contained page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from math import isfinite, nan
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from distill.evaluation.categories import NOTE as FEW_NOTE
from distill.evaluation.results import PADDING, comparable
from distill.evaluation.tables import MEASURES, SPACE, steps_text
from distill.report import by_category
from distill.report.along_runs import along_runs, columns_in
from distill.report.curves import chart_figure, legend, smoothed
from distill.report.differences import HEADS, NOTE, differences, headline, notes
from distill.report.evaluation import MAIN
from distill.report.judged import Verdict, tables
from distill.report.page import embed, html, join_html, open_png, render
from distill.report.runs import Line, Run, all_runs, lines_of, page_table
from distill.storage.safe_paths import check_own
from distill.terminal.shown import shown

SHOWN = 8  # prompts in the grid of pictures


def page(
    groups: Mapping[str, Sequence[Run]], votes: str = "", verdicts: Sequence[Verdict] = ()
) -> str:
    """The whole page, as HTML. `votes` is the address of the page of blind votes, if any;
    `verdicts` are those of judges and people.
    """
    lines, runs = lines_of(groups), all_runs(groups)
    best, sentence = headline(lines)
    recorded = (run.facts.get("train_seconds") or 0 for run in runs)
    seconds = sum(x for x in recorded if isfinite(x))
    tiles = (
        ("Runs", str(len(runs)), f"in {len(groups)} groups"),
        best,
        ("Training", f"{seconds / 60:,.0f} min", "all runs together"),
    )
    return html(
        f"{len(runs)} runs side by side",
        sentence,
        tiles,
        status=render("link", "Vote blind between pairs of pictures", votes) if votes else Markup(),
        pictures=_pictures(groups),
        evaluation=join_html(
            render("sortable_scores", page_table(lines)), *_differences(lines), *_wins(verdicts)
        ),
        training=render("charts", [*_charts(groups, lines), *along_runs(groups)]),
        facts=_provenance(groups),
    )


def _differences(lines: Sequence[Line]) -> Iterator[Markup]:
    """What is missing from intervals, then the table of differences."""
    for sentence in notes(lines):
        yield render("note", sentence, kind="none")
    found = differences(lines)
    if found:
        yield render("differences", HEADS, [difference.cells for difference in found], NOTE)
    single = by_category.rows(lines)
    if single:
        yield render("differences", by_category.HEADS, single, FEW_NOTE, "By category")


def _wins(verdicts: Sequence[Verdict]) -> Iterator[Markup]:
    """The tables of wins.md."""
    if verdicts:
        for title, heads, rows, note in tables(verdicts):
            yield render("differences", heads, rows, note, title)


def _is_lower_better(key: str) -> bool:
    return MEASURES[key].better == "lower"


def _charts(groups: Mapping[str, Sequence[Run]], lines: Sequence[Line]) -> Iterator[Markup]:
    """Quality by steps, time and images seen, then the accuracy of the discriminators."""
    for key in MAIN:
        if any(key in line.values for line in lines):
            title = MEASURES[key].head.replace(SPACE, " ")
            yield chart_figure(
                title,
                "By number of steps, up to the student's most.",
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
                plot = _by_cost(groups, key, cost, 60 if cost == "train_seconds" else 1000)
                yield chart_figure(f"{title} in one step", f"By {unit}.", plot)
    found = {group: [_accuracy(run) for run in runs] for group, runs in groups.items()}
    for error in (error for curves in found.values() for _, error in curves if error):
        yield render("note", f"A curve is left out: {error}.", kind="none")
    accuracy = {group: [c for c, _ in curves if c is not None] for group, curves in found.items()}
    if any(accuracy.values()):
        yield chart_figure(
            "Discriminator's accuracy",
            "Of each run; 0.5 is guessing.",
            lambda axes: _plot_accuracy(axes, accuracy),
        )


def _by_steps(lines: Sequence[Line], key: str) -> Callable[[Any], None]:
    most = max((line.steps for line in lines if line.who == "student"), default=1)

    def plot(axes: Any) -> None:
        for group in dict.fromkeys(line.group for line in lines):
            found = [
                line
                for line in lines
                if line.group == group and key in line.values and line.steps <= most
            ]
            of_teacher = all(line.who == "teacher" for line in found)
            style = {"color": "#7d8189", "linestyle": "--"} if of_teacher else {}
            steps, values = [line.steps for line in found], [line.mean(key) for line in found]
            axes.plot(steps, values, marker="o", markersize=3, label=legend(group), **style)
        axes.set_yscale("log" if _is_lower_better(key) else "linear")

    return plot


def _by_cost(
    groups: Mapping[str, Sequence[Run]], key: str, cost: str, unit: float
) -> Callable[[Any], None]:
    def plot(axes: Any) -> None:
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
                label=legend(group),
            )
        axes.set_xlim(left=0)
        axes.set_yscale("log" if _is_lower_better(key) else "linear")

    return plot


def _accuracy(run: Run) -> tuple[Any, str]:
    """Steps and accuracy of the discriminator [2, N], or None; and an error of reading, or ""."""
    try:
        return columns_in(run, "metrics.csv").get("d/accuracy"), ""
    except (OSError, ValueError) as error:
        return None, str(error)


def _plot_accuracy(axes: Any, accuracy: Mapping[str, Sequence[Any]]) -> None:
    for i, (group, curves) in enumerate(accuracy.items()):
        for k, (steps, values) in enumerate(curves):
            label = None if k else legend(group)  # one label for all runs of a group
            axes.plot(steps, smoothed(values), f"C{i % 6}", alpha=0.8, label=label)
    axes.axhline(0.5, color="#7d8189", linewidth=0.8, linestyle="--")


def _pictures(groups: Mapping[str, Sequence[Run]]) -> Markup:
    """A grid, prompts by samplers: the teacher with the most steps, then the first run of each
    group by number of steps.
    """
    found: list[tuple[str, Any, list[Image.Image]]] = []
    for group, (run, *_) in groups.items():
        path = run.folder / "samples" / run.picture
        strips = []
        with suppress(OSError, ValueError, SyntaxError):  # Pillow: SyntaxError of a broken PNG
            check_own(path, run.folder)
            strips = tiles(path, len(run.rows)) if run.rows and path.is_file() else []
        found += [(group, row, pictures) for row, pictures in zip(run.rows, strips, strict=False)]
    of_teacher = [("teacher", row, strip) for _, row, strip in found if row.who == "teacher"]
    columns = sorted(of_teacher, key=lambda column: column[1].steps)[-1:]
    columns += [column for column in found if column[1].who == "student"]
    if not columns:
        return render("note", "None of these runs kept its pictures.", kind="none")
    heads = [(group, steps_text(row.steps)) for group, row, _ in columns]
    rows = list(zip(*(pictures for *_, pictures in columns), strict=False))[:SHOWN]
    return render("grid", heads, [[embed(picture) for picture in row] for row in rows])


def tiles(path: Path, rows: int, most: int = SHOWN) -> list[list[Image.Image]]:
    """The pictures of a `comparison.png` with this number of rows, row by row; `most` of each."""
    with open_png(path) as grid:
        side, pixels = (grid.height - PADDING) // rows, grid.convert("RGB")
    if side <= PADDING:
        return []
    corners = range(PADDING, grid.width - side + PADDING, side)[:most]
    return [
        [pixels.crop((x, y, x + side - PADDING, y + side - PADDING)) for x in corners]
        for y in range(PADDING, side * rows, side)
    ]


def _provenance(groups: Mapping[str, Sequence[Run]]) -> Markup:
    """Seed, hardware, commit and command of each run, and the evaluation protocol."""
    text = ""
    for group, runs in groups.items():
        text += f"{shown(group)}\n"
        for run in runs:
            facts = {
                "seed": run.config.get("seed"),
                **{k: run.facts.get(k) for k in ("hardware", "commit", "command")},
            }
            listed = ", ".join(f"{k} {v}" for k, v in facts.items())
            text += f"    {shown(f'{run.folder.name}: {listed}')}\n"
    protocols = [run.protocol for run in all_runs(groups)]
    text += "\n".join(
        sorted({shown("; ".join(f"{k}: {v}" for k, v in sorted(p.items()))) for p in protocols})
    )
    section = render("collapsible", "Runs and protocol", text, is_open=True)
    if all(comparable(one, other) for one, other in combinations(protocols, 2)):
        return section
    warning = "These runs were evaluated by different protocols."
    return join_html(render("note", warning, kind="warn"), section)
