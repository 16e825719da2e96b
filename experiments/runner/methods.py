"""The tables of all methods in README.md and docs/understand/results.md, and the picture at the top
of README.md: from the files of the studies that `experiments/methods.yaml` names.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from distill.evaluation.tables import MEASURES
from distill.storage.bounded import yaml_of
from runner.pages import cell, read_rows, replace_parts, table_of
from runner.pictures import labelled, rows_of_sheet, sheet
from runner.study import MEASURED, StudyError

FILE, GRID = "methods.yaml", Path("methods_on_shapes") / "grid.png"
PAGES = {"README.md": (1,), "docs/understand/results.md": (1, 2, 4)}  # with these numbers of steps
DRAWN = (1, 4)  # steps of the rows of the picture
NOTE = """Mean ± standard deviation over three seeds, 400 prompts. *Pictures* are those that a
student has seen in training. Their numbers differ, so rows do not rank methods:
[methods_on_shapes](experiments/methods_on_shapes/README.md) compares for equal ones."""
LINK = re.compile(r"\]\((?=docs/|experiments/)([^)]*)\)")


@dataclass(frozen=True)
class Source:
    """The lines of a group, or of a teacher, in a table of a study."""

    folder: Path
    table: str
    who: str
    group: str
    rows: Sequence[Mapping[str, str]]  # of <table>_intervals.csv
    pictures: int  # that a student has seen

    def cells(self, steps: int) -> list[str]:
        """The text of each of MEASURED at this number of steps, – where there is none."""
        found = {row["measure"]: row for row in self.rows if int(row["steps"]) == steps}
        return [cell(key, {**found[key], "low": ""}) if key in found else "–" for key in MEASURED]


def write_methods(experiments: Path) -> None:
    """Write the tables and the picture; nothing where there is no methods.yaml."""
    file = experiments / FILE
    if not file.is_file():
        return
    found = yaml.safe_load(yaml_of(file))
    for name, steps in PAGES.items():
        page = experiments.parent / name
        replace_parts(page, {"methods": methods_part(experiments, found, page, steps)})
    write_grid(experiments, found)


def methods_part(
    experiments: Path, found: Mapping[str, Any], page: Path, steps: Sequence[int]
) -> str:
    """The table with the teachers first, for a page of the repository."""
    heads = ["", "paper", "taught by", "steps", *(MEASURES[key].head for key in MEASURED)]
    heads += ["pictures", "study"]
    text = f"{table_of(heads, _rows(experiments, found, steps))}\n\n{NOTE}"
    folder = page.relative_to(experiments.parent).parent
    return LINK.sub(lambda link: f"]({Path(os.path.relpath(link[1], folder)).as_posix()})", text)


def _rows(experiments: Path, found: Mapping[str, Any], steps: Sequence[int]) -> Iterator[list[str]]:
    for node in found["teachers"]:
        source, n = source_of(experiments, node), node["source"]["steps"]
        yield [node["about"], "", "", str(n), *source.cells(n), "", _link(source)]
    for node in found["methods"]:
        source = source_of(experiments, node)
        known = {int(row["steps"]) for row in source.rows}
        first, last = [node["about"], node["paper"], node["teacher"]], [f"{source.pictures:,}"]
        for n in (n for n in steps if n in known):
            yield [*first, str(n), *source.cells(n), *last, _link(source) if any(last) else ""]
            first, last = ["", "", ""], [""]


def _link(source: Source) -> str:
    name = source.folder.name
    return f"[{name}](experiments/{name}/README.md)"


def source_of(experiments: Path, node: Mapping[str, Any]) -> Source:
    """The source of a row. Raises StudyError if it has not been run."""
    given = node["source"]
    folder, table = experiments / given["study"], given["table"]
    group = given.get("group", "")
    who = "student" if group else "teacher"
    file = folder / f"{table}_intervals.csv"
    rows = [row for row in read_rows(file) if row["who"] == who] if file.is_file() else []
    rows = [row for row in rows if not group or row["group"] == group]
    if not rows:
        raise StudyError(f"{experiments / FILE}: {node['about']}: its source has not been run")
    return Source(folder, table, who, group, rows, _pictures(folder, table, group))


def _pictures(folder: Path, table: str, group: str) -> int:
    """Pictures that each student of a group has seen, the most over its seeds; 0 for a teacher."""
    runs = read_rows(folder / f"{table}.csv") if group else []
    return max((int(float(r["images_seen"])) for r in runs if r["group"] == group), default=0)


def write_grid(experiments: Path, found: Mapping[str, Any]) -> None:
    """Draw the first teacher, then each method in DRAWN steps, from the pictures of the studies.

    The file stays as it is if nothing in it would change.
    """
    lines: list[tuple[str, list[Image.Image]]] = []
    for node in (found["teachers"][0], *found["methods"]):
        source = source_of(experiments, node)
        known = rows_of_sheet(source.folder, source.table)
        who, steps = source.group, DRAWN
        if source.who == "teacher":
            who, steps = "teacher", (node["source"]["steps"],)
        name = node.get("name", "teacher")
        lines += [(labelled(name, n), known[who, n]) for n in steps if (who, n) in known]
    drawn, file = sheet(lines), experiments / GRID
    if file.is_file():
        with Image.open(file) as before:
            if before.size == drawn.size and before.convert("RGB").tobytes() == drawn.tobytes():
                return
    drawn.save(file, optimize=True)
