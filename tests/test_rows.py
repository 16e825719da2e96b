"""Rows of a run that was stopped and goes on: each once, in every logger that can take one back."""

from __future__ import annotations

import csv
import os
import signal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill import run as run_command
from distill.training.callbacks import Progress

MINE = "+logger.mine._target_=lightning.pytorch.loggers.TensorBoardLogger"
TENSORBOARD = [
    MINE,
    "+logger.mine._partial_=true",
    "+logger.mine.name=mine",
]  # with its own numbers


class At:
    """Calls `act` once, where a run has made so many iterations: as the system sends a signal, at
    any moment.
    """

    def __init__(self, iteration, act):
        self.iteration, self.act = iteration, act

    def __call__(self, progress, trainer, module, *_):
        if module.loop.iteration == self.iteration and self.act:
            act, self.act = self.act, None
            act()


@pytest.fixture
def at(monkeypatch):
    """Have something happen after so many iterations, within the callback that counts them."""

    def call(iteration, act):
        hook, own = At(iteration, act), Progress.on_train_batch_end

        def both(self, *arguments):
            own(self, *arguments)
            hook(self, *arguments)

        monkeypatch.setattr(Progress, "on_train_batch_end", both)

    return call


class Killed(BaseException):
    """Ends a run as SIGKILL does, in so far as nothing is saved."""


def kill():
    raise Killed


@pytest.fixture
def words(pipelines, shards):
    given = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "run_dir=run", "~metrics"]
    few = ["trainer.max_steps=6", "trainer.log_every_n_steps=1", "callbacks.samples.every=100"]
    return ["debug=smoke", *given, *few]


def iterations(folder):
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["iteration"]) for row in csv.DictReader(file) if row["iteration"]]


def scalars(folder, name="iteration"):
    read = EventAccumulator(str(folder))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


@pytest.mark.slow
def test_a_stop_in_the_head_start_loses_and_doubles_no_row(words, command, at, tmp_path):
    at(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    lead = ["loop.head_start=5", "callbacks.checkpoint.every=2"]
    assert command("run", *words, *lead)[0] == 128 + signal.SIGTERM
    assert iterations(tmp_path / "run") == [1, 2, 3]
    assert command("run", "resume=run")[0] == 0
    assert iterations(tmp_path / "run") == list(range(1, 12))
    assert [value for _, value in scalars(tmp_path / "run")] == list(range(1, 12))


@pytest.mark.slow
def test_rows_after_the_checkpoint_are_done_again_once(words, command, at, tmp_path):
    at(5, kill)
    with pytest.raises(Killed):
        command("run", *words, *TENSORBOARD, "callbacks.checkpoint.every=2")
    assert iterations(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert command("run", "resume=run")[0] == 0
    assert iterations(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    expected = [(step, step) for step in range(1, 7)]
    assert scalars(tmp_path / "run") == expected
    (version,) = (tmp_path / "run" / "mine").iterdir()  # not one of its own for every part
    assert scalars(version) == expected


def test_a_checkpoint_comes_after_all_that_is_logged_at_its_step(words, tmp_path, command):
    from distill.config import build

    assert command("run", *words, "trainer.max_steps=1")[0] == 0
    cfg = run_command.compose.read_unchecked(tmp_path / "run")
    mine = {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}
    cfg.callbacks = {"checkpoint": cfg.callbacks.checkpoint, "mine": mine}
    trainer = build.trainer(cfg, tmp_path / "other", {})
    assert [type(c).__name__ for c in trainer.callbacks][-1] == "Checkpoints"


def test_what_is_before_a_checkpoint_is_on_disk_before_it(words, command, at, tmp_path):
    """TensorBoard keeps rows in memory: they are written before the checkpoint is there, after
    which they are lost.
    """
    from distill.training.checkpoints import AtomicIO

    seen = []

    class Stopped(AtomicIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            seen.append(scalars(tmp_path / "run"))
            super().save_checkpoint(checkpoint, path, storage_options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.config.build.AtomicIO", Stopped)
        assert command("run", *words, "callbacks.checkpoint.every=3")[0] == 0
    assert seen == [[(s, s) for s in range(1, n + 1)] for n in (3, 6)]
