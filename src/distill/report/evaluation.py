"""Results of an evaluation: a sentence, key figures, and a table of all measures by steps."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any, NamedTuple

from distill.storage.bounded import number_of
from distill.terminal.shown import in_html, shown

PERCENT, PLAIN = "{:.1%}", "{:.4g}"
TIME = "seconds_per_image"
MEASURES = {  # key -> column head, best value, format
    "prompt_accuracy": ("Prompts right&nbsp;↑", 1, PERCENT),
    "frechet": ("Fréchet distance&nbsp;↓", 0, "{:,.1f}"),
    "fid": ("FID&nbsp;↓", 0, PLAIN),
    "clip_score": ("CLIP score&nbsp;↑", 1, PLAIN),
    "clip_score_b32": ("CLIP score, B/32&nbsp;↑", 1, PLAIN),
    "pick_score": ("PickScore&nbsp;↑", 100, PLAIN),
    "hps": ("HPS&nbsp;↑", 1, PLAIN),
    "kid": ("KID&nbsp;↓", 0, PLAIN),
    "fd_dinov2": ("FD-DINOv2&nbsp;↓", 0, PLAIN),
    "cmmd": ("CMMD&nbsp;↓", 0, PLAIN),
    "precision": ("Precision&nbsp;↑", 1, PERCENT),
    "recall": ("Recall&nbsp;↑", 1, PERCENT),
    "density": ("Density (data:&nbsp;1)", 1, PLAIN),
    "coverage": ("Coverage&nbsp;↑", 1, PERCENT),
    "diversity": ("Diversity (data:&nbsp;1)", 1, PLAIN),
    "variety": ("Variety", inf, PLAIN),
    "stripe_sharpness": ("Sharpness (data:&nbsp;1)", 1, PLAIN),
    TIME: ("Seconds per image&nbsp;↓", 0, PLAIN),
}
MOST_ROWS = 1000  # ours: limit of samplers times numbers of steps
MAIN = {  # main measures, most important first -> as a phrase, as a noun
    "prompt_accuracy": ("gets {} of prompts right", "prompts right"),
    "frechet": ("has a Fréchet distance of {}", "Fréchet distance"),
    "fid": ("has an FID of {}", "FID"),
    "clip_score": ("has a CLIP score of {}", "CLIP score"),
}
ATTRIBUTES = ("kind", "colour", "fill", "size", "axis", "background", "count")
MEASURES |= {key: (f"{key.capitalize()}&nbsp;↑", 1, PERCENT) for key in ATTRIBUTES}


class Row(NamedTuple):
    who: str
    steps: int
    scores: dict[str, float]  # the finite ones of MEASURES; NaN: no prompt names that attribute

    @property
    def name(self) -> str:
        return (
            f"{self.who.capitalize()}, {_steps(self.steps)}"
            if self.steps
            else self.who.capitalize()
        )


def rows_of(evaluation: Mapping[str, Any]) -> list[Row]:
    """The rows in the order of the file, which is also that of the strips in the comparison.

    Raises ValueError for a file that does not hold rows and a protocol.
    """
    rows, protocol = evaluation.get("rows", []), evaluation.get("protocol", {})
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not listed or len(rows) > MOST_ROWS or not isinstance(protocol, dict):
        what = f"evaluation.json must hold at most {MOST_ROWS} rows and a protocol"
        raise ValueError(f"{what}; evaluate anew")
    return [_row(row, f"row {i} of evaluation.json") for i, row in enumerate(rows, 1)]


def _row(row: Mapping[str, Any], where: str) -> Row:
    who, steps = row.get("who"), row.get("steps")
    if not isinstance(who, str) or type(steps) is not int or not 0 <= steps < 10**6:
        values = f"who={shown(who, 40)} and steps={shown(steps, 40)}"
        raise ValueError(f"{where} has {values}, not a name and a number; evaluate anew")
    found = {key: number_of(row, key, where) for key in MEASURES if key in row}
    return Row(who, steps, {k: x for k, x in found.items() if x is not None and isfinite(x)})


def headline(rows: Sequence[Row]) -> str:
    """The result in a sentence: the student at its fewest steps, and the teacher at its most steps
    and at as few as the student; "" without a main measure.
    """
    for key, (phrase, _) in MAIN.items():
        if student := _formatted(rows, "student", key):
            few, teacher = min(student), _formatted(rows, "teacher", key)
            rivals = sorted({few, max(teacher, default=few)} & teacher.keys(), reverse=True)
            versus = " and ".join(f"{teacher[n]} in {_steps(n)}" for n in rivals)
            sentence = f"In {_steps(few)} the student {phrase.format(student[few])}"
            return f"{sentence}; its teacher, {versus}." if versus else f"{sentence}."
    return ""


def tiles(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Key figures: (name, value, number of steps)."""
    first, second = list(MAIN)[:2], list(MAIN)[2:]
    for key in second if any(key in row.scores for row in rows for key in second) else first:
        what = MAIN[key][1]
        for who, pick in (("student", min), ("teacher", max)):
            values = _formatted(rows, who, key)
            value, below = "–", "not measured"
            if values:
                n = pick(values)
                value, below = values[n], f"in {_steps(n)}"
            yield f"{who.capitalize()}, {what}", value, below


def table(evaluation: Mapping[str, Any]) -> str:
    """HTML table of all measures, with a body for each number of steps, and the protocol below."""
    rows = sorted(rows_of(evaluation), key=lambda row: row.who)
    columns = [key for key in MEASURES if any(key in row.scores for row in rows)]
    if not columns:
        raise ValueError("it holds no measured rows")
    head = "".join(
        f'<th scope="col">{label}</th>'
        for label in ["Sampler", *(MEASURES[key][0] for key in columns)]
    )
    body = ""
    for n in sorted({row.steps for row in rows}):
        rivals = [row for row in rows if row.steps == n]
        body += (
            "<tbody>\n" + "\n".join(_line(row, rivals, columns) for row in rivals) + "\n</tbody>\n"
        )
    protocol = in_html(
        "; ".join(f"{key}: {value}" for key, value in evaluation.get("protocol", {}).items())
    )
    legend = "Bold: the best at this number of steps. ↑ higher is better, ↓ lower is better."
    scores = f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n{body}</table></div>'
    return f'{scores}\n<p class="soft">{legend} Protocol. {protocol}.</p>'


def _line(row: Row, rivals: Sequence[Row], columns: Sequence[str]) -> str:
    """One row of the table; `rivals` are all rows with the same number of steps, with itself."""
    cells = f'<th scope="row">{in_html(row.name)}</th>'
    for key in columns:
        _, goal, form = MEASURES[key]
        gaps = {rival.who: abs(rival.scores[key] - goal) for rival in rivals if key in rival.scores}
        cell = form.format(row.scores[key]) if key in row.scores else "–"
        best = row.who in gaps and gaps[row.who] == min(gaps.values()) < max(gaps.values())
        cells += f"<td><b>{cell}</b></td>" if best else f"<td>{cell}</td>"
    return f"<tr>{cells}</tr>"


def _formatted(rows: Sequence[Row], who: str, key: str) -> dict[int, str]:
    """Number of steps -> formatted score."""
    return {
        r.steps: MEASURES[key][2].format(r.scores[key])
        for r in rows
        if r.who == who and key in r.scores
    }


def _steps(n: int) -> str:
    return f"{n:,} step" if n == 1 else f"{n:,} steps"


def in_terminal(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    columns = [
        key
        for key in MEASURES
        if key not in (*ATTRIBUTES, TIME) and any(key in row for row in rows)
    ]
    lines = [f"{'':10}{'steps':>6}" + "".join(f"{name.replace('_', ' '):>18}" for name in columns)]
    for row in rows:
        values = "".join(f"{row[name]:>18.4g}" if name in row else f"{'-':>18}" for name in columns)
        lines.append(f"{row['who']:10}{row['steps'] or '':>6}{values}")
    return "\n".join(lines)
