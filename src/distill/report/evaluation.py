"""What the judging says: a sentence, key figures, and a table of every measure by step count."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from distill.evaluation.tables import MEASURES, Row, by_steps, rows_of, steps_in_words
from distill.report.page import part

MAIN = {  # in the order of what is told first -> as a phrase, as a noun
    "prompt_accuracy": ("gets {} of prompts right", "prompts right"),
    "frechet": ("has a Fréchet distance of {}", "Fréchet distance"),
    "fid": ("has an FID of {}", "FID"),
    "clip_score": ("has a CLIP score of {}", "CLIP score"),
}


def headline(rows: Sequence[Row]) -> str:
    """The result in a sentence: the student at its fewest steps, the teacher at its most and at as
    few.
    """
    for key, (phrase, _) in MAIN.items():
        if student := _said(rows, "student", key):
            few, teacher = min(student), _said(rows, "teacher", key)
            rivals = sorted({few, max(teacher, default=few)} & teacher.keys(), reverse=True)
            versus = " and ".join(f"{teacher[n]} in {steps_in_words(n)}" for n in rivals)
            sentence = f"In {steps_in_words(few)} the student {phrase.format(student[few])}"
            return f"{sentence}; its teacher, {versus}." if versus else f"{sentence}."
    return ""


def tiles(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """Key figures: (what, its value, in which circumstances)."""
    first, second = list(MAIN)[:2], list(MAIN)[2:]
    for key in second if any(key in row.scores for row in rows for key in second) else first:
        what = MAIN[key][1]
        for who, pick in (("student", min), ("teacher", max)):
            said = _said(rows, who, key)
            value, below = (
                (said[n := pick(said)], f"in {steps_in_words(n)}")
                if said
                else ("–", "not measured")
            )
            yield f"{who.capitalize()}, {what}", value, below


def table(evaluation: Mapping[str, Any], title: str = "") -> Markup:
    """Every measure of every row, one body per number of steps, with the protocol beneath."""
    rows, protocol = by_steps(rows_of(evaluation)), evaluation.get("protocol", {})
    said = "; ".join(f"{key}: {value}" for key, value in protocol.items())
    return part("judged", rows, said, title)


def _said(rows: Sequence[Row], who: str, key: str) -> dict[int, str]:
    """Number of steps -> how a score reads."""
    return {
        r.steps: MEASURES[key].words.format(r.scores[key])
        for r in rows
        if r.who == who and key in r.scores
    }
