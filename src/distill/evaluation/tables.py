"""Results of an evaluation as a table: the names, directions and formats of all measures.

    rows_of(evaluation)        evaluation.json -> checked rows
    table_by_steps(rows)       -> a table with a body for each number of steps
    table_in_order(rows, ...)  -> a table in the order of the file
    as_text(table)             for a terminal
    as_markdown(table)         for a model card and compare.md

The macro `scores` in report/templates/parts.html writes the same table as HTML. Nothing here
imports torch.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from distill.evaluation.categories import labels_of
from distill.evaluation.results import outcomes_of
from distill.storage.bounded import number_of
from distill.terminal.shown import in_markdown, shown

Better = Literal["higher", "lower", "as data", "neither"]
SPACE = "\N{NO-BREAK SPACE}"
DIRECTIONS = {
    "higher": f"{SPACE}↑",
    "lower": f"{SPACE}↓",
    "as data": f" (data:{SPACE}1)",
    "neither": "",
}
PERCENT, PLAIN = "{:.1%}", "{:.4g}"
ABSENT = "–"


class Measure(NamedTuple):
    """The name of a score, with its unit if it has one, its direction, and a format string."""

    name: str
    better: Better
    form: str = PLAIN

    @property
    def head(self) -> str:
        """The column head: name and direction."""
        return f"{self.name}{DIRECTIONS[self.better]}"


TIME = "seconds_per_image"
ATTRIBUTES = ("kind", "colour", "fill", "size", "axis", "background", "count")  # of `shapes`
MEASURES = {  # key in evaluation.json -> measure
    "prompt_accuracy": Measure("Prompts right", "higher", PERCENT),
    "render_accuracy": Measure("Renders right", "neither", PERCENT),  # of other sizes than 64x64
    "frechet": Measure("Fréchet distance", "lower", "{:,.1f}"),
    "fid": Measure("FID", "lower"),
    "clip_score": Measure("CLIP score", "higher"),
    "clip_score_b32": Measure("CLIP score, B/32", "higher"),
    "pick_score": Measure("PickScore", "higher"),
    "hps": Measure("HPS", "higher"),
    "image_reward": Measure("ImageReward", "higher"),
    "aesthetic": Measure("Aesthetic score", "higher"),
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
    # Of edits and of filled pictures.
    "edited": Measure("Edits right", "higher", PERCENT),
    "followed": Measure("Instruction followed", "higher", PERCENT),
    "kept": Measure("Rest as before", "higher", PERCENT),
    "stuck": Measure("Named part as before", "lower", PERCENT),
    "change": Measure("Change, of the true one", "as data", "{:.2f}"),
    "kept_error": Measure("Error where nothing changes", "lower", "{:.4f}"),
    "known_error": Measure("Error of known pixels", "lower", "{:.4f}"),
    "fill_distance": Measure("Distance to what was masked", "lower", "{:.3f}"),
    TIME: Measure("Seconds per image", "lower"),
    **{key: Measure(key.capitalize(), "higher", PERCENT) for key in ATTRIBUTES},
}
LARGEST_SCORE = 1e100  # ours: squares of larger ones, for the spread, are no floats
MOST_ROWS = 1000  # ours: limit of samplers times numbers of steps
LABEL_WIDTHS = (10, 6)  # characters in a terminal
SCORE_WIDTH = 18


# -- rows ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The scores of a sampler at one number of steps, which is 0 for real data.

    `outcomes`: for some measures the number of every prompt, whose mean is the score. `categories`:
    that of every prompt, if it has one.
    """

    who: str
    steps: int
    scores: dict[str, float]
    outcomes: Mapping[str, Sequence[float]] = {}
    categories: Sequence[str] = ()

    @property
    def name(self) -> str:
        who = self.who.capitalize()
        return f"{who}, {steps_text(self.steps)}" if self.steps else who


def steps_text(n: int) -> str:
    return f"{n:,} step" if n == 1 else f"{n:,} steps"


def rows_of(evaluation: Mapping[str, Any], *, finite: bool = True) -> list[Row]:
    """The rows in the order of the file, which is also that of the strips in the comparison.

    finite: leave out infinite and huge scores, and NaN, which means that no prompt names that
    attribute.

    Raises ValueError for a file that does not hold rows and a protocol.
    """
    rows, protocol = evaluation.get("rows", []), evaluation.get("protocol", {})
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not listed or len(rows) > MOST_ROWS or not isinstance(protocol, dict):
        what = f"evaluation.json must hold at most {MOST_ROWS} rows and a protocol"
        raise ValueError(f"{what}; evaluate anew")
    return [_row(row, f"row {i} of evaluation.json", finite) for i, row in enumerate(rows, 1)]


def _row(row: Mapping[str, Any], where: str, finite: bool) -> Row:
    who, steps = row.get("who"), row.get("steps")
    if not isinstance(who, str) or type(steps) is not int or not 0 <= steps < 10**6:
        values = f"who={shown(who, 40)} and steps={shown(steps, 40)}"
        raise ValueError(f"{where} has {values}, not a name and a number; evaluate anew")
    found = {key: number_of(row, key, where) for key in MEASURES if key in row}
    scores = {key: x for key, x in found.items() if x is not None}
    try:
        outcomes, categories = outcomes_of(row), labels_of(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    kept = {k: x for k, x in scores.items() if abs(x) < LARGEST_SCORE or not finite}
    return Row(who, steps, kept, outcomes, categories)


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The column of the scores by `key`; `absent` is the text of a missing score."""

    key: str
    head: str
    form: str = PLAIN
    better: Better = "neither"
    absent: str = ABSENT

    def text(self, scores: Sequence[float], ends: tuple[float, float] | None = None) -> str:
        """Mean ± standard deviation over seeds, or a single score; then its interval."""
        if not scores:
            return self.absent
        text = self.form.format(statistics.fmean(scores))
        if scores[1:]:
            text += f" ± {self.form.format(statistics.stdev(scores))}"
        return f"{text} [{', '.join(map(self.form.format, ends))}]" if ends else text

    def distance(self, scores: Sequence[float]) -> float:
        """Distance of the mean from the ideal value; lower is better."""
        mean = statistics.fmean(scores)
        distances = {"higher": -mean, "lower": abs(mean), "as data": abs(mean - 1), "neither": 0.0}
        return distances[self.better]


class Line(NamedTuple):
    """A line of a table: the texts that name it, and its scores by measure, one for each seed.

    `intervals`: for some measures the ends of the mean's interval.
    """

    labels: Sequence[str]
    scores: Mapping[str, Sequence[float]]
    intervals: Mapping[str, tuple[float, float] | None] = {}


class Cell(NamedTuple):
    text: str
    mean: float | None  # of the scores; None if there are none
    best: bool  # in its column and body; False if all are equal


@dataclass(frozen=True)
class Table:
    """Lines in bodies: the best scores of each body are marked. `label_heads` name the labels."""

    label_heads: Sequence[str]
    columns: Sequence[Column]
    bodies: Sequence[Sequence[Line]]

    @property
    def heads(self) -> list[str]:
        return [*self.label_heads, *(column.head for column in self.columns)]

    @property
    def lines(self) -> list[Line]:
        return [line for body in self.bodies for line in body]

    def rows(self, body: Sequence[Line]) -> list[tuple[Line, list[Cell]]]:
        """The lines of a body, each with its cells."""
        best = [_best(column, body) for column in self.columns]
        return [
            (line, [_cell(*each, line) for each in zip(self.columns, best, strict=True)])
            for line in body
        ]


def _best(column: Column, body: Sequence[Line]) -> float | None:
    """The smallest distance in a column; None if all are equal."""
    found = (line.scores.get(column.key, ()) for line in body)
    distances = [column.distance(scores) for scores in found if scores]
    return min(distances) if len(set(distances)) > 1 else None


def _cell(column: Column, best: float | None, line: Line) -> Cell:
    scores = line.scores.get(column.key, ())
    if not scores:
        return Cell(column.absent, None, best=False)
    is_best = column.distance(scores) == best
    text = column.text(scores, line.intervals.get(column.key))
    return Cell(text, statistics.fmean(scores), is_best)


def columns_of(keys: Iterable[str], lines: Sequence[Line]) -> list[Column]:
    """A column for each of these measures that any line has, with its name and direction."""
    return [
        Column(key, MEASURES[key].head, MEASURES[key].form, MEASURES[key].better)
        for key in _present(keys, lines)
    ]


def _key_columns(keys: Iterable[str], lines: Sequence[Line], form: str) -> list[Column]:
    """The same with the keys as heads, and one format for all scores."""
    return [Column(key, key.replace("_", " "), form, absent="-") for key in _present(keys, lines)]


def _present(keys: Iterable[str], lines: Sequence[Line]) -> list[str]:
    """The keys that any line has."""
    return [key for key in keys if any(key in line.scores for line in lines)]


def table_by_steps(rows: Sequence[Row]) -> Table:
    """A table of all measures, with a body for each number of steps. Raises ValueError without
    scores.
    """
    rows = sorted(rows, key=lambda row: row.who)
    numbers = sorted({row.steps for row in rows})
    bodies = [[_line([row.name], row) for row in rows if row.steps == n] for n in numbers]
    columns = columns_of(MEASURES, [line for body in bodies for line in body])
    if not columns:
        raise ValueError("it holds no measured rows")
    return Table(["Sampler"], columns, bodies)


def table_in_order(rows: Sequence[Row], keys: Iterable[str], form: str) -> Table:
    """A table of these measures, the rows in their order; the heads are the keys."""
    lines = [_line([row.who, str(row.steps)], row) for row in rows]
    return Table(["who", "steps"], _key_columns(keys, lines, form), [lines])


def in_terminal(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a protocol as a table for a terminal, including scores that are not finite."""
    keys = [key for key in MEASURES if key not in (*ATTRIBUTES, TIME)]
    lines = [
        Line([row["who"], str(row["steps"] or "")], {k: [row[k]] for k in keys if k in row})
        for row in rows
    ]
    return as_text(Table(["", "steps"], _key_columns(keys, lines, PLAIN), [lines]))


def _line(labels: Sequence[str], row: Row) -> Line:
    return Line(labels, {key: [score] for key, score in row.scores.items()})


# -- writers ---------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """Lines of fixed width, of a table with two labels: a name and a number of steps."""
    first, second = LABEL_WIDTHS
    written = []
    for name, steps, *cells in (map(shown, row) for row in _cell_texts(table)):
        scores = "".join(f"{text:>{SCORE_WIDTH}}" for text in cells)
        written.append(f"{name:{first}}{steps:>{second}}{scores}")
    return "\n".join(written)


def as_markdown(table: Table) -> str:
    """A table in markdown; it ends with a line end."""
    heads, *lines = _cell_texts(table)
    return markdown_table(heads, lines)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Texts as a table in markdown; it ends with a line end."""
    escaped = [[in_markdown(t.replace(SPACE, " ")) for t in row] for row in (heads, *rows)]
    first, *lines = [f"| {' | '.join(row)} |\n" for row in escaped]
    return f"{first}{'|---' * len(heads)}|\n{''.join(lines)}"


def _cell_texts(table: Table) -> Iterator[list[str]]:
    """The texts of the heads, then of each line."""
    yield table.heads
    for line in table.lines:
        keys = [column.key for column in table.columns]
        cells = [(line.scores.get(key, ()), line.intervals.get(key)) for key in keys]
        texts = (column.text(*cell) for column, cell in zip(table.columns, cells, strict=True))
        yield [*line.labels, *texts]
