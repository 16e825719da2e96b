"""The made parts of pages: between markers, from the CSV files beside the page and nothing else.

<!-- made by experiments/run.py: results -->
...
<!-- end -->
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from distill.evaluation.tables import MEASURES, SPACE
from distill.storage.atomic import write_text_atomic
from runner.study import Study, StudyError, TableOf

BEGIN, END = "<!-- made by experiments/{}: {} -->", "<!-- end -->"
CLAIM_HEADS = ("claim", "the paper", "tested here", "difference [95 %]", "over", "verdict")
NOTHING = "No run of this study is finished yet."


def write_pages(study: Study, overview: Path) -> None:
    """Write the tables and verdicts into the study's page, and all verdicts into the overview."""
    page = study.folder / "README.md"
    parts = {table.name: table_part(study, table) for table in study.tables}
    parts |= {"claims": claims_part(study.folder)} if study.claims else {}
    replace_parts(page, parts)
    if overview.is_file() and overview.parent == study.folder.parent:
        replace_parts(overview, {"claims": overview_part(overview.parent)})


def replace_parts(page: Path, parts: dict[str, str], *, by: str = "run.py") -> None:
    """Replace what is between the markers of each part, made `by` this file of `experiments`.

    Raises StudyError if one is missing.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else f"# {page.parent.name}\n"
    for name, content in parts.items():
        begin = BEGIN.format(by, name)
        block = f"{begin}\n\n{content.strip()}\n\n{END}"
        if begin not in text:
            text = f"{text.rstrip()}\n\n{block}\n"
            continue
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
        if not pattern.search(text):
            raise StudyError(f"{page}: `{begin}` has no `{END}` after it; add it")
        text = pattern.sub(lambda _, block=block: block, text, count=1)
    write_text_atomic(page, text)


def table_part(study: Study, table: TableOf) -> str:
    """The table of a study, with the pictures that stand beside it."""
    file = study.folder / f"{table.name}_intervals.csv"
    if not file.is_file():
        return NOTHING
    rows = list(_table_rows(study, table, read_rows(file)))
    heads = ["", "keys", "steps", "seeds", *(MEASURES[key].head for key in table.measures)]
    parts = [table_of(heads, rows)]
    parts.append(
        f"Mean ± standard deviation over seeds [95 % interval]: [{file.name}]({file.name})."
    )
    for name, about in (
        (f"{table.name}.png", "the same prompts and noise across; a sampler down"),
        (f"{table.name}_curves.svg", "quality along the runs"),
    ):
        if (study.folder / name).is_file():
            parts.append(f"![{about}]({name})")
    return "\n\n".join(part.rstrip("\n") for part in parts)


def _table_rows(
    study: Study, table: TableOf, found: Sequence[dict[str, str]]
) -> Iterator[list[str]]:
    by_name = {job.name: " ".join(f"`{word}`" for word in job.overrides) for job in study.jobs}
    keys = {label: by_name[job] for label, job in table.jobs.items()}
    lines = dict.fromkeys((row["who"], row["group"], int(row["steps"])) for row in found)
    before = None
    for who, group, steps in sorted(lines, key=lambda line: _order(line, table)):
        if (who == "student" and table.steps and steps not in table.steps) or (
            who == "student" and group not in table.jobs
        ):
            continue
        cells = {
            row["measure"]: row
            for row in found
            if (row["who"], row["group"], int(row["steps"])) == (who, group, steps)
        }
        own_keys = keys.get(group, "") if group != before else ""
        before = group
        seeds = max((row["seeds"] for row in cells.values()), key=int)
        texts = [_of_seeds(key, cells, seeds) for key in table.measures]
        yield [group, own_keys, str(steps), "" if who == "teacher" else seeds, *texts]


def _of_seeds(key: str, cells: Mapping[str, Mapping[str, str]], seeds: str) -> str:
    """The text of a measure in a line of so many seeds. It says if some of them lack the measure:
    a run that has diverged has no distance.
    """
    if key not in cells:
        return "–"
    text, own = cell(key, cells[key]), cells[key]["seeds"]
    return text if own == seeds else f"{text} ({own} of {seeds} seeds)"


def _order(line: tuple[str, str, int], table: TableOf) -> tuple[int, int, int]:
    who, group, steps = line
    labels = list(table.jobs)
    place = labels.index(group) if group in labels else len(labels)
    return int(who != "teacher"), place, steps


def cell(key: str, row: Mapping[str, str]) -> str:
    """Mean, spread and interval of a row of <table>_intervals.csv; `key` is its measure."""
    form = MEASURES[key].form
    text = form.format(float(row["mean"]))
    if row["std"]:
        text += f" ± {form.format(float(row['std']))}"
    return f"{text} {_ends(key, row)}".rstrip()


def _ends(key: str, row: Mapping[str, str]) -> str:
    if not row["low"]:
        return ""
    form = MEASURES[key].form
    return f"[{form.format(float(row['low']))}, {form.format(float(row['high']))}]"


def table_of(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown. The texts of a study may hold markdown themselves."""
    first, *lines = [
        f"| {' | '.join(text.replace('|', '/').replace(SPACE, ' ') for text in row)} |"
        for row in (heads, *rows)
    ]
    return "\n".join([first, "|---" * len(heads) + "|", *lines])


def claims_part(folder: Path) -> str:
    """The verdicts of a study."""
    return table_of(CLAIM_HEADS, map(_claim_cells, read_rows(folder / "claims.csv")))


def overview_part(experiments: Path) -> str:
    """The verdicts of all studies."""
    rows = [
        [f"[{file.parent.name}]({file.parent.name}/README.md)", *_claim_cells(row)]
        for file in sorted(experiments.glob("*/claims.csv"))
        for row in read_rows(file)
    ]
    return table_of(("study", *CLAIM_HEADS), rows)


def _claim_cells(row: dict[str, str]) -> list[str]:
    difference = ""
    if row["difference"]:
        value = MEASURES[row["measure"]].form.format(float(row["difference"]))
        difference = f"{value} {_ends(row['measure'], row)}".rstrip()
    verdict = row["verdict"]
    bold = f"**{verdict}**" if verdict in ("holds", "does not") else verdict
    return [row["claim"], row["paper"], row["tested"], difference, row["over"], bold]


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, by its heads."""
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))
