"""What the judging says: a sentence, three key figures, and a table of every measure by step count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from distill.report.words import is_number, none, number, percent, spelt, spoken, steps

Row = Mapping[str, Any]


class Measure(NamedTuple):
    """How a column is headed and judged: the best value is the one of lowest `loss`."""

    label: str
    loss: Callable[[float], float] | None = None
    say: Callable[[float], str] = number


def _share(label: str) -> Measure:
    return Measure(f"{label}\N{NO-BREAK SPACE}↑", lambda x: -x, percent)


MEASURES = {
    "prompt_accuracy": _share("Prompts right"),
    "frechet": Measure("Fréchet distance\N{NO-BREAK SPACE}↓", lambda x: x),
    "precision": _share("Precision"),
    "recall": _share("Recall"),
    "diversity": Measure("Diversity (data:\N{NO-BREAK SPACE}1)", lambda x: abs(x - 1)),
    "stripe_sharpness": Measure("Sharpness (data:\N{NO-BREAK SPACE}1)", lambda x: abs(x - 1)),
    "seconds_per_image": Measure("Seconds per image\N{NO-BREAK SPACE}↓", lambda x: x),
    **{k: _share(k.capitalize()) for k in ("kind", "colour", "fill", "size", "axis", "background", "count")},
}


def rows_of(evaluation: Mapping[str, Any]) -> list[Row]:
    """The rows that say whose they are and at how many steps, in the order of the file."""
    rows = evaluation.get("rows")
    rows = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    named = [r for r in rows if "who" in r and is_number(r.get("steps"))]
    return [r | {"who": str(r["who"]), "steps": int(r["steps"])} for r in named]


def name_of(row: Row) -> str:
    return f"{row['who'].capitalize()}, {steps(row['steps'])}"


def find(rows: Sequence[Row], who: str, key: str, *, pick: Callable = min, at: int | None = None) -> Row:
    """The row of `who` with the fewest or most steps, or `at` steps, among those with a number under `key`."""
    fit = [r for r in rows if r["who"] == who and is_number(r.get(key)) and at in (None, r["steps"])]
    return pick(fit, key=lambda r: r["steps"], default={})


def headline(rows: Sequence[Row], name: str) -> str:
    """The result in a sentence: the student at its fewest steps, the teacher at its most and at as few."""
    phrases = {"prompt_accuracy": "gets {} of prompts right", "frechet": "has a Fréchet distance of {}"}
    for key, phrase in phrases.items():
        if not (student := find(rows, "student", key)):
            continue
        n, say = student["steps"], MEASURES[key].say
        sentence = f"In {spelt(n)} step{'s' * (n != 1)} the student {phrase.format(say(student[key]))}"
        most, few = find(rows, "teacher", key, pick=max), find(rows, "teacher", key, at=n)
        if most and most is not few:
            sentence += f"; its teacher takes {steps(most['steps'])} for {say(most[key])}"
            sentence += f" and manages {say(few[key])} in {spelt(n)}" if few else ""
        elif few:
            sentence += f"; its teacher, in as many, manages {say(few[key])}"
        return sentence + "."
    return f"{name}: trained, but not judged against its teacher yet."


def tiles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Key figures: (what, its value, in which circumstances)."""

    def score(what: str, row: Row, key: str, more: str = "") -> tuple[str, str, str]:
        below = f"in {steps(row['steps'])}{more}" if row else "not measured"
        return what, MEASURES[key].say(row[key]) if row else "–", below

    far = find(rows, "teacher", "frechet", pick=max)
    compared = f"; teacher {number(far['frechet'])} in {far['steps']:,}" if far else ""
    return [
        score("Student, prompts right", find(rows, "student", "prompt_accuracy"), "prompt_accuracy"),
        score("Teacher, prompts right", find(rows, "teacher", "prompt_accuracy", pick=max), "prompt_accuracy"),
        score("Student, Fréchet distance", find(rows, "student", "frechet"), "frechet", compared),
    ]


def table(evaluation: Mapping[str, Any], why_empty: str) -> str:
    """Every measure of every row, with the protocol beneath."""
    rows = sorted(rows_of(evaluation), key=lambda r: (r["steps"], r["who"] != "student", r["who"]))
    keys = {k: None for row in rows for k, value in row.items() if k not in ("who", "steps") and is_number(value)}
    columns = [k for k in MEASURES if k in keys] + [k for k in keys if k not in MEASURES]
    if not columns:
        return none(why_empty or "evaluation.json holds no measured rows.")
    head = "".join(f'<th scope="col">{escape(_measure(key).label)}</th>' for key in columns)
    again = [False, *(a["steps"] == b["steps"] for a, b in pairwise(rows))]
    body = "\n".join(_line(row, rows, columns, again=x) for row, x in zip(rows, again, strict=True))
    legend = "Marked: the best of the rows with the same number of steps. ↑ higher is better, ↓ lower is better."
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">Sampler</th>{head}</tr></thead>\n<tbody>\n{body}\n'
        f'</tbody></table></div>\n<p class="soft">{legend}</p>\n{_protocol(evaluation.get("protocol"))}'
    )


def _measure(key: str) -> Measure:
    label = key.replace("_", " ").capitalize()
    return MEASURES.get(key) or (_share(label) if key.endswith("accuracy") else Measure(label))


def _line(row: Row, rows: Sequence[Row], columns: Sequence[str], *, again: bool) -> str:
    cells = []
    for key in columns:
        _, loss, say = _measure(key)
        if not is_number(row.get(key)):
            cells.append("<td>–</td>")
            continue
        rivals = [r[key] for r in rows if r["steps"] == row["steps"] and is_number(r.get(key))]
        best = loss and len(rivals) > 1 and loss(row[key]) == min(map(loss, rivals)) < max(map(loss, rivals))
        cells.append(f"<td><b>{say(row[key])}</b></td>" if best else f"<td>{say(row[key])}</td>")
    class_ = ' class="again"' if again else ""
    return f'<tr{class_}><th scope="row">{escape(name_of(row))}</th>{"".join(cells)}</tr>'


def _protocol(protocol: object) -> str:
    if not isinstance(protocol, dict) or not protocol:
        return none("The protocol of these numbers was not written down.")
    facts = "; ".join(f"{key.replace('_', ' ')}: {spoken(value)}" for key, value in protocol.items())
    return f'<p class="soft">Protocol. {escape(facts)}.</p>'
