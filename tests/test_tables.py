"""The table of an evaluation as text, markdown and HTML; pages escape all text."""

from __future__ import annotations

import re
import time

import pytest
from jinja2 import UndefinedError

from distill.evaluation.tables import (
    MEASURES,
    Column,
    Line,
    Row,
    Table,
    as_markdown,
    as_text,
    columns_of,
    in_terminal,
    table_by_steps,
    table_in_order,
)
from distill.report.page import html, join_html, render
from hostile import EVIL

ROWS = [
    Row("teacher", 4, {"prompt_accuracy": 0.625, "fid": 20.5}),
    Row("student", 1, {"prompt_accuracy": 0.5, "fid": 12.25, "density": 1.5}),
    Row("student", 4, {"prompt_accuracy": 0.75, "fid": 20.5}),
]


def best_cells(table: Table) -> list[list[str]]:
    """The best cells of each line, as text."""
    rows = [row for body in table.bodies for row in table.rows(body)]
    return [[cell.text for cell in cells if cell.best] for _, cells in rows]


def test_columns_in_a_terminal_have_a_fixed_width():
    rows = [{"who": row.who, "steps": row.steps, **row.scores} for row in ROWS]
    rows.append({"who": "data", "steps": 0, "fid": float("nan"), "kind": 1.0})
    assert in_terminal(rows).splitlines() == [
        "           steps   prompt accuracy               fid           density",
        "teacher        4             0.625              20.5                 -",
        "student        1               0.5             12.25               1.5",
        "student        4              0.75              20.5                 -",
        "data                             -               nan                 -",
    ]


def test_markdown_has_the_requested_measures_in_their_order():
    table = as_markdown(table_in_order(ROWS, ["fid", "kid", "prompt_accuracy"], "{:.3f}"))
    assert table.splitlines() == [
        "| who | steps | fid | prompt accuracy |",
        "|---|---|---|---|",
        "| teacher | 4 | 20.500 | 0.625 |",
        "| student | 1 | 12.250 | 0.500 |",
        "| student | 4 | 20.500 | 0.750 |",
    ]


def test_the_best_is_marked_per_number_of_steps_and_not_if_all_are_equal():
    table = table_by_steps(ROWS)
    assert [[line.labels[0] for line in body] for body in table.bodies] == [
        ["Student, 1 step"],
        ["Student, 4 steps", "Teacher, 4 steps"],
    ]
    assert table.heads == ["Sampler", "Prompts right\xa0↑", "FID\xa0↓", "Density (data:\xa01)"]
    assert best_cells(table) == [[], ["75.0%"], []]


@pytest.mark.parametrize(
    ("better", "best"), [("higher", 2.0), ("lower", -0.1), ("as data", 1.2), ("neither", None)]
)
def test_which_values_are_better(better, best):
    column = Column("x", "X", better=better)
    lines = [Line([str(x)], {"x": [x]}) for x in (2.0, 1.2, 0.3, -0.1)]
    table = Table([""], [column], [lines])
    assert [text for (text,) in filter(None, best_cells(table))] == (
        [f"{best:.4g}"] if best else []
    )


def test_scores_of_seeds_are_shown_as_mean_and_deviation():
    column = Column("x", "X", "{:.1f}")
    assert column.text([1.0, 3.0]) == "2.0 ± 1.4"
    assert column.text([1.0]) == "1.0"
    assert column.text([]) == "–"


def test_a_table_of_a_thousand_lines_is_written_in_seconds():
    lines = [Line([f"run {i}", "1"], {key: [i, i + 1.0] for key in MEASURES}) for i in range(1000)]
    table = Table(["", "steps"], columns_of(MEASURES, lines), [lines])
    began = time.process_time()
    assert render("sortable_scores", table).count("<tr>") == 1001
    assert time.process_time() - began < 20


def test_the_head_of_every_measure_shows_its_direction():
    for key, measure in MEASURES.items():
        assert measure.head.endswith(("↑", "↓", "(data:\xa01)")) or key == "variety"


def test_all_writers_escape_the_texts_of_a_table():
    table = Table([EVIL, "steps"], [Column("x", EVIL)], [[Line([EVIL, EVIL], {"x": [1.0]})]])
    rows = as_markdown(table).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}
    assert not re.search(r"(?<!\\)[`<]", "".join(rows))
    for page in (render("scores_by_steps", table, EVIL, EVIL), render("sortable_scores", table)):
        assert "<script>alert" not in page
        assert "alert(1)" in page
    assert "\x1b" not in as_text(table)


def test_a_page_escapes_everything_but_html_of_macros():
    page = html(EVIL, EVIL, [(EVIL, EVIL, EVIL)], pictures=EVIL, training=render("note", EVIL))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6
    assert join_html(render("note", "<i>"), "<b>") == '<p class="soft">&lt;i&gt;</p>\n\n&lt;b&gt;'


def test_a_macro_without_its_argument_fails():
    with pytest.raises(UndefinedError):
        render("note")
