"""Results of an evaluation: a sentence, key figures, and a table of all measures by steps."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from distill.evaluation.tables import MEASURES, Row, rows_of, steps_text, table_by_steps
from distill.report.page import render

MAIN = {  # main measures, most important first -> as a phrase, as a noun
    "prompt_accuracy": ("gets {} of prompts right", "prompts right"),
    "frechet": ("has a Fréchet distance of {}", "Fréchet distance"),
    "fid": ("has an FID of {}", "FID"),
    "clip_score": ("has a CLIP score of {}", "CLIP score"),
}


def headline(rows: Sequence[Row]) -> str:
    """The result in a sentence: the student at its fewest steps, and the teacher at its most steps
    and at as few as the student; "" without a main measure.
    """
    for key, (phrase, _) in MAIN.items():
        if student := _formatted(rows, "student", key):
            few, teacher = min(student), _formatted(rows, "teacher", key)
            rivals = sorted({few, max(teacher, default=few)} & teacher.keys(), reverse=True)
            versus = " and ".join(f"{teacher[n]} in {steps_text(n)}" for n in rivals)
            sentence = f"In {steps_text(few)} the student {phrase.format(student[few])}"
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
                value, below = values[n], f"in {steps_text(n)}"
            yield f"{who.capitalize()}, {what}", value, below


def table(evaluation: Mapping[str, Any], title: str = "") -> Markup:
    """HTML table of all measures, with a body for each number of steps, and the protocol below."""
    scores = table_by_steps(rows_of(evaluation))
    protocol = evaluation.get("protocol", {})
    settings = "; ".join(f"{key}: {value}" for key, value in protocol.items())
    return render("scores_by_steps", scores, settings, title)


def _formatted(rows: Sequence[Row], who: str, key: str) -> dict[int, str]:
    """Number of steps -> formatted score."""
    return {
        r.steps: MEASURES[key].form.format(r.scores[key])
        for r in rows
        if r.who == who and key in r.scores
    }
