"""Results of an evaluation as a table, whoever shows it: what each measure is called, how it reads
and which way it is better stand here once.

    rows_of(evaluation)   evaluation.json -> rows, checked
    by_steps(rows)        -> a table, in which those with as many steps compete
    in_order(rows, ...)   -> a table in the order of the file
    as_text(table)        for a terminal
    as_markdown(table)    for a model card, and for compare.md

HTML is written of the same table by the macro `scores` of report/templates/parts.html. Nothing here
imports torch.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, NamedTuple

from distill.storage.bounded import number_of
from distill.terminal.shown import in_markdown, shown

Better = Literal["higher", "lower", "as data", "neither"]
SPACE = "\N{NO-BREAK SPACE}"
MARKS = {"higher": f"{SPACE}↑", "lower": f"{SPACE}↓", "as data": f" (data:{SPACE}1)", "neither": ""}
PERCENT, PLAIN = "{:.1%}", "{:.4g}"
ABSENT = "–"


class Measure(NamedTuple):
    """A score: its name, with its unit where it has one, which values are better, how one reads."""

    name: str
    better: Better
    words: str = PLAIN

    @property
    def head(self) -> str:
        """The head of its column: name and direction."""
        return f"{self.name}{MARKS[self.better]}"


TIME = "seconds_per_image"
ATTRIBUTES = ("kind", "colour", "fill", "size", "axis", "background", "count")  # of `shapes`
MEASURES = {  # key in evaluation.json -> what it is
    "prompt_accuracy": Measure("Prompts right", "higher", PERCENT),
    "frechet": Measure("Fréchet distance", "lower", "{:,.1f}"),
    "fid": Measure("FID", "lower"),
    "clip_score": Measure("CLIP score", "higher"),
    "clip_score_b32": Measure("CLIP score, B/32", "higher"),
    "pick_score": Measure("PickScore", "higher"),
    "hps": Measure("HPS", "higher"),
    "kid": Measure("KID", "lower"),
    "fd_dinov2": Measure("FD-DINOv2", "lower"),
    "cmmd": Measure("CMMD", "lower"),
    "precision": Measure("Precision", "higher", PERCENT),
    "recall": Measure("Recall", "higher", PERCENT),
    "density": Measure("Density", "as data"),
    "coverage": Measure("Coverage", "higher", PERCENT),
    "diversity": Measure("Diversity", "as data"),
    "variety": Measure("Variety", "neither"),
    "stripe_sharpness": Measure("Sharpness", "as data"),
    TIME: Measure("Seconds per image", "lower"),
    **{key: Measure(key.capitalize(), "higher", PERCENT) for key in ATTRIBUTES},
}
MOST_ROWS = 1000  # ours: samplers times numbers of steps
WIDTHS, WIDE = (10, 6), 18  # in a terminal: of the words a line begins with, of a score


# -- rows ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One sampler at one number of steps, 0 where it has none, and its scores by measure."""

    who: str
    steps: int
    scores: dict[str, float]

    @property
    def name(self) -> str:
        who = self.who.capitalize()
        return f"{who}, {steps_in_words(self.steps)}" if self.steps else who


def steps_in_words(n: int) -> str:
    return f"{n:,} step" if n == 1 else f"{n:,} steps"


def rows_of(evaluation: Mapping[str, Any], *, finite: bool = True) -> list[Row]:
    """The rows in the order of the file, which is that of the comparison's pictures.

    finite: without scores that are infinite or not a number, as where no prompt asked for one.

    Raises ValueError for what is no result of ours.
    """
    rows, protocol = evaluation.get("rows", []), evaluation.get("protocol", {})
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not listed or len(rows) > MOST_ROWS or not isinstance(protocol, dict):
        what = f"at most {MOST_ROWS} rows and a protocol"
        raise ValueError(f"evaluation.json holds no results, which are {what}; evaluate anew")
    return [_row(row, f"row {i} of evaluation.json", finite) for i, row in enumerate(rows, 1)]


def _row(row: Mapping[str, Any], where: str, finite: bool) -> Row:
    who, steps = row.get("who"), row.get("steps")
    if not isinstance(who, str) or type(steps) is not int or not 0 <= steps < 10**6:
        said = f"who={shown(who, 40)} and steps={shown(steps, 40)}"
        raise ValueError(f"{where} says {said}, a word and a number of steps; evaluate anew")
    found = {key: number_of(row, key, where) for key in MEASURES if key in row}
    scores = {key: x for key, x in found.items() if x is not None}
    return Row(who, steps, {k: x for k, x in scores.items() if isfinite(x) or not finite})


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The scores by `key`: the head above them, how one reads, what stands where there is none."""

    key: str
    head: str
    words: str = PLAIN
    better: Better = "neither"
    absent: str = ABSENT

    def text(self, scores: Sequence[float]) -> str:
        """Mean and standard deviation of what seeds have scored; of a single score itself."""
        if not scores:
            return self.absent
        mean = self.words.format(statistics.fmean(scores))
        return f"{mean} ± {self.words.format(statistics.stdev(scores))}" if scores[1:] else mean

    def distance(self, scores: Sequence[float]) -> float:
        """How far their mean is from the best; less is better."""
        mean = statistics.fmean(scores)
        goals = {"higher": -mean, "lower": abs(mean), "as data": abs(mean - 1), "neither": 0.0}
        return goals[self.better]


class Line(NamedTuple):
    """A line of a table: what it is of, in words, and its scores by measure, one for each seed."""

    of: Sequence[str]
    scores: Mapping[str, Sequence[float]]


class Cell(NamedTuple):
    text: str
    mean: float | None  # of the scores; None without any
    best: bool  # of those that compete, if they differ


@dataclass(frozen=True)
class Table:
    """Lines in bodies; those of one body compete. `of` are the heads of what a line is of."""

    of: Sequence[str]
    columns: Sequence[Column]
    bodies: Sequence[Sequence[Line]]

    @property
    def heads(self) -> list[str]:
        return [*self.of, *(column.head for column in self.columns)]

    @property
    def lines(self) -> list[Line]:
        return [line for body in self.bodies for line in body]

    def rows(self, body: Sequence[Line]) -> list[tuple[Line, list[Cell]]]:
        """The lines of a body, each with a cell for each column."""
        best = [_best(column, body) for column in self.columns]
        return [
            (line, [_cell(*each, line) for each in zip(self.columns, best, strict=True)])
            for line in body
        ]


def _best(column: Column, body: Sequence[Line]) -> float | None:
    """The least distance in a column; None where no two differ."""
    found = (line.scores.get(column.key, ()) for line in body)
    distances = [column.distance(scores) for scores in found if scores]
    return min(distances) if len(set(distances)) > 1 else None


def _cell(column: Column, best: float | None, line: Line) -> Cell:
    scores = line.scores.get(column.key, ())
    if not scores:
        return Cell(column.absent, None, best=False)
    is_best = column.distance(scores) == best
    return Cell(column.text(scores), statistics.fmean(scores), is_best)


def columns_of(keys: Iterable[str], lines: Sequence[Line]) -> list[Column]:
    """A column for each of these measures of which any line has a score, as pages show it."""
    there = [key for key in keys if any(key in line.scores for line in lines)]
    return [
        Column(key, MEASURES[key].head, MEASURES[key].words, MEASURES[key].better) for key in there
    ]


def plain_columns(keys: Iterable[str], lines: Sequence[Line], words: str) -> list[Column]:
    """The same under the keys themselves, for text; all scores read as `words`."""
    there = [key for key in keys if any(key in line.scores for line in lines)]
    return [Column(key, key.replace("_", " "), words, absent="-") for key in there]


def by_steps(rows: Sequence[Row]) -> Table:
    """Every measure of every row; those with as many steps compete.

    Raises ValueError where nothing was measured.
    """
    rows = sorted(rows, key=lambda row: row.who)
    numbers = sorted({row.steps for row in rows})
    bodies = [[_line([row.name], row) for row in rows if row.steps == n] for n in numbers]
    columns = columns_of(MEASURES, [line for body in bodies for line in body])
    if not columns:
        raise ValueError("it holds no measured rows")
    return Table(["Sampler"], columns, bodies)


def in_order(rows: Sequence[Row], keys: Iterable[str], words: str) -> Table:
    """These measures of the rows in their order, under their keys; all scores read as `words`."""
    lines = [_line([row.who, str(row.steps)], row) for row in rows]
    return Table(["who", "steps"], plain_columns(keys, lines, words), [lines])


def in_terminal(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows that a protocol has measured as lines for a terminal, what is not finite too."""
    keys = [key for key in MEASURES if key not in (*ATTRIBUTES, TIME)]
    lines = [
        Line([row["who"], str(row["steps"] or "")], {k: [row[k]] for k in keys if k in row})
        for row in rows
    ]
    return as_text(Table(["", "steps"], plain_columns(keys, lines, PLAIN), [lines]))


def _line(of: Sequence[str], row: Row) -> Line:
    return Line(of, {key: [score] for key, score in row.scores.items()})


# -- writers ---------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """The lines of a table of two words, a name and a number of steps, and scores."""
    first, second = WIDTHS
    written = []
    for name, steps, *cells in (map(shown, row) for row in _texts(table)):
        written.append(f"{name:{first}}{steps:>{second}}{''.join(f'{x:>{WIDE}}' for x in cells)}")
    return "\n".join(written)


def as_markdown(table: Table) -> str:
    """A table of markdown, with an end of line."""
    heads, *lines = (
        [in_markdown(text.replace(SPACE, " ")) for text in row] for row in _texts(table)
    )
    rows = "".join(f"| {' | '.join(row)} |\n" for row in lines)
    return f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n{rows}"


def _texts(table: Table) -> Iterator[list[str]]:
    """What stands in the heads, then in every line."""
    yield table.heads
    for line in table.lines:
        scores = (column.text(line.scores.get(column.key, ())) for column in table.columns)
        yield [*line.of, *scores]
