"""What a command leaves behind that fails: nothing before its first step, so that it can be mended and given again."""

from __future__ import annotations

import json

import pytest

MLFLOW = [
    "+logger.mine._target_=lightning.pytorch.loggers.MLFlowLogger",
    "+logger.mine._partial_=true",
]
MONITOR = "+callbacks.mine._target_=lightning.pytorch.callbacks.LearningRateMonitor"
FAILING = [  # a mistake in words, and what is said
    (["+trainer.accumulate_grad_batches=2"], "use optimizer.accumulate="),
    (["+trainer.gradient_clip_val=1.0"], "use optimizer.clip_student="),
    (["+trainer.max_epochs=3"], "use trainer.max_steps="),
    (["trainer.precision=bf16-true"], "trainer.precision=bf16-true: is not supported"),
    (["+trainer.profiler=nope"], "`profiler`"),
    (["~logger", MONITOR], "no logger"),
    ([*MLFLOW], "logger.mine: cannot be made (Requirement 'mlflow"),
    (["+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint"], "ModelCheckpoint"),
    (["callbacks.samples.prompts=nowhere.txt"], "callbacks.samples.prompts=nowhere.txt"),
    (["metrics=prompts", "metrics.path=nowhere.txt"], "metrics.path=nowhere.txt"),
]


@pytest.fixture
def words(pipelines, shards):
    given = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "run_dir=run"]
    return ["debug=smoke", *given, "trainer.max_steps=1", "callbacks.samples.every=100"]


def last(err):
    return [line for line in err.splitlines() if line.startswith("distill: ")][-1]


@pytest.mark.parametrize(("mistake", "said"), FAILING)
def test_a_run_that_cannot_begin_leaves_no_folder(mistake, said, words, command, tmp_path):
    judged = [] if any(word.startswith("metrics") for word in mistake) else ["~metrics"]
    code, _, err = command("run", *words, *judged, *mistake)
    assert code == 1
    assert said in last(err)
    assert not (tmp_path / "run").exists()


def test_the_mended_command_may_have_the_same_folder(words, command, tmp_path):
    assert command("run", *words, "~metrics", "~logger", MONITOR)[0] == 1
    assert command("run", *words, "~metrics")[0] == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert "resumed" not in facts


def test_what_was_there_before_stays(words, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    assert command("run", *words, "~metrics", "~logger", MONITOR)[0] == 1
    assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert command("run", *words, "~metrics")[0] == 0


def test_a_run_that_was_killed_before_its_first_step_is_begun_anew(words, command, tmp_path):
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    killed = {"began": 1.0, "train_seconds": 0.0, "name": "old"}
    (folder / "run.json").write_text(json.dumps(killed), encoding="utf-8")
    (folder / "samples" / "step_000000.png").write_bytes(b"old")
    (folder / "events.out.tfevents.old").write_bytes(b"")
    code, _, err = command("run", *words, "~metrics")
    assert code == 0, err
    assert (folder / "samples" / "step_000000.png").read_bytes() != b"old"
    assert not (folder / "events.out.tfevents.old").exists()
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert "resumed" not in facts
    assert facts["name"] != "old"


def test_a_run_that_made_steps_is_not_written_over(words, command, tmp_path):
    folder = tmp_path / "run"
    few = ["trainer.accelerator=cpu", "data.batch_size=2", "optimizer.head_start=0"]
    bare = ["~metrics", "~callbacks", "~logger"]
    assert command("run", *words[1:-1], *few, *bare)[0] == 0
    before = (folder / "config.yaml").read_bytes()
    code, _, err = command("run", *words, "~metrics", "seed=3")
    assert code == 1
    assert "holds a run already; choose another run_dir= or remove it" in last(err)
    assert (folder / "config.yaml").read_bytes() == before
