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
from distill.report.evaluation import headline, rows_of, table, tiles
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
        pictures=_pictures(run_dir / "samples"),
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
    work = [
        f"{run[k]:,} {word}" for k, word in {"steps": "steps", "images_seen": "images"}.items() if is_number(run.get(k))
    ]
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
        lines.append(
            f"<dt>{escape(label)}</dt><dd>{f'<code>{value}</code>' if key in ('command', 'commit') else value}</dd>"
        )
    return f"<dl>{''.join(lines)}</dl>"


def _config(path: Path) -> str:
    if not path.is_file():
        return none("This run has no config.yaml.")
    text = path.read_text(encoding="utf-8", errors="replace")
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


# -- pictures ----------------------------------------------------------------------------------------------------------


def _pictures(folder: Path) -> str:
    """Teacher against student, then the student as training went on, then what was asked for."""
    comparisons = sorted(folder.glob("comparison*.png"), key=_natural)
    frames = sorted(folder.glob("step_*.png"), key=_natural)
    large = [_figure(path, _comparison_caption(path), "large") for path in comparisons]
    strip = [_figure(path, _frame_caption(path)) for path in _spread(frames)]
    parts = [
        *large,
        f'<div class="strip">{"".join(strip)}</div>' if strip else none("No samples were kept in training."),
    ]
    if not comparisons:
        parts.insert(0, none("There is no picture of teacher and student side by side."))
    captions = folder / "captions.txt"
    if captions.is_file():
        prompts = [p for p in captions.read_text(encoding="utf-8", errors="replace").splitlines() if p.strip()]
        items = "".join(f"<li>{escape(prompt)}</li>" for prompt in prompts)
        summary = "The prompts, in reading order"
        opened = " open" if len(prompts) <= 8 else ""
        parts.append(f"<details{opened}><summary>{summary}</summary><ol>{items}</ol></details>" if prompts else "")
    return "\n".join(parts)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key by which step_20 comes before step_100."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]


def _spread(frames: Sequence[Path]) -> list[Path]:
    """The first, the last, and an even choice between: at most FRAMES."""
    if len(frames) <= FRAMES:
        return list(frames)
    return [frames[round(i * (len(frames) - 1) / (FRAMES - 1))] for i in range(FRAMES)]


def _frame_caption(path: Path) -> str:
    step = path.stem.removeprefix("step_")
    return f"Step {int(step):,}" if step.isdecimal() else step


def _comparison_caption(path: Path) -> str:
    rest = path.stem.removeprefix("comparison").strip("_-").replace("_", " ")
    return "Teacher and student at several step counts" + (f": {rest}" if rest else "") + "."


def _figure(path: Path, caption: str, kind: str = "") -> str:
    """A picture inside the page; a torn one becomes a sentence."""
    try:
        with Image.open(path) as picture:
            picture.load()
            width, height = picture.size
            data = path.read_bytes() if width <= WIDEST else _shrunk(picture)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken PNG
        return none(f"{path.name} cannot be read: {error}.")
    crisp = ' class="crisp"' if width < COARSEST else ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img{crisp} src="{source}" width="{width}" height="{height}" alt="{escape(caption)}" loading="lazy">'
    return f"<figure{f' class={kind}' if kind else ''}>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _shrunk(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.thumbnail((WIDEST, 100 * WIDEST))
    picture.save(file, format="PNG")
    return file.getvalue()
