"""The report of a run: one HTML file that holds everything it shows, made from the files in the
run's folder.

    run.json  config.yaml  metrics.csv  alarms.jsonl  evaluation.json  samples/*.png
    ->  report.html

Each section reads its own file. One that is missing or torn costs that section, which then says so
in a sentence, and nothing else: a report is wanted most after a run that went wrong.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distill.evaluation.results import PICTURE, verdicts
from distill.evaluation.tables import Row, rows_of
from distill.report.curves import charts
from distill.report.evaluation import headline, table, tiles
from distill.report.page import figure, html, joined, part
from distill.storage.aside import put_text
from distill.storage.bounded import mapping_of, number_of, text_of
from distill.storage.checkpoint_names import steps_in

FRAMES = 8  # of the filmstrip
SHOWN = 12  # steps at which an alarm was raised


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path."""
    run, evaluation = _or_empty(run_dir / "run.json"), _or_empty(run_dir / "evaluation.json")
    rows = _rows(run_dir / "evaluation.json")
    name = str(run.get("name") or run_dir.resolve().name)
    text = html(
        " · ".join([name, *(str(run[key]) for key in ("method", "teacher") if key in run)]),
        headline(rows)
        or f"{name}: {'judged' if rows else 'trained, but not judged against its teacher yet'}.",
        [*tiles(rows), _training_time(run)],
        status=_status(run),
        pictures=_pictures(run_dir / "samples", rows, evaluation),
        evaluation=_shown(run_dir / "evaluation.json", lambda path: _judged(mapping_of(path))),
        training=joined(
            *_alarms(run_dir / "alarms.jsonl"), _shown(run_dir / "metrics.csv", charts)
        ),
        facts=_shown(run_dir / "run.json", lambda path: _text(path, "Facts", is_open=True)),
        config=_shown(run_dir / "config.yaml", lambda path: _text(path, "Configuration")),
    )
    path = run_dir / "report.html"
    put_text(path, text)
    return path


def _or_empty(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing if it is missing or torn, which its own section will say."""
    with suppress(OSError, ValueError):
        return mapping_of(path)
    return {}


def _rows(path: Path) -> list[Row]:
    """What was measured; nothing where the file is missing or cannot be right, which its own
    section will say.
    """
    with suppress(ValueError):
        return rows_of(_or_empty(path))
    return []


def _status(run: dict[str, Any]) -> Markup:
    status = run.get("status", "finished")
    if status == "finished":
        return Markup()
    return part("stopped", status)


def _shown(path: Path, show: Callable[[Path], Markup]) -> Markup:
    """A part made of a file, or the reason why there is none."""
    if not path.is_file():
        return part("note", f"This run has no {path.name}.", kind="none")
    try:
        return show(path)
    except (
        OSError,
        ValueError,
        SyntaxError,
    ) as error:  # the last is what Pillow raises for some broken PNG
        return part("note", f"{path.name} cannot be shown: {error}.", kind="none")


def _text(path: Path, what: str, *, is_open: bool = False) -> Markup:
    return part("folded", what, text_of(path, errors="replace"), is_open)


def _alarms(path: Path) -> list[Markup]:
    """What the health of the discriminator gave reason to say, and when; nothing of a run that was
    not watched.
    """
    if not path.is_file():
        return []
    steps: dict[str, list[str]] = {}  # of each alarm
    for line in text_of(path, errors="replace").splitlines():
        # a line that was torn
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            alarm = json.loads(line)
            steps.setdefault(str(alarm["alarm"]), []).append(f"{int(alarm['step']):,}")
    if not steps:
        return [part("note", "No health alarm was raised.")]
    return [part("alarm", _some(when), what) for what, when in steps.items()]


def _some(steps: Sequence[str]) -> str:
    """`step 50`, `steps 50, 100`; of many the first ones."""
    more = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
    return f"step{'s' * (len(steps) > 1)} {', '.join(steps[:SHOWN])}{more}"


def _training_time(run: dict[str, Any]) -> tuple[str, str, str]:
    try:
        keys = ("train_seconds", "steps", "images_seen")
        seconds, steps, images = (number_of(run, key, "run.json") for key in keys)
        time = str(timedelta(seconds=round(seconds or 0)))
    except (ValueError, OverflowError):  # a NaN, or more than there is time for
        return "Training time", "–", "run.json is damaged"
    if steps is None:
        return "Training time", "–", "not recorded"
    return "Training time", time, f"{steps:,} steps, {images or 0:,} images"


def _judged(evaluation: dict[str, Any]) -> Markup:
    """The table of the run's own protocol, and those of others by which it was judged besides."""
    main, *beside = verdicts(evaluation) or [evaluation]
    title = "Judged besides, by another protocol"
    return joined(table(main), *(table(other, title) for other in beside))


def _pictures(folder: Path, rows: Sequence[Row], evaluation: dict[str, Any]) -> Markup:
    """Teacher against student in the rows of the evaluation, then the student as training went
    on.
    """
    caption = "Teacher and student, one prompt and one noise per column"
    main = next(iter(verdicts(evaluation)), {"picture": PICTURE})
    comparison = _shown(folder / main["picture"], lambda path: figure(path, caption))
    frames = list(steps_in(folder, ".png").items())
    if len(frames) > FRAMES:  # the first, the last, and an even choice between
        frames = [frames[round(i * (len(frames) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    strip = [_shown(path, partial(figure, caption=f"Step {step:,}")) for step, path in frames]
    captions = _shown(
        folder / "captions.txt",
        lambda path: _text(path, "The prompts of these grids, in reading order"),
    )
    names = [row.name for row in rows]
    return joined(part("labelled", names, comparison), part("frames", strip), captions)
