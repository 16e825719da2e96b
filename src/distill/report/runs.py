"""Finished runs side by side: what they differ in, and their scores by group, over seeds."""

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.evaluation import tables
from distill.evaluation.results import FILE, PICTURE, Verdict, comparable, verdicts
from distill.evaluation.tables import MEASURES, TIME, Column, Row, Table, columns_of, rows_of
from distill.storage.bounded import configuration_of, mapping_of, number_of
from distill.storage.renames import renamed
from distill.terminal.shown import in_csv

# A run's own, or what is judged and not what is compared; `name` and `seed` are told of elsewhere.
ASIDE = {"run_dir", "resume", "name", "seed", "hydra", "logger", "callbacks", "metrics", "debug"}
COSTS = ("train_seconds", "images_seen")
SCORES = [key for key in MEASURES if key != TIME]


@dataclass(frozen=True)
class Run:
    """A judged run: its folder, what made it and what it is worth."""

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    rows: Sequence[Row]
    picture: str = PICTURE  # in samples/, a strip for every row

    @property
    def protocol(self) -> Mapping[str, Any]:
        """How it was judged, kept with the configuration since runs differ in it likewise."""
        return self.config["judged"]

    @property
    def name(self) -> str:
        return str(self.facts.get("name", self.folder.name))

    @property
    def method(self) -> str:
        return str(self.facts.get("method", "?"))


def read_run(folder: Path) -> Run:
    """The run in this folder, which must have been judged; by its own protocol.

    Raises ValueError, YAMLError or OSError for a damaged one.
    """
    return _by(folder, verdicts_of(folder)[0])


def read_alike(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, which must have been judged: by one protocol if there is one that
    all have.

    A run's own protocol goes before those that it was judged by besides. Where none is shared each
    has its own.
    """
    every = [verdicts_of(folder) for folder in folders]
    for wanted in every[0] if every else ():
        found = [_like(verdicts, wanted) for verdicts in every]
        chosen = [verdict for verdict in found if verdict is not None]
        if len(chosen) == len(every):
            return [_by(folder, verdict) for folder, verdict in zip(folders, chosen, strict=True)]
    return [_by(folder, verdicts[0]) for folder, verdicts in zip(folders, every, strict=True)]


def _like(verdicts: Sequence[Verdict], wanted: Verdict) -> Verdict | None:
    alike = (v for v in verdicts if comparable(v["protocol"], wanted["protocol"]))
    return next(alike, None)


def verdicts_of(folder: Path) -> list[Verdict]:
    """What the run in this folder was judged to be, its own verdict first."""
    found = verdicts({"rows": [], **mapping_of(folder / FILE)})
    for verdict in found:
        try:
            rows_of(verdict)
        except ValueError as error:
            raise ValueError(f"{folder / FILE}: {error}") from None
    return found


def _by(folder: Path, verdict: Verdict) -> Run:
    config = configuration_of(folder / "config.yaml")
    facts = mapping_of(folder / "run.json")
    for key in COSTS:
        number_of(facts, key, str(folder / "run.json"))
    config = {**_plain(renamed(config)), "judged": verdict["protocol"]}
    return Run(folder, config, facts, rows_of(verdict), verdict["picture"])


def _plain(value: Any) -> Any:
    """YAML with keys that are texts, and dates and the like as texts: a stranger's may have any."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def grouped(runs: Sequence[Run], *, by_name: bool = False) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, under what sets them apart from the others; or those of
    one `name`.

    A method brings a recipe along, so runs of different methods are told apart by its name, and
    only runs of one method by their keys; likewise anything whose class differs, by the name of the
    class.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        rivals = [other.config for other in runs if other.method == run.method]
        words = [run.method] if len(rivals) < len(runs) else []
        words += _settings(run, _keys("", rivals))
        if by_name:
            rivals = [other.config for other in runs if other.name == run.name]
            words = [run.name, *_settings(run, _keys("judged", rivals))]
        groups.setdefault(", ".join(words) or run.method, []).append(run)
    return groups


def _differences(path: str, nodes: Sequence[Any]) -> Iterator[str]:
    """Dotted keys in which the nodes are not all alike."""
    if all(node == nodes[0] for node in nodes):
        return
    maps = [node for node in nodes if isinstance(node, Mapping)]
    if len(maps) < len(nodes) or len({str(node.get("_target_")) for node in maps}) > 1:
        yield path
        return
    for key in dict.fromkeys(key for node in maps for key in node):
        if path or key not in ASIDE:
            yield from _differences(
                f"{path}.{key}" if path else key, [node.get(key) for node in maps]
            )


def _keys(path: str, nodes: Sequence[Mapping[str, Any]], but: str = "judged.teacher") -> list[str]:
    """What the nodes differ in at this path, but not how others are judged (`but`), nor measures
    that one lacks.
    """
    found = _differences(path, [node[path] if path else node for node in nodes])
    known = set.intersection(*(set(node["judged"] or ()) for node in nodes))
    return sorted(
        k for k in found if not k.startswith("judged") or (k[7:] in known and not k.startswith(but))
    )


def _settings(run: Run, keys: Sequence[str]) -> list[str]:
    """`key=value` of each dotted key, by its last part if no other ends alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [
        f"{k if ends.count(end) > 1 else end}={_said(run.config, k)}"
        for k, end in zip(keys, ends, strict=True)
    ]


def _said(config: Mapping[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return str(value.get("_target_", "...")).rpartition(".")[2]
    return json.dumps(value).replace('"', "") if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Line:
    """Scores of one sampler: of a group's students at a number of steps, or of the teacher; a value
    for each run.
    """

    group: str
    who: str
    steps: int
    values: Mapping[str, Sequence[float]]

    def mean(self, key: str) -> float:
        return statistics.fmean(self.values[key])

    def said(self, key: str, words: str) -> str:
        """Mean and standard deviation, as `words` formats a number."""
        return Column(key, key, words).text(self.values.get(key, ()))


def lines_of(groups: Mapping[str, Sequence[Run]]) -> list[Line]:
    """First the lines of each teacher, of all its runs together, then each group's."""
    students = (line for group, runs in groups.items() for line in _lines(group, "student", runs))
    runs, teachers = everyone(groups), {}
    configs = [{key: run.config.get(key) for key in ("teacher", "judged")} for run in runs]
    keys = _keys("", configs, but="judged.student")
    for run in runs:
        teachers.setdefault(", ".join(["teacher", *_settings(run, keys)]), []).append(run)
    return [
        *(line for name, its in teachers.items() for line in _lines(name, "teacher", its)),
        *students,
    ]


def everyone(groups: Mapping[str, Sequence[Run]]) -> list[Run]:
    return [run for runs in groups.values() for run in runs]


def _lines(group: str, who: str, runs: Sequence[Run]) -> Iterator[Line]:
    for steps in sorted({row.steps for run in runs for row in run.rows if row.who == who}):
        rows = [row for run in runs for row in run.rows if (row.who, row.steps) == (who, steps)]
        found = {key: [row.scores[key] for row in rows if key in row.scores] for key in MEASURES}
        scores = {key: values for key, values in found.items() if values}
        if who == "teacher":  # judged again by every run, on the same prompts: no spread over seeds
            scores = {key: [statistics.fmean(values)] for key, values in scores.items()}
        yield Line(group, who, steps, scores)


def as_csv(groups: Mapping[str, Sequence[Run]]) -> str:
    """A row for each run, sampler and number of steps."""
    table = csv.writer(file := io.StringIO(), lineterminator="\n")
    table.writerow(["group", "run", "seed", *COSTS, "who", "steps", *MEASURES])
    for group, runs in groups.items():
        for run in runs:
            start = [group, run.folder.name, run.config.get("seed"), *map(run.facts.get, COSTS)]
            for r in run.rows:
                scores = (r.scores.get(key, "") for key in MEASURES)
                table.writerow(map(in_csv, [*start, r.who, r.steps, *scores]))
    return file.getvalue()


def in_text(lines: Sequence[Line]) -> Table:
    """The table of means and spreads, with how many runs each is of."""
    counts = [max(map(len, line.values.values()), default=0) for line in lines]
    of = [
        [line.group, str(line.steps), str(count) if line.who == "student" else ""]
        for line, count in zip(lines, counts, strict=True)
    ]
    return _table(["", "steps", "runs"], of, lines)


def on_page(lines: Sequence[Line]) -> Table:
    """The same as a page shows it, whose lines can be sorted."""
    return _table(["", "Steps"], [[line.group, str(line.steps)] for line in lines], lines)


def _table(heads: Sequence[str], of: Sequence[Sequence[str]], lines: Sequence[Line]) -> Table:
    body = [tables.Line(words, line.values) for words, line in zip(of, lines, strict=True)]
    return Table(heads, columns_of(SCORES, body), [body])
