"""Scores of the categories of prompts, group beside group."""

from collections.abc import Iterator, Sequence

from distill.evaluation.categories import NOTE, OF_PROMPTS, interval_within, marked, places_of
from distill.evaluation.results import comparable
from distill.evaluation.tables import MEASURES, markdown_table
from distill.report.runs import Line

HEADS = ("steps", "measure", "category", "prompts", "group", "mean", "95 % interval")


def rows(lines: Sequence[Line]) -> list[list[str]]:
    """The texts of a row below HEADS for each category of each line that has categories."""
    return [row for line in _first(lines) for row in _rows_of(line)]


def as_text(lines: Sequence[Line]) -> str:
    """The table in markdown with its note; "" where no prompts have categories."""
    found = rows(lines)
    return f"\n{markdown_table(HEADS, found)}\n{NOTE}\n" if found else ""


def _first(lines: Sequence[Line]) -> list[Line]:
    """The lines with categories that are comparable to the first of them."""
    found = [line for line in lines if line.categories]
    return [line for line in found if comparable(line.protocol, found[0].protocol)]


def _rows_of(line: Line) -> Iterator[list[str]]:
    for key in OF_PROMPTS:
        sample = line.samples.get(key)
        if sample is None or sample.outcomes is None:
            continue
        if sample.outcomes.shape[1] != len(line.categories):
            continue
        measure = MEASURES[key]
        for name, places in places_of(line.categories).items():
            interval = interval_within(sample, places)
            ends = "–"
            if interval.low is not None and interval.high is not None:
                ends = (
                    f"[{measure.form.format(interval.low)}, {measure.form.format(interval.high)}]"
                )
            value = measure.form.format(interval.value)
            head = [str(line.steps), measure.name, marked(name, len(places)), str(len(places))]
            yield [*head, line.group, value, ends]
