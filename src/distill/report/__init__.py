"""The report of a run: one self-contained HTML file, written from the files in the run's folder.

    run.json  config.yaml  metrics.csv  alarms.jsonl  evaluation.json  samples/*.png
    ->  report.html

Each section reads its own file. A missing or damaged file replaces only that section by a sentence:
a report is most useful after a run that failed.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distill.evaluation.results import PICTURE, results_in
from distill.evaluation.tables import Row, rows_of
from distill.report.curves import charts
from distill.report.evaluation import headline, table, tiles
from distill.report.page import figure, html, join_html, render
from distill.storage.atomic import write_text_atomic
from distill.storage.bounded import mapping_of, number_of, text_of
from distill.storage.checkpoint_names import steps_in

FRAMES = 8  # pictures of the student during training
SHOWN = 12  # steps listed for an alarm


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path."""
    run, evaluation = _or_empty(run_dir / "run.json"), _or_empty(run_dir / "evaluation.json")
    rows = _rows_or_none(run_dir / "evaluation.json")
    name = str(run.get("name") or run_dir.resolve().name)
    text = html(
        " · ".join([name, *(str(run[key]) for key in ("method", "teacher") if key in run)]),
        headline(rows) or f"{name}: {'evaluated' if rows else 'trained, but not evaluated yet'}.",
        [*tiles(rows), _training_time(run)],
        status=_status(run),
        pictures=_pictures(run_dir / "samples", rows, evaluation),
        evaluation=_section(run_dir / "evaluation.json", _evaluation_tables),
        training=join_html(
            *_alarms(run_dir / "alarms.jsonl"), _section(run_dir / "metrics.csv", charts)
        ),
        facts=_section(run_dir / "run.json", partial(_text_section, what="Facts", is_open=True)),
        config=_section(run_dir / "config.yaml", partial(_text_section, what="Configuration")),
    )
    path = run_dir / "report.html"
    write_text_atomic(path, text)
    return path


def _or_empty(path: Path) -> dict[str, Any]:
    """A JSON object; {} for a missing or damaged file, which its own section reports."""
    with suppress(OSError, ValueError):
        return mapping_of(path)
    return {}


def _rows_or_none(path: Path) -> list[Row]:
    """The rows; [] for a missing or damaged file, which its own section reports."""
    with suppress(ValueError):
        return rows_of(_or_empty(path))
    return []


def _status(run: dict[str, Any]) -> Markup:
    """A warning for a run that did not finish; empty for one that did."""
    status = run.get("status", "finished")
    return Markup() if status == "finished" else render("stopped", status)


def _section(path: Path, show: Callable[[Path], Markup]) -> Markup:
    """HTML that `show` makes of a file, or a sentence why it cannot be shown."""
    if not path.is_file():
        return render("note", f"This run has no {path.name}.", kind="none")
    try:
        return show(path)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow: SyntaxError of a broken PNG
        return render("note", f"{path.name} cannot be shown: {error}.", kind="none")


def _text_section(path: Path, what: str, *, is_open: bool = False) -> Markup:
    return render("collapsible", what, text_of(path, errors="replace"), is_open)


def _alarms(path: Path) -> list[Markup]:
    """The health alarms of the discriminator and their steps; [] if they were not watched."""
    if not path.is_file():
        return []
    steps: dict[str, list[str]] = {}  # alarm -> steps
    for line in text_of(path, errors="replace").splitlines():
        # a kill may have cut a line short
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            alarm = json.loads(line)
            steps.setdefault(str(alarm["alarm"]), []).append(f"{int(alarm['step']):,}")
    if not steps:
        return [render("note", "No health alarm was raised.")]
    return [render("alarm", _step_list(when), what) for what, when in steps.items()]


def _step_list(steps: Sequence[str]) -> str:
    """`step 50` or `steps 50, 100`; of many only the first ones."""
    more = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
    return f"step{'s' * (len(steps) > 1)} {', '.join(steps[:SHOWN])}{more}"


def _training_time(run: dict[str, Any]) -> tuple[str, str, str]:
    try:
        keys = ("train_seconds", "steps", "images_seen")
        seconds, steps, images = (number_of(run, key, "run.json") for key in keys)
        time = str(timedelta(seconds=round(seconds or 0)))
    except (ValueError, OverflowError):  # NaN, or more than a timedelta holds
        return "Training time", "–", "run.json is damaged"
    if steps is None:
        return "Training time", "–", "not recorded"
    return "Training time", time, f"{steps:,} steps, {images or 0:,} images"


def _evaluation_tables(path: Path) -> Markup:
    """The table of the main result, then one for each other protocol."""
    evaluation = mapping_of(path)
    main, *others = results_in(evaluation) or [evaluation]
    title = "By another protocol"
    return join_html(table(main), *(table(other, title) for other in others))


def _pictures(folder: Path, rows: Sequence[Row], evaluation: dict[str, Any]) -> Markup:
    """Teacher and student in the rows of the evaluation, then the student during training."""
    caption = "Teacher and student, one prompt and one noise per column"
    main = next(iter(results_in(evaluation)), {"picture": PICTURE})
    comparison = _section(folder / main["picture"], lambda path: figure(path, caption))
    frames = list(steps_in(folder, ".png").items())
    if len(frames) > FRAMES:  # the first, the last, and evenly spaced ones between
        frames = [frames[round(i * (len(frames) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    strip = [_section(path, partial(figure, caption=f"Step {step:,}")) for step, path in frames]
    captions = _section(
        folder / "captions.txt",
        lambda path: _text_section(path, "The prompts of these grids, in reading order"),
    )
    names = [row.name for row in rows]
    return join_html(render("labelled", names, comparison), render("frames", strip), captions)
