"""Scores of the student along the run, for curves of quality against training time and pictures."""

import csv
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from distill.evaluation.results import SCORES
from distill.evaluation.tables import MEASURES, TIME
from distill.methods.base import Distillation
from distill.storage.atomic import write_atomic
from distill.training.run_metadata import RunMetadata
from distill.training.trackers import logged

COUNTS = ("step", "images_seen", "train_seconds")
COLUMNS = (*COUNTS, *(key for key in MEASURES if key != TIME))
FEWEST = 8  # prompts; the distances need more samples than neighbours


class Scores(L.Callback):
    """Evaluates the EMA student every `every` steps by the run's protocol, with few prompts.

    Each evaluation is a row of `scores.csv`. Its time does not count as training time. It draws no
    random number of the training, so the trained student is the same with and without it.

    Args:
        every: student steps between evaluations; 0: none. The first is before step 1, and one is
            after the last step.
        prompts: the first ones of the protocol's.
        steps: the student's number of steps.
    """

    def __init__(self, every: int = 0, prompts: int = 100, steps: int = 1):
        given = {"every": (every, 0), "prompts": (prompts, FEWEST), "steps": (steps, 1)}
        for key, (value, least) in given.items():
            if type(value) is not int or value < least:
                raise ValueError(
                    f"callbacks.scores.{key}={value}: must be a whole number of at least {least}"
                )
        self.every, self.prompts, self.steps = every, prompts, steps
        self.protocol: Any = None  # the run's; set where the run is built
        self.sampler: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        """Keep the rows up to the resumed checkpoint, or score the student before its first
        step.
        """
        if not self.every or not trainer.is_global_zero:
            return
        self.path = Path(trainer.default_root_dir) / SCORES
        rows = [row for row in _rows_in(self.path) if _step_of(row) <= pl_module.step]
        if pl_module.step == 0:
            rows = []
        write_atomic(self.path, _as_csv([list(COLUMNS), *rows]).encode())
        if pl_module.step == 0:
            self._score(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Distillation, *_: Any) -> None:
        is_due = self.every and pl_module.loop.due(self.every, trainer.max_steps)
        if is_due and trainer.is_global_zero:
            self._score(trainer, pl_module)

    @torch.no_grad()
    def _score(self, trainer: L.Trainer, pl_module: Distillation) -> None:
        folder, start = Path(trainer.default_root_dir), time.time()
        counts = {
            "step": pl_module.step,
            "images_seen": pl_module.loop.images_seen,
            "train_seconds": RunMetadata(folder).train_seconds() or 0.0,
        }
        protocol = few_prompts(self.protocol, self.prompts, self.steps)
        place = tempfile.TemporaryDirectory(prefix=".scores-", dir=folder)
        with place as name, pl_module.ema.swap():
            found = protocol(pl_module.student, pl_module.teacher, Path(name), self.sampler)
        pl_module.teacher.release()  # text encoders that were loaded for this alone
        (row,) = (row for row in found if row["who"] == "student")
        self._write({**row, **counts})
        logged.scores(trainer.loggers, row, pl_module.step, "scores")
        RunMetadata(folder).pause(time.time() - start)

    def _write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("ab", buffering=0) as file:
            file.write(_as_csv([[row.get(name, "") for name in COLUMNS]]).encode())


def few_prompts(protocol: Any, prompts: int, steps: int) -> Any:
    """The protocol for the student alone in `steps` steps, with so many prompts where it has that
    setting.
    """
    wanted = {"prompts": prompts, "student_steps": [steps], "teacher_steps": []}
    known = {field.name for field in fields(protocol)} if is_dataclass(protocol) else set()
    return replace(protocol, **{key: value for key, value in wanted.items() if key in known})


def _rows_in(path: Path) -> list[list[str]]:
    """The complete rows of the file, without its header; [] if there is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    complete = [line for line in lines[1:] if line.endswith("\n")]
    return [row for row in csv.reader(complete) if len(row) == len(COLUMNS)]


def _step_of(row: Sequence[str]) -> float:
    try:
        return float(row[0])
    except ValueError:  # damaged: left out
        return float("inf")


def _as_csv(rows: Sequence[Sequence[Any]]) -> str:
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(rows)
    return text.getvalue()
