"""Votes of judges between the groups of `compare`: a table of wins, and ELO ratings."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from distill.evaluation.categories import FEW, marked, places_of
from distill.evaluation.categories import NOTE as FEW_NOTE
from distill.evaluation.results import comparable
from distill.evaluation.statistics import Interval
from distill.evaluation.tables import MEASURES, markdown_table, steps_text
from distill.report.runs import Line
from distill.report.wins import elo, votes, win_rate
from distill.terminal.shown import in_csv

READER = "prompt_accuracy"  # judge=reader: the whole prompt right
HEADS = ("judge", "model", "against", "wins", "95 % interval", "over")
RATINGS = ("judge", "model", "ELO", "95 % interval", "over")
CATEGORIES = ("judge", "category", "prompts", *HEADS[1:])
NOTE = "A tie counts half. Intervals of ELO are over prompts and orders, not over seeds."


class Verdict(NamedTuple):
    """Win rates of the first name of each pair against the second, and ratings by name."""

    judge: str
    wins: Sequence[tuple[str, str, Interval]]
    ratings: Mapping[str, Interval]
    # category, number of its prompts, and the first three as in `wins`
    by_category: Sequence[tuple[str, int, str, str, Interval]] = ()


def judged(lines: Sequence[Line], judge: str) -> Verdict:
    """Every line that has outcomes of the judge, against each other one.

    Raises ValueError for a judge that is no measure, or without two lines of one protocol.
    """
    key = READER if judge == "reader" else judge
    if key not in MEASURES:
        known = ", ".join(["reader", *MEASURES])
        raise ValueError(
            f"judge={judge}: no such judge; take one of {known}, or votes=true for people"
        )
    found = [line for line in lines if key in line.samples]
    found = [line for line in found if line.samples[key].outcomes is not None]
    found = [line for line in found if comparable(line.protocol, found[0].protocol)]
    if len({line_name(line) for line in found}) < 2:
        raise ValueError(
            f"judge={judge}: fewer than two models have its outcomes of the same prompts; evaluate"
            " them anew by one protocol"
        )
    pairs = {(line_name(a), line_name(b)): _votes(a, b, key) for a, b in combinations(found, 2)}
    labels = {line.categories for line in found}
    return verdict(judge, pairs, labels.pop() if len(labels) == 1 else ())


def verdict(
    judge: str, pairs: Mapping[tuple[str, str], np.ndarray], labels: Sequence[str] = ()
) -> Verdict:
    """Of votes [S, P] of the first name of each pair against the second, of the same P prompts.

    `labels` are the categories of the prompts, if they have any.
    """
    wins = [(a, b, win_rate(x)) for (a, b), x in pairs.items()]
    by_category = [
        (name, len(places), a, b, win_rate(x[:, places]))
        for (a, b), x in pairs.items()
        for name, places in places_of(labels).items()
        if x.shape[1] == len(labels)
    ]
    ratings = elo({pair: x.mean(0) for pair, x in pairs.items()})
    return Verdict(judge, wins, ratings, by_category)


def tables(
    verdicts: Sequence[Verdict],
) -> Iterator[tuple[str, Sequence[str], list[list[str]], str]]:
    """Title, heads, rows and note of the win rates, of the ratings, the best first, and of the win
    rates by category, if prompts have any.
    """
    rows = [[v.judge, a, b, *_texts(i, "{:.1%}")] for v in verdicts for a, b, i in v.wins]
    yield "Win rates", HEADS, rows, ""
    rated = [
        [v.judge, name, *_texts(interval, "{:.1f}")]
        for v in verdicts
        for name, interval in sorted(v.ratings.items(), key=lambda item: -item[1].value)
    ]
    yield "Ratings", RATINGS, rated, NOTE
    single = [
        [v.judge, marked(name, count), str(count), a, b, *_texts(interval, "{:.1%}")]
        for v in verdicts
        for name, count, a, b, interval in v.by_category
    ]
    if single:
        yield "Win rates by category", CATEGORIES, single, FEW_NOTE


def as_text(verdicts: Sequence[Verdict]) -> str:
    """wins.md: the same tables."""
    parts = []
    for _, heads, rows, note in tables(verdicts):
        parts += [markdown_table(heads, rows), *([note, ""] if note else [])]
    return "\n".join(parts)


def as_csv(verdicts: Sequence[Verdict]) -> str:
    """wins.csv: the same numbers."""
    table = csv.writer(file := io.StringIO(), lineterminator="\n")
    heads = ["judge", "measure", "model", "against", "value", "low", "high", "over"]
    table.writerow([*heads, "category", "prompts"])
    for v in verdicts:
        rows: list[tuple[Any, ...]] = [("win_rate", a, b, i, "", "") for a, b, i in v.wins]
        rows += [("elo", name, "", i, "", "") for name, i in v.ratings.items()]
        rows += [("win_rate", a, b, i, name, n) for name, n, a, b, i in v.by_category]
        for measure, a, b, i, *of in rows:
            cells = [v.judge, measure, a, b, i.value, i.low, i.high, " ".join(i.over), *of]
            table.writerow(map(in_csv, cells))
    return file.getvalue()


def as_json(verdicts: Sequence[Verdict]) -> str:
    """wins.json: the same numbers, by judge."""
    found = []
    for v in verdicts:
        wins = [{"model": a, "against": b, **_numbers(i)} for a, b, i in v.wins]
        ratings = [{"model": name, **_numbers(i)} for name, i in v.ratings.items()]
        entry = {"judge": v.judge, "win_rates": wins, "elo": ratings}
        if v.by_category:
            entry["by_category"] = [
                {"category": name, "prompts": count, "few": count < FEW, "model": a, "against": b}
                | _numbers(i)
                for name, count, a, b, i in v.by_category
            ]
        found.append(entry)
    return json.dumps({"verdicts": found}, indent=1) + "\n"


def _numbers(interval: Interval) -> dict[str, Any]:
    ends = {name: getattr(interval, name) for name in ("value", "low", "high")}
    known = {name: x if x is None else float(x) for name, x in ends.items()}
    return {**known, "over": list(interval.over)}


def line_name(line: Line) -> str:
    """The name of a model in the tables."""
    return f"{line.group}, {steps_text(line.steps)}"


def _votes(a: Line, b: Line, key: str) -> np.ndarray:
    """Votes [S, P]: seeds in their order, as many as both have; a teacher meets every seed."""
    x, y = (np.asarray(line.samples[key].outcomes, float) for line in (a, b))
    sign = -1 if MEASURES[key].better == "lower" else 1
    seeds = max(len(x), len(y)) if 1 in (len(x), len(y)) else min(len(x), len(y))
    x, y = (np.repeat(z, seeds, axis=0) if len(z) == 1 else z[:seeds] for z in (x, y))
    return votes(sign * x, sign * y)


def _texts(interval: Interval, form: str) -> list[str]:
    low, high = interval.low, interval.high
    ends = "–" if low is None or high is None else f"[{form.format(low)}, {form.format(high)}]"
    return [form.format(interval.value), ends, " and ".join(interval.over) or "nothing"]
