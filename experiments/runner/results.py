"""The numbers of a study: from its runs into CSV files, from these into its page.

    <table>.csv             every run and score, as distill.compare writes them
    <table>_intervals.csv   mean, spread and 95 % interval of every group
    claims.csv              every claim with its difference, interval and verdict

Without the runs, the files that are there stay as they are. With some of them, so do the rows of
the other jobs, and of jobs that are recorded with more seeds. Of a table without intervals,
recorded before there were outcomes of single prompts, they are computed over seeds alone.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.evaluation.results import comparable
from distill.evaluation.statistics import mean_interval
from distill.evaluation.tables import MEASURES, Row
from distill.report.differences import SEEDS, Difference
from distill.report.runs import COSTS, Line, Run, as_csv, lines_of, read_comparable
from distill.storage.atomic import write_text_atomic
from runner.jobs import is_finished
from runner.methods import write_methods
from runner.pages import read_rows, write_pages
from runner.pictures import write_curves, write_grid
from runner.study import TEACHER, Claim, Study, StudyError, TableOf

INTERVALS = (
    "group", "who", "steps", "measure", "mean", "std", "low", "high", "over", "seeds", "prompts",
)  # fmt: skip
CLAIMS = (
    "claim", "paper", "table", "tested", "measure", "difference", "low", "high", "over", "seeds",
    "verdict",
)  # fmt: skip
NOT_RUN = "open: not run"
NOT_MEASURED = "open: not measured"  # its jobs were run, without this measure or number of steps


def write_results(study: Study, out: Path | None, overview: Path, *, partial: bool = False) -> None:
    """Write the study's files and pages. `out` has its runs; None: there are only the files."""
    found: dict[str, list[Line]] = {}
    for table in study.tables:
        _complete(study, table)
        groups = runs_of(study, table, out) if out else {}
        wanted = len(table.jobs) * len(study.seeds)
        if groups and (partial or sum(map(len, groups.values())) == wanted):
            found[table.name] = _from_runs(study, table, _unless_recorded(study, table, groups))
        elif groups:
            done = sum(map(len, groups.values()))
            print(f"{table.name}: {done} of {wanted} runs; page=partial writes these into the page")
    _write_claims(study, found)
    write_pages(study, overview)
    if overview.parent == study.folder.parent:
        write_methods(overview.parent)
    print(f"wrote {study.folder / 'README.md'}")


def runs_of(study: Study, table: TableOf, out: Path) -> dict[str, list[Run]]:
    """The finished runs, by the label of their job in the table."""
    places = {
        label: [out / job / f"seed_{seed}" for seed in study.seeds]
        for label, job in table.jobs.items()
    }
    folders = {
        label: [folder for folder in found if is_finished(folder)]
        for label, found in places.items()
    }
    order = [folder for found in folders.values() for folder in found]
    try:
        runs = dict(zip(order, read_comparable(order), strict=True))
    except (OSError, ValueError) as error:
        raise StudyError(str(error)) from None
    groups = {label: [runs[f] for f in found] for label, found in folders.items() if found}
    for first, *others in groups.values():
        for run in others:
            _check_protocol(first, run)
    return groups


def _check_protocol(first: Run, run: Run) -> None:
    """Raise StudyError for seeds of a job that were evaluated on other prompts or by others."""
    if not comparable(first.protocol, run.protocol):
        what = f"was evaluated by another protocol than {first.folder}"
        raise StudyError(f"{run.folder}: {what}; evaluate both alike with distill.evaluate run=...")


def _unless_recorded(
    study: Study, table: TableOf, groups: Mapping[str, list[Run]]
) -> dict[str, list[Run]]:
    """The groups of runs, without those that are recorded with more seeds."""
    seeds: dict[str, set[str]] = {}
    for row in _recorded(study.folder / f"{table.name}.csv"):
        seeds.setdefault(row["group"], set()).add(row["seed"])
    return {label: runs for label, runs in groups.items() if len(runs) >= len(seeds.get(label, ()))}


def _from_runs(study: Study, table: TableOf, groups: Mapping[str, list[Run]]) -> list[Line]:
    """Write the files of a table. What is recorded of jobs without runs stays, and so do the
    pictures then, which are made of runs.
    """
    lines, order = lines_of(groups), [TEACHER, *table.jobs]
    scores = csv.DictReader(io.StringIO(as_csv(groups)))
    stays = _write_beside(study.folder / f"{table.name}.csv", list(scores), order)
    rows = [dict(zip(INTERVALS, row, strict=True)) for row in intervals(lines)]
    _write_beside(study.folder / f"{table.name}_intervals.csv", rows, order)
    grid, curves = study.folder / f"{table.name}.png", study.folder / f"{table.name}_curves.svg"
    if not (stays and grid.is_file()):
        write_grid(grid, groups)
        write_curves(curves, groups)
    return lines


def _recorded(file: Path) -> list[dict[str, str]]:
    return read_rows(file) if file.is_file() else []


def _write_beside(file: Path, new: Sequence[Mapping[str, Any]], order: Sequence[str]) -> bool:
    """Write new rows beside the recorded ones of other groups, by their groups in this order, which
    has all; whether some of others stay.
    """
    others = {*order} - {row["group"] for row in new}
    stays = [row for row in _recorded(file) if row["group"] in others]
    rows = sorted([*new, *stays], key=lambda row: order.index(row["group"]))
    heads = list(dict.fromkeys(key for row in rows for key in row))
    _write(file, heads, ([row.get(key, "") for key in heads] for row in rows))
    return bool(stays)


def _complete(study: Study, table: TableOf) -> None:
    """The intervals of a table that was recorded without them."""
    file = study.folder / f"{table.name}_intervals.csv"
    lines = recorded_lines(study.folder / f"{table.name}.csv")
    if lines and not file.is_file():
        _write(file, INTERVALS, intervals(lines))


def recorded_lines(file: Path) -> list[Line]:
    """The lines of a CSV file of distill.compare; [] if there is none."""
    if not file.is_file():
        return []
    runs: dict[str, dict[str, Run]] = {}
    for row in read_rows(file):
        facts = {key: float(row[key]) for key in COSTS if row[key]}
        config = {"seed": row["seed"], "judged": {}}
        fresh = Run(Path(row["run"]), config, facts, [])
        run = runs.setdefault(row["group"], {}).setdefault(row["run"], fresh)
        scores = {key: float(row[key]) for key in MEASURES if row.get(key)}
        run.rows.append(Row(row["who"], int(row["steps"]), scores))  # type: ignore[attr-defined]
    return lines_of({group: list(found.values()) for group, found in runs.items()})


def intervals(lines: Sequence[Line]) -> Iterator[list[Any]]:
    """The rows of <table>_intervals.csv: every measure of every line."""
    for line in lines:
        for key, sample in line.samples.items():
            found = mean_interval(sample)
            seeds = 0 if sample.fixed else len(sample.scores)
            by_prompt = sample.outcomes is not None and "prompts" in found.over
            prompts = sample.outcomes.shape[1] if by_prompt and sample.outcomes is not None else 0
            values = line.values[key]
            ends = ["" if x is None else x for x in (found.low, found.high)]
            spread = _std(values) if len(values) > 1 else ""
            start = [line.group, line.who, line.steps, key, found.value, spread]
            yield [*start, *ends, " and ".join(found.over), seeds, prompts]


def _std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5)


@dataclass(frozen=True)
class Verdict:
    """A claim with its difference; None if its runs are missing."""

    claim: Claim
    difference: Difference | None
    missing: str = NOT_RUN

    @property
    def text(self) -> str:
        """holds or does not, for at least SEEDS seeds and an interval without zero; else open."""
        found = self.difference
        if found is None:
            return self.missing
        if found.interval.low is None:
            return f"open: {found.reason}"
        if not found.has_seeds:
            return f"open: fewer than {SEEDS} seeds"
        if not found.interval.excludes_zero:
            return "open: no difference shown"
        return "holds" if found.interval.value * self.claim.sign > 0 else "does not"

    @property
    def row(self) -> list[Any]:
        """The row of claims.csv."""
        start = [getattr(self.claim, key) for key in CLAIMS[:5]]
        found = self.difference
        if found is None:
            return [*start, "", "", "", "", "", self.text]
        low, high = ("" if x is None else x for x in (found.interval.low, found.interval.high))
        numbers = [found.interval.value, low, high, found.over]
        return [*start, *numbers, " and ".join(map(str, found.seeds)), self.text]


def verdict(claim: Claim, lines: Sequence[Line]) -> Verdict:
    """The verdict on a claim by these lines."""
    sides = [
        _line(name, steps, claim.measure, lines)
        for name, steps in zip((claim.a, claim.b), claim.steps, strict=True)
    ]
    a, b = sides
    if a is None or b is None:
        known = {TEACHER if line.who == TEACHER else line.group for line in lines}
        return Verdict(claim, None, NOT_MEASURED if {claim.a, claim.b} <= known else NOT_RUN)
    return Verdict(claim, Difference(claim.measure, a, b, claim.times))


def _line(name: str, steps: int, key: str, lines: Sequence[Line]) -> Line | None:
    who = "teacher" if name == TEACHER else "student"
    found = [
        line
        for line in lines
        if line.who == who and line.steps == steps and key in line.samples
        if who == "teacher" or line.group == name
    ]
    return found[0] if found else None


def _write_claims(study: Study, found: Mapping[str, Sequence[Line]]) -> None:
    """Write claims.csv. A claim of which no run is there anew keeps its row, if it had one."""
    file = study.folder / "claims.csv"
    before = {(row["table"], row["tested"]): row for row in _recorded(file)}
    rows = []
    for claim in study.claims:
        kept, lines = before.get((claim.table, claim.tested)), found.get(claim.table, ())
        anew = {TEACHER if line.who == TEACHER else line.group for line in lines}
        new = verdict(claim, lines)
        if (
            kept
            and not anew & {claim.a, claim.b}
            and kept["verdict"] not in (NOT_RUN, NOT_MEASURED)
        ):
            rows.append([claim.claim, claim.paper, *(kept[key] for key in CLAIMS[2:])])
            continue
        if new.difference is None:
            new = verdict(claim, recorded_lines(study.folder / f"{claim.table}.csv"))
        rows.append(new.row)
    if rows:
        _write(file, CLAIMS, rows)


def _write(file: Path, heads: Sequence[str], rows: Any) -> None:
    table = csv.writer(text := io.StringIO(), lineterminator="\n")
    table.writerow(heads)
    table.writerows(rows)
    write_text_atomic(file, text.getvalue())
