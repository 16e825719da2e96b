"""The report of a run: one HTML file that holds everything it shows, made from the files in the run's folder.

    run.json  config.yaml  metrics.csv  evaluation.json  samples/*.png   ->   report.html

Each section reads its own file. One that is missing, torn or half written costs that section, which then says so in a
sentence, and nothing else: a report is wanted most after a run that went wrong.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from distill.report.curves import charts
from distill.report.evaluation import headline, name_of, rows_of, table, tiles
from distill.report.words import duration, is_number, none, spoken

TEMPLATE = Path(__file__).with_name("template.html")
FRAMES = 8  # of the filmstrip
WIDEST = 1600  # pixels; wider pictures are shrunk to it, or the grids of a large model would make a file of 200 MB
COARSEST = 700  # pixels; narrower pictures are enlarged with hard edges, as what they are


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path."""
    run_dir = Path(run_dir)
    run, why_no_run = _json(run_dir / "run.json")
    evaluation, why_no_evaluation = _json(run_dir / "evaluation.json")
    rows = rows_of(evaluation)
    name = str(run.get("name") or run_dir.resolve().name)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{name} · distill"),
        name=escape(" · ".join([name, *(str(run[k]) for k in ("method", "teacher") if run.get(k))])),
        headline=escape(headline(rows, name)),
        status=_status(run),
        tiles="\n".join(_tile(*figure) for figure in [*tiles(rows), _training_time(run)]),
        pictures=_pictures(run_dir / "samples", evaluation),
        evaluation=table(evaluation, why_no_evaluation),
        training=charts(run_dir / "metrics.csv"),
        facts=_facts(run) if run else none(why_no_run),
        config=_config(run_dir / "config.yaml"),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _json(path: Path) -> tuple[dict[str, Any], str]:
    """What a file holds, or nothing and a sentence why."""
    if not path.is_file():
        return {}, f"This run has no {path.name}."
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return {}, f"{path.name} cannot be read: {error}."
    return (held, "") if isinstance(held, dict) else ({}, f"{path.name} does not hold a mapping.")


# -- the run -----------------------------------------------------------------------------------------------------------


def _status(run: Mapping[str, Any]) -> str:
    if run.get("status") in (None, "finished"):
        return ""
    after = f" after {run['steps']:,} steps" if is_number(run.get("steps")) else ""
    return f'<p class="warn">{escape("This run was " + str(run["status"]) + after)}, before its end.</p>'


def _tile(what: str, value: str, below: str) -> str:
    return f'<div class="tile"><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(below)}</span></div>'


def _training_time(run: Mapping[str, Any]) -> tuple[str, str, str]:
    seconds = next((run[k] for k in ("train_seconds", "wall_seconds") if is_number(run.get(k))), None)
    words = {"steps": "steps", "images_seen": "images"}
    work = [f"{run[key]:,} {word}" for key, word in words.items() if is_number(run.get(key))]
    return "Training time", "–" if seconds is None else duration(seconds), ", ".join(work) or "not recorded"


def _facts(run: Mapping[str, Any]) -> str:
    """How to have this run again: command, commit, hardware, versions; then whatever else run.json says."""
    first = ["command", "commit", "hardware", "started", "wall_seconds", "versions"]
    shown = ("name", "method", "teacher", "status", "steps", "images_seen", "train_seconds")
    keys = [k for k in first if k in run] + [k for k in run if k not in first and k not in shown]
    lines = []
    for key in keys:
        label, value = key.replace("_", " ").capitalize(), escape(spoken(run[key]))
        if key == "wall_seconds" and is_number(run[key]):
            label, value = "Wall time", duration(run[key])
        elif key in ("command", "commit"):
            value = f"<code>{value}</code>"
        lines.append(f"<dt>{escape(label)}</dt><dd>{value}</dd>")
    return f"<dl>{''.join(lines)}</dl>"


def _config(path: Path) -> str:
    if not path.is_file():
        return none("This run has no config.yaml.")
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, evaluation: Mapping[str, Any]) -> str:
    """Teacher against student, then the student as training went on, then what was asked for."""
    parts = [_comparison(path, evaluation) for path in sorted(folder.glob("comparison*.png"), key=_natural)]
    parts = parts or [none("There is no picture of teacher and student side by side.")]
    frames = [_picture(path, _step(path)) for path in _spread(sorted(folder.glob("step_*.png"), key=_natural))]
    if frames:
        parts.append("<h3>As training went on</h3>")
        parts.append(f'<div class="strip">{"".join(f"<figure>{frame}</figure>" for frame in frames)}</div>')
    else:
        parts.append(none("No samples were kept in training."))
    captions = folder / "captions.txt"
    if captions.is_file():
        prompts = [p for p in captions.read_text(encoding="utf-8", errors="replace").splitlines() if p.strip()]
        items = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
        summary = f"<summary>The {len(prompts)} prompts of these grids, in reading order</summary>"
        parts.append(f"<details>{summary}<ol>{items}</ol></details>" if prompts else "")
    return "\n".join(parts)


def _comparison(path: Path, evaluation: Mapping[str, Any]) -> str:
    """A large picture; its rows are named if they are those of the evaluation, in the order of its file."""
    rest = path.stem.removeprefix("comparison").strip("_-").replace("_", " ")
    caption = f"Teacher and student: {rest}" if rest else "Teacher and student, one prompt and one noise per column"
    names = [escape(name_of(row)) for row in rows_of(evaluation)]
    if rest or not names or not _has_rows(path, len(names)):
        return f'<figure class="large">{_picture(path, caption)}</figure>'
    labels = "".join(f"<span>{name}</span>" for name in names)
    return f'<figure class="large labelled"><div class="names">{labels}</div>{_picture(path, caption)}</figure>'


def _has_rows(path: Path, n: int) -> bool:
    """Whether a picture can be n rows of square pictures, a little padding aside."""
    try:
        with Image.open(path) as picture:
            columns = picture.width * n / picture.height
    except (OSError, SyntaxError, ValueError):
        return False
    return round(columns) > 0 and abs(columns - round(columns)) < 0.1


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which step_20 comes before step_100."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


def _spread(frames: Sequence[Path]) -> list[Path]:
    """The first, the last, and an even choice between: at most FRAMES."""
    if len(frames) <= FRAMES:
        return list(frames)
    return [frames[round(i * (len(frames) - 1) / (FRAMES - 1))] for i in range(FRAMES)]


def _step(path: Path) -> str:
    step = path.stem.removeprefix("step_")
    return f"Step {int(step):,}" if step.isdecimal() else step


def _picture(path: Path, caption: str) -> str:
    """A picture inside the page with its caption; a torn one becomes a sentence."""
    try:
        with Image.open(path) as picture:
            picture.load()
            data = path.read_bytes() if picture.width <= WIDEST else _shrunk(picture)
            width, height = picture.size
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken PNG
        return none(f"{path.name} cannot be read: {error}.")
    look = f'class="{"crisp " * (width < COARSEST)}{"wide" * (width > 2 * height)}"'
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img {look} src="{source}" width="{width}" height="{height}" alt="{escape(caption)}" loading="lazy">'
    return f'<div class="frame">{image}</div><figcaption>{escape(caption)}</figcaption>'


def _shrunk(picture: Image.Image) -> bytes:
    """PNG of a picture made WIDEST wide in place."""
    file = io.BytesIO()
    picture.thumbnail((WIDEST, 100 * WIDEST))
    picture.save(file, format="PNG")
    return file.getvalue()
