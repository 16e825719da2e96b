"""Scores along a run: a row at each step that is due, and a training that is not touched."""

from __future__ import annotations

import csv
import json
import shutil
import time

import pytest
from safetensors.torch import load_file

from distill.evaluation.shapes import Shapes

STEPS = 4
WORDS = [
    "method=ladd", "teacher=shapes_small", "trainer.accelerator=cpu", "data.batch_size=2",
    "data.limit=16", "loop.head_start=1", f"trainer.max_steps={STEPS}", "metrics.prompts=8",
    "metrics.student_steps=[1]", "metrics.teacher_steps=[]", "callbacks.samples.every=1000",
    "callbacks.checkpoint.every=2",
]  # fmt: skip
SCORED = ["callbacks.scores.every=2", "callbacks.scores.prompts=8"]


def rows_of(folder):
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def weights(folder):
    return load_file(folder / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_scores_along_a_run_leave_the_training_alone_and_are_resumed(command, tmp_path):
    plain, scored, cut = (tmp_path / name for name in ("plain", "scored", "cut"))
    assert command("run", *WORDS, f"run_dir={plain}")[0] == 0
    code, _, err = command("run", *WORDS, *SCORED, f"run_dir={scored}")
    assert code == 0, err
    assert not (plain / "scores.csv").exists()
    rows = rows_of(scored)
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    assert [int(row["images_seen"]) for row in rows] == [0, 6, 10]  # with the head start
    seconds = [float(row["train_seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    # The last row is of the student that the run has saved and evaluated, by as many prompts.
    (last,) = json.loads((scored / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    for key in ("prompt_accuracy", "frechet", "diversity"):
        assert float(rows[-1][key]) == pytest.approx(last[key], rel=1e-6)
    after, before = weights(scored), weights(plain)
    assert all(after[name].equal(before[name]) for name in before)
    assert not list(scored.glob(".scores-*"))
    # Gone on from the checkpoint at step 2: the row of step 4 is made again, and none stands twice.
    shutil.copytree(scored, cut)
    shutil.rmtree(cut / "student")
    (cut / "evaluation.json").unlink()
    newest = max((cut / "checkpoints").glob("*.ckpt"), key=lambda path: path.name)
    newest.unlink()
    code, _, err = command("run", f"resume={cut}")
    assert code == 0, err
    again = rows_of(cut)
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    assert [row["frechet"] for row in again] == [row["frechet"] for row in rows]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (
            ["callbacks.scores.every=2", "~metrics"],
            "callbacks.scores.every=2: this run has no metr",
        ),
        (["callbacks.scores.every=2", "trainer=fsdp2", "trainer.devices=1"], "shards the student"),
        (["callbacks.scores.every=-1"], "callbacks.scores.every=-1"),
        (["callbacks.scores.prompts=4"], "callbacks.scores.prompts=4"),
        (["callbacks.scores.steps=0"], "callbacks.scores.steps=0"),
    ],
)
def test_scores_that_cannot_be_had_are_refused_before_anything_is_written(
    command, tmp_path, words, what
):
    given = [word for word in WORDS if "metrics" not in word or "~metrics" not in words]
    code, _, err = command("run", *given, *words, f"run_dir={tmp_path / 'run'}")
    assert code == 1
    assert what in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_time_of_scores_is_not_training_time(command, tmp_path, monkeypatch):
    """A protocol that takes long does not move the curve."""
    score, slept = Shapes.__call__, 4.0

    def slow(self, student, teacher, folder, sampler=None):
        if folder.name.startswith(".scores-"):
            time.sleep(slept)
        return score(self, student, teacher, folder, sampler)

    monkeypatch.setattr(Shapes, "__call__", slow)
    start = time.monotonic()
    assert command("run", *WORDS, *SCORED, f"run_dir={tmp_path / 'run'}")[0] == 0
    took = time.monotonic() - start
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["train_seconds"] < took - 3 * slept
