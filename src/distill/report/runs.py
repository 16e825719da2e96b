"""Compare finished runs: the keys in which they differ, and scores of each group over seeds."""

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.evaluation import tables
from distill.evaluation.results import FILE, PICTURE, Result, comparable, results_in
from distill.evaluation.statistics import Interval, Sample, mean_interval
from distill.evaluation.tables import MEASURES, TIME, Column, Row, Table, columns_of, rows_of
from distill.report.evaluation import MAIN
from distill.storage.bounded import configuration_of, mapping_of, number_of
from distill.storage.renames import renamed
from distill.storage.safe_paths import check_own
from distill.terminal.shown import in_csv

MOST_SETTINGS = 4  # ours: a name that lists more is not read
# Keys that do not make two runs different settings: paths, logging, and evaluation. `name` and
# `seed` are handled apart.
IGNORED_KEYS = {
    "run_dir",
    "resume",
    "name",
    "seed",
    "hydra",
    "logger",
    "callbacks",
    "metrics",
    "debug",
    "trainer.accelerator",
    "trainer.log_every_n_steps",
}
COSTS = ("train_seconds", "images_seen")
SCORES = [key for key in MEASURES if key != TIME]


@dataclass(frozen=True)
class Run:
    """An evaluated run: its folder, configuration, metadata and rows of scores."""

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    rows: Sequence[Row]
    picture: str = PICTURE  # in samples/, a strip for every row

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The evaluation protocol. It is stored in `config`, since runs may differ in it too."""
        return self.config["judged"]

    @property
    def name(self) -> str:
        return str(self.facts.get("name", self.folder.name))

    @property
    def method(self) -> str:
        return str(self.facts.get("method", "?"))


def read_run(folder: Path) -> Run:
    """The evaluated run in this folder, with its main result.

    Raises ValueError, YAMLError or OSError for a damaged one.
    """
    return _run_of(folder, results_of(folder)[0])


def read_comparable(folders: Sequence[Path]) -> list[Run]:
    """The evaluated runs in these folders, with results by one protocol if all have one in common.

    Main results are preferred. Without a common protocol each run has its main result.
    """
    every = [results_of(folder) for folder in folders]
    for wanted in every[0] if every else ():
        found = [_comparable_result(results, wanted) for results in every]
        chosen = [result for result in found if result is not None]
        if len(chosen) == len(every):
            return [_run_of(folder, result) for folder, result in zip(folders, chosen, strict=True)]
    return [_run_of(folder, results[0]) for folder, results in zip(folders, every, strict=True)]


def _comparable_result(results: Sequence[Result], wanted: Result) -> Result | None:
    alike = (v for v in results if comparable(v["protocol"], wanted["protocol"]))
    return next(alike, None)


def results_of(folder: Path) -> list[Result]:
    """The results of the run in this folder, the main one first. Raises ValueError for damage."""
    for name in (FILE, "config.yaml", "run.json"):
        check_own(folder / name, folder)
    found = results_in({"rows": [], **mapping_of(folder / FILE)})
    for result in found:
        try:
            rows_of(result)
        except ValueError as error:
            raise ValueError(f"{folder / FILE}: {error}") from None
    return found


def _run_of(folder: Path, result: Result) -> Run:
    config = configuration_of(folder / "config.yaml")
    facts = mapping_of(folder / "run.json")
    for key in COSTS:
        number_of(facts, key, str(folder / "run.json"))
    config = {**_plain(renamed(config)), "judged": result["protocol"]}
    return Run(folder, config, facts, rows_of(result), result["picture"])


def _plain(value: Any) -> Any:
    """Values with texts as keys, and dates as texts: an untrusted YAML file may hold any type."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def grouped(runs: Sequence[Run], *, by_name: bool = False) -> dict[str, list[Run]]:
    """Group runs that differ only in their seed, or with `by_name` runs of one `name`.

    The name of a group lists the keys in which it differs from other groups. A method also changes
    its recipe, so runs of different methods are distinguished only by the method. Nodes of
    different classes are distinguished only by the class. If a name would list more than
    MOST_SETTINGS keys, all groups have the folder of their first run as a name.
    """
    groups: dict[str, list[Run]] = {}
    longest = 0
    for run in runs:
        rivals = [other.config for other in runs if other.method == run.method]
        parts = [run.method] if len(rivals) < len(runs) else []
        parts += _settings(run, _keys("", rivals))
        if by_name:
            rivals = [other.config for other in runs if other.name == run.name]
            parts = [run.name, *_settings(run, _keys("judged", rivals))]
        longest = max(longest, len(parts))
        groups.setdefault(", ".join(parts) or run.method, []).append(run)
    by_folder = {found[0].folder.name: found for found in groups.values()}
    short = longest <= MOST_SETTINGS or by_name or len(by_folder) < len(groups)
    return groups if short else by_folder


def _differences(path: str, nodes: Sequence[Any]) -> Iterator[str]:
    """Dotted keys in which the nodes differ."""
    if all(node == nodes[0] for node in nodes):
        return
    maps = [node for node in nodes if isinstance(node, Mapping)]
    if len(maps) < len(nodes) or len({str(node.get("_target_")) for node in maps}) > 1:
        yield path
        return
    for key in dict.fromkeys(key for node in maps for key in node):
        full = f"{path}.{key}" if path else key
        if full not in IGNORED_KEYS:
            yield from _differences(full, [node.get(key) for node in maps])


def _keys(
    path: str, nodes: Sequence[Mapping[str, Any]], ignored: str = "judged.teacher"
) -> list[str]:
    """Dotted keys at this path in which the nodes differ.

    Protocol keys that start with `ignored` are left out, and so are measures that a node lacks.
    """
    found = _differences(path, [node[path] if path else node for node in nodes])
    known = set.intersection(*(set(node["judged"] or ()) for node in nodes))
    return sorted(
        k
        for k in found
        if not k.startswith("judged") or (k[7:] in known and not k.startswith(ignored))
    )


def _settings(run: Run, keys: Sequence[str]) -> list[str]:
    """`key=value` of each dotted key, shortened to its last part if that is unique."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [
        f"{k if ends.count(end) > 1 else end}={_value_text(run.config, k)}"
        for k, end in zip(keys, ends, strict=True)
    ]


def _value_text(config: Mapping[str, Any], key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        return str(value.get("_target_", "...")).rpartition(".")[2]
    return json.dumps(value).replace('"', "") if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Line:
    """Scores of a group's students, or of a teacher, at one number of steps: a value per run.

    `samples` has the same for statistics: a value per seed, and the outcome of every prompt where
    all runs have it. `protocol` is that of the evaluation.
    """

    group: str
    who: str
    steps: int
    values: Mapping[str, Sequence[float]]
    samples: Mapping[str, Sample] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    categories: Sequence[str] = ()  # of every prompt, where all runs have the same

    def mean(self, key: str) -> float:
        return statistics.fmean(self.values[key])

    def interval(self, key: str) -> Interval | None:
        """The 95 % interval of a measure that has outcomes, or is one of the main ones."""
        sample = self.samples.get(key)
        if sample is None or (key not in MAIN and sample.outcomes is None):
            return None
        return mean_interval(sample)

    def formatted(self, key: str, form: str) -> str:
        """Mean, standard deviation and interval; `form` formats a number."""
        return Column(key, key, form).text(self.values.get(key, ()), _ends(self.interval(key)))


def _ends(interval: Interval | None) -> tuple[float, float] | None:
    if interval is None or interval.low is None or interval.high is None:
        return None
    return interval.low, interval.high


def lines_of(groups: Mapping[str, Sequence[Run]]) -> list[Line]:
    """The lines of each teacher, over all runs with it, then those of each group."""
    students = (line for group, runs in groups.items() for line in _lines(group, "student", runs))
    runs, teachers = all_runs(groups), {}
    configs = [{key: run.config.get(key) for key in ("teacher", "judged")} for run in runs]
    keys = _keys("", configs, ignored="judged.student")
    for run in runs:
        teachers.setdefault(", ".join(["teacher", *_settings(run, keys)]), []).append(run)
    return [
        *(line for name, group in teachers.items() for line in _lines(name, "teacher", group)),
        *students,
    ]


def all_runs(groups: Mapping[str, Sequence[Run]]) -> list[Run]:
    return [run for runs in groups.values() for run in runs]


def _lines(group: str, who: str, runs: Sequence[Run]) -> Iterator[Line]:
    for steps in sorted({row.steps for run in runs for row in run.rows if row.who == who}):
        found = [(run, row) for run in runs for row in run.rows]
        found = [(run, row) for run, row in found if (row.who, row.steps) == (who, steps)]
        all_scores = {k: [row.scores[k] for _, row in found if k in row.scores] for k in MEASURES}
        scores = {key: values for key, values in all_scores.items() if values}
        if who == "teacher":  # evaluated by every run on the same prompts: no spread over seeds
            scores = {key: [statistics.fmean(values)] for key, values in scores.items()}
        samples = {key: _sample(key, found, fixed=who == "teacher") for key in scores}
        labels = {tuple(row.categories) for _, row in found}
        categories = labels.pop() if len(labels) == 1 else ()
        yield Line(group, who, steps, scores, samples, found[0][0].protocol, categories)


def _sample(key: str, found: Sequence[tuple[Run, Row]], *, fixed: bool) -> Sample:
    """A measure of these rows, a value for each seed. Runs of one seed count as one, their mean."""
    by_seed: dict[Any, list[Row]] = {}
    for i, (run, row) in enumerate(found):
        seed = run.config.get("seed")
        name = "teacher" if fixed else ("run", i) if seed is None else ("seed", str(seed))
        if key in row.scores:
            by_seed.setdefault(name, []).append(row)
    scores = [statistics.fmean(row.scores[key] for row in rows) for rows in by_seed.values()]
    outcomes = [[row.outcomes.get(key, ()) for row in rows] for rows in by_seed.values()]
    counts = {len(numbers) for seed in outcomes for numbers in seed}
    if len(counts) != 1 or 0 in counts:  # some lack them, or have them of other prompts
        return Sample(scores, None, fixed, tuple(by_seed))
    means = np.array([np.mean(seed, axis=0) for seed in outcomes])
    return Sample(scores, means, fixed, tuple(by_seed))


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


def text_table(lines: Sequence[Line]) -> Table:
    """The table of means, spreads and intervals for compare.md, with the runs of each line."""
    counts = [max(map(len, line.values.values()), default=0) for line in lines]
    labels = [
        [line.group, str(line.steps), str(count) if line.who == "student" else ""]
        for line, count in zip(lines, counts, strict=True)
    ]
    return _table(["", "steps", "runs"], labels, lines)


def page_table(lines: Sequence[Line]) -> Table:
    """The table of means, spreads and intervals for compare.html."""
    return _table(["", "Steps"], [[line.group, str(line.steps)] for line in lines], lines)


def _table(heads: Sequence[str], labels: Sequence[Sequence[str]], lines: Sequence[Line]) -> Table:
    body = [
        tables.Line(names, line.values, {k: _ends(line.interval(k)) for k in line.values})
        for names, line in zip(labels, lines, strict=True)
    ]
    return Table(heads, columns_of(SCORES, body), [body])
