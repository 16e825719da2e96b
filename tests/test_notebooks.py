"""Run the notebooks and the page on Python, cell by cell, each in a process of its own.

Jupyter is not needed. Figures are rendered without a window. The environment variable
NOTEBOOK_STEPS sets the number of steps.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

import distill

DOCS = Path(__file__).parents[1] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
PAGE = DOCS / "how_to" / "from_python.md"
STEPS = "NOTEBOOK_STEPS"
# This replacement makes the page's training short. Nothing else of the page is changed.
LONG, SHORT = '"trainer.max_steps=300"', '"trainer.max_steps=2", "data.batch_size=2"'

# Runs the pieces of code of its argument in one namespace, and counts the figures that are shown.
DRIVER = """
import json, sys
from matplotlib import pyplot

space, shown = {"__name__": "__main__"}, []

def show():
    shown.extend(pyplot.get_fignums())
    for number in pyplot.get_fignums():
        pyplot.figure(number).canvas.draw()
    pyplot.close("all")

pyplot.show = show
for i, code in enumerate(json.loads(sys.argv[1])):
    exec(compile(code, f"cell {i}", "exec"), space)
print("figures", len(shown))
"""


def cells(file: Path, kind: str) -> list[str]:
    book = json.loads(file.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == kind]


@pytest.fixture
def run(forks):
    """Run pieces of code in a process of their own in a folder; what they printed."""

    def run(pieces: list[str], folder: Path, **variables: str) -> str:
        environment = {**os.environ, "MPLBACKEND": "agg", **variables}
        out, err = folder / "out.txt", folder / "err.txt"
        done = forks.script(
            DRIVER, json.dumps(pieces), environment=environment, folder=folder, out=out, err=err
        )
        assert done.wait(timeout=1800) == 0, done.said("out") + done.said("err")
        return done.said("out")

    return run


def test_there_are_notebooks():
    assert [file.stem for file in NOTEBOOKS] == ["distil_shapes", "your_own_head"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_valid_and_has_no_output(file):
    """The format is version 4.5 of Jupyter's."""
    book = json.loads(file.read_text(encoding="utf-8"))
    assert set(book) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in book["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert book["cells"][0]["source"][0].startswith("# ")
    common = {"cell_type", "id", "metadata", "source"}
    for cell in book["cells"]:
        is_code = cell["cell_type"] == "code"
        assert set(cell) == common | ({"outputs", "execution_count"} if is_code else set())
        assert all(isinstance(line, str) for line in cell["source"])
        if is_code:
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize(
    ("name", "figures", "runs"), [("distil_shapes", 5, 1), ("your_own_head", 2, 2)]
)
@pytest.mark.slow
@pytest.mark.parametrize("steps", ["3", pytest.param("", marks=pytest.mark.nightly)])
def test_the_cells_of_a_notebook_run(name, figures, runs, steps, run, tmp_path):
    code = cells(DOCS / "notebooks" / f"{name}.ipynb", "code")
    assert any(STEPS in cell for cell in code)
    printed = run(code, tmp_path, **({STEPS: steps} if steps else {}))
    assert f"figures {figures}" in printed
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == runs
    assert all((folder / "metrics.csv").is_file() for folder in folders)
    if name == "distil_shapes":
        assert (folders[0] / "student" / "model_index.json").is_file()


def page_code() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
def test_the_code_of_the_page_on_python_runs(run, tmp_path):
    first, *more = page_code()
    assert len(first.strip().splitlines()) <= 11  # ten lines, and an empty one
    assert LONG in first
    words = f'{SHORT}, "loop.head_start=1"'
    trained = "distill.make_trainer(settings).fit(method, data)"
    run([first.replace(LONG, words), *more, trained], tmp_path)
    assert (tmp_path / "fast" / "model_index.json").is_file()
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_page_lists_every_name():
    rows = [line.split("|")[1] for line in PAGE.read_text(encoding="utf-8").splitlines()[-30:]
            if line.startswith("| `")]  # fmt: skip
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(distill.PUBLIC)
