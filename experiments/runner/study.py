"""study.yaml: the jobs of a study, their budget, the tables of its page and its claims."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.config.trust import Loader
from distill.evaluation.tables import MEASURES, steps_text
from distill.storage.bounded import yaml_of

FILE = "study.yaml"
KEYS = {
    "seeds", "overrides", "evaluation", "teacher_steps", "budget", "prepare", "jobs", "tables",
    "claims",
}  # fmt: skip
JOB_KEYS = {"overrides", "about"}
TABLE_KEYS = {"jobs", "steps", "measures", "about"}
CLAIM_KEYS = {"claim", "paper", "a", "b", "measure", "steps", "times", "sign", "table"}
PREPARE_KEYS = {"run", "makes"}
BUDGET_KEYS = {"steps", "minutes"}
NAME = re.compile(r"[\w-][\w.-]*")  # of a job: a folder
TEACHER = "teacher"
MEASURED = ("prompt_accuracy", "frechet", "diversity")


class StudyError(Exception):
    """A mistake of the user, in one sentence."""


@dataclass(frozen=True)
class Job:
    """A setting that is run with every seed."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class TableOf:
    """A table of the page: its jobs by their label in it, numbers of steps (all if empty) and
    measures.
    """

    name: str
    jobs: Mapping[str, str]
    steps: tuple[int, ...]
    measures: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """a - times * b has this sign, in a measure at a number of steps of each."""

    claim: str
    paper: str
    a: str
    b: str
    measure: str
    steps: tuple[int, int]
    times: float
    sign: int
    table: str

    @property
    def tested(self) -> str:
        """The difference in words: `prompts right: a (1 step) minus 0.9 x b (28 steps) > 0`."""
        a, b = (
            f"{name} ({steps_text(steps)})"
            for name, steps in zip((self.a, self.b), self.steps, strict=True)
        )
        factor = "" if self.times == 1 else f"{self.times:g} × "
        sign = ">" if self.sign > 0 else "<"
        return f"{MEASURES[self.measure].name}: {a} minus {factor}{b} {sign} 0"


@dataclass(frozen=True)
class Study:
    folder: Path
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    evaluation: tuple[str, ...]
    teacher_steps: tuple[int, ...]
    minutes: float | None
    prepare: tuple[Mapping[str, str], ...]
    jobs: tuple[Job, ...]
    tables: tuple[TableOf, ...]
    claims: tuple[Claim, ...]

    @property
    def name(self) -> str:
        return self.folder.name

    def arguments(self, job: Job, seed: int) -> list[str]:
        """The overrides of a run. Only the very first also evaluates the teacher: all would get the
        same numbers.
        """
        first = (job, seed) == (self.jobs[0], self.seeds[0])
        steps = ",".join(map(str, self.teacher_steps if first else ()))
        of_teacher = [] if _sets(job.overrides, "metrics.teacher_steps") else [
            f"metrics.teacher_steps=[{steps}]"
        ]  # fmt: skip
        names = [f"name={job.name}", f"seed={seed}"]
        return [*self.overrides, *self.evaluation, *of_teacher, *job.overrides, *names]


def _sets(overrides: Sequence[str], key: str) -> bool:
    return any(word.lstrip("+").partition("=")[0] == key for word in overrides)


def read_study(folder: Path) -> Study:
    """The study in this folder. Raises StudyError for a wrong or missing file."""
    file = folder / FILE
    if not file.is_file():
        raise StudyError(f"{file}: there is no such study; give the name of a folder that has one")
    try:
        found = yaml.load(yaml_of(file), Loader=Loader)  # it refuses a job that is there twice
    except (ValueError, yaml.YAMLError) as error:
        raise StudyError(" ".join(str(error).split())) from None
    where = str(file)
    found = _mapping(found, where, KEYS)
    nodes = found.get("jobs") or {}
    if not isinstance(nodes, dict) or not nodes:
        raise StudyError(f"{where}: jobs: has none; add a name with its overrides")
    jobs = tuple(_job(where, name, node) for name, node in nodes.items())
    budget = _budget(where, found.get("budget"))
    steps = [f"trainer.max_steps={budget['steps']}"] if "steps" in budget else []
    nodes = found.get("tables") or {"results": {}}
    if not isinstance(nodes, dict):
        raise StudyError(f"{where}: tables: must be names with what each has")
    names = [job.name for job in jobs]
    tables = tuple(_table(where, name, node or {}, names) for name, node in nodes.items())
    return Study(
        folder=folder,
        seeds=_numbers(f"{where}: seeds", found.get("seeds", [0, 1, 2])) or (0, 1, 2),
        overrides=(*_texts(f"{where}: overrides", found.get("overrides")), *steps),
        evaluation=_texts(f"{where}: evaluation", found.get("evaluation")),
        teacher_steps=_numbers(f"{where}: teacher_steps", found.get("teacher_steps")),
        minutes=budget.get("minutes"),
        prepare=tuple(_prepared(where, node) for node in found.get("prepare") or ()),
        jobs=jobs,
        tables=tables,
        claims=tuple(_claim(where, node, tables) for node in found.get("claims") or ()),
    )


def _budget(where: str, node: Any) -> dict[str, Any]:
    found = _mapping(node or {}, f"{where}: budget", BUDGET_KEYS)
    for key, value in found.items():
        kind = int if key == "steps" else int | float
        if isinstance(value, bool) or not isinstance(value, kind) or value <= 0:
            raise StudyError(f"{where}: budget.{key}={value}: must be a number above 0")
    return found


def _prepared(where: str, node: Any) -> dict[str, str]:
    found = _mapping(node, f"{where}: prepare", PREPARE_KEYS)
    if missing := sorted(PREPARE_KEYS - found.keys()):
        raise StudyError(f"{where}: prepare: {missing[0]} is missing in {node}")
    return {key: str(value) for key, value in found.items()}


def _texts(where: str, node: Any) -> tuple[str, ...]:
    if not isinstance(node or [], list):
        raise StudyError(f"{where}: must be a list of overrides, key=value")
    return tuple(map(str, node or ()))


def _numbers(where: str, node: Any) -> tuple[int, ...]:
    """Whole numbers from 0, each once: a seed that is there twice is one run."""
    found = node or []
    if not isinstance(found, list) or any(type(n) is not int or n < 0 for n in found):
        raise StudyError(f"{where}: must be a list of whole numbers from 0")
    if len(set(found)) < len(found):
        raise StudyError(f"{where}: has a number twice; leave one out")
    return tuple(found)


def _mapping(found: Any, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise StudyError(f"{where}: must be keys with values")
    if unknown := sorted(map(str, found.keys() - keys)):
        raise StudyError(f"{where}: {unknown[0]}: no such key; there are {', '.join(sorted(keys))}")
    return found


def _job(where: str, name: str, node: Any) -> Job:
    """A job: a list of overrides, or {overrides, about}."""
    if isinstance(node, dict):
        node = _mapping(node, f"{where}: jobs.{name}", JOB_KEYS).get("overrides")
    if str(name) == TEACHER:
        raise StudyError(f"{where}: jobs.{name}: this name means the teacher; choose another")
    if not NAME.fullmatch(str(name)):
        raise StudyError(f"{where}: jobs.{name}: give a name of letters, digits, '_', '-' and '.'")
    return Job(str(name), _texts(f"{where}: jobs.{name}", node))


def _table(where: str, name: str, node: Any, jobs: Sequence[str]) -> TableOf:
    found = _mapping(node, f"{where}: tables.{name}", TABLE_KEYS)
    given = found.get("jobs", list(jobs))
    chosen = given if isinstance(given, dict) else {job: job for job in given}
    if unknown := [job for job in chosen.values() if job not in jobs]:
        raise StudyError(f"{where}: tables.{name}.jobs: there is no job {unknown[0]}")
    measures = tuple(found.get("measures", MEASURED))
    if unknown := [key for key in measures if key not in MEASURES]:
        what = f"no such measure; there are {', '.join(MEASURES)}"
        raise StudyError(f"{where}: tables.{name}.measures: {unknown[0]}: {what}")
    steps = _numbers(f"{where}: tables.{name}.steps", found.get("steps"))
    return TableOf(str(name), chosen, steps, measures)


def _claim(where: str, node: Any, tables: Sequence[TableOf]) -> Claim:
    found = _mapping(node, f"{where}: claims", CLAIM_KEYS)
    if missing := sorted({"claim", "a", "b", "measure"} - found.keys()):
        raise StudyError(f"{where}: claims: {missing[0]} is missing in {found.get('claim', found)}")
    where = f"{where}: claims: {found['claim']}"
    known = {table.name: table for table in tables}
    table = found.get("table", tables[0].name)
    if table not in known:
        raise StudyError(f"{where}: table={table}: there is no such table")
    for side in ("a", "b"):
        if found[side] not in (*known[table].jobs, TEACHER):
            raise StudyError(f"{where}: {side}={found[side]}: there is no such job in its table")
    if found["measure"] not in MEASURES:
        raise StudyError(f"{where}: measure={found['measure']}: there is no such measure")
    steps, times = found.get("steps", 1), found.get("times", 1)
    pair = tuple(steps) if isinstance(steps, list) else (steps, steps)
    numbers = len(pair) == 2 and all(type(n) is int for n in pair)
    if not numbers or found.get("sign", "+") not in ("+", "-"):
        raise StudyError(f"{where}: steps are a number or two, sign is + or -")
    if isinstance(times, bool) or not isinstance(times, int | float) or times <= 0:
        raise StudyError(f"{where}: times={times}: must be a number above 0")
    return Claim(
        claim=str(found["claim"]),
        paper=str(found.get("paper", "")),
        a=str(found["a"]),
        b=str(found["b"]),
        measure=str(found["measure"]),
        steps=pair,
        times=float(times),
        sign=1 if found.get("sign", "+") == "+" else -1,
        table=str(table),
    )
