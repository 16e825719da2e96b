"""What a command leaves behind that fails: nothing before its first step, so that it can be mended
and given again.
"""

from __future__ import annotations

import importlib.util
import json

import pytest

from distill.training import run_folders as folders

WANDB = [
    "+logger.mine._target_=lightning.pytorch.loggers.WandbLogger",
    "+logger.mine._partial_=true",
]
MONITOR = "+callbacks.mine._target_=lightning.pytorch.callbacks.LearningRateMonitor"
FAILING = [  # a mistake in words, and what is said
    (["+trainer.accumulate_grad_batches=2"], "use loop.accumulate="),
    (["+trainer.gradient_clip_val=1.0"], "use loop.clip_student="),
    (["+trainer.max_epochs=3"], "use trainer.max_steps="),
    (["trainer.precision=bf16-true"], "trainer.precision=bf16-true: is not supported"),
    (["+trainer.profiler=nope"], "`profiler`"),
    (["~logger", MONITOR], "no logger"),
    ([*WANDB], "logger.mine: the package wandb is not installed; pip install"),
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
def test_a_run_that_cannot_begin_leaves_no_folder(
    mistake, said, words, command, tmp_path, monkeypatch
):
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "wandb" else own(n, *a)
    )
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
    code, _, err = command("run", *words, "~metrics")
    assert code == 1
    assert "run_dir=run: is not empty (it has notes.txt)" in last(err)
    assert (tmp_path / "run" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    (tmp_path / "run" / "notes.txt").rename(tmp_path / "notes.txt")
    assert command("run", *words, "~metrics")[0] == 0


@pytest.mark.parametrize("names", [("student/x.txt", "report.html", "metrics.csv"), ("run.log",)])
def test_a_folder_of_anybodys_is_not_taken_over(names, words, command, tmp_path):
    folder = tmp_path / "run"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
    code, _, err = command("run", *words, "~metrics", "~logger", MONITOR)
    assert code == 1
    assert "run_dir=run: is not empty" in last(err)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == len(names)
    assert {path.read_text(encoding="utf-8") for path in files} == {"mine"}


def test_what_others_put_there_outlives_a_run_that_came_to_nothing(tmp_path):
    folder = tmp_path / "run"
    for name in ("samples/mine.png", "notes.txt", "processes/0.log", "run.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    for name in ("samples/step_000000.png", "config.yaml", "wandb/a/b", "samples/captions.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x", encoding="utf-8")
    (folder / "checkpoints").mkdir()
    with folders.kept_if_filled(folder):
        folders.undone(folder, {"run.log"}, crashed=False)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"samples/mine.png", "notes.txt", "run.log"}
    (folder / "notes.txt").unlink()
    (folder / "samples" / "mine.png").unlink()
    with folders.kept_if_filled(folder):
        folders.undone(folder, set(), crashed=False)
        assert list(folder.iterdir()) == []
    assert not folder.exists()


def test_the_log_of_a_crash_is_ours_and_another_is_not(tmp_path):
    (tmp_path / "processes").mkdir()
    log = tmp_path / "run.log"
    log.write_text("== 2026-01-31 12:00:00+00:00 python -m distill.run seed=1\n", encoding="utf-8")
    assert folders.foreign(tmp_path) == []
    log.write_text("my notes\n", encoding="utf-8")
    assert folders.foreign(tmp_path) == ["processes", "run.log"]


@pytest.mark.slow
def test_a_run_that_goes_on_has_one_folder(words, command, tmp_path):
    assert command("run", *words, "~metrics")[0] == 0
    code, _, err = command("run", "resume=run", "run_dir=other", "trainer.max_steps=2")
    assert code == 1
    assert "run_dir=other: resume=run continues in its own folder; leave run_dir= out" in last(err)
    assert not (tmp_path / "other").exists()
    assert command("run", *words, "~metrics", "resume=run", "trainer.max_steps=2")[0] == 0


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
    few = ["trainer.accelerator=cpu", "data.batch_size=2", "loop.head_start=0"]
    bare = ["~metrics", "~callbacks", "~logger"]
    assert command("run", *words[1:-1], *few, *bare)[0] == 0
    before = (folder / "config.yaml").read_bytes()
    code, _, err = command("run", *words, "~metrics", "seed=3")
    assert code == 1
    assert "holds a run already; choose another run_dir= or remove it" in last(err)
    assert (folder / "config.yaml").read_bytes() == before


# -- other commands --------------------------------------------------------------------------------


def test_a_judging_that_cannot_begin_leaves_nothing(pipelines, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\na disc\na ring\na box\n", encoding="utf-8")
    judged = ["metrics=prompts", "metrics.path=prompts.txt", "metrics.measures=[clip_score]"]
    broken = [
        "metrics.networks.clip_g.path=ViT-B-32",
        "metrics.networks.clip_g.pretrained=nowhere.pt",
    ]
    given = [f"run={pipelines('mmdit')}", "steps=1", "out=judged"]
    code, _, err = command("evaluate", *given, *judged, *broken)
    assert code == 1
    assert "metrics.networks" in last(err)
    assert not (tmp_path / "judged").exists()


def test_pictures_are_not_drawn_for_a_file(pipelines, command, tmp_path):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    code, out, err = command("sample", f"run={pipelines('mmdit')}", "prompt=a star", "out=taken")
    assert code == 1
    assert last(err).startswith("distill: out=taken: is a file")


def test_shards_that_cannot_be_made_leave_nothing(pipelines, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a star\n", encoding="utf-8")
    teacher = f"teacher.path={pipelines('mmdit')}"
    given = [teacher, "prompts=prompts.txt", "out=made", "teacher.weights=weights.safetensors"]
    (tmp_path / "weights.safetensors").write_bytes(b"no weights")
    code, _, _ = command("synthesize", *given)
    assert code == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_a_search_is_mended_where_no_trial_was_measured(words, command, tmp_path):
    pytest.importorskip("optuna")
    rate = "space=['optimizer.student.lr=log(1e-6,1e-4)']"
    run = [word for word in words if not word.startswith("run_dir")] + ["~metrics"]
    given = ["metric=g/adv", "trials=1", "out=found"]

    def called(run, space=rate):
        text = json.dumps(run).replace(" ", "")
        return command("search", space, f"run={text}", *given)

    assert called(["method=nope"])[0] == 1
    assert not (tmp_path / "found").exists()
    assert called([*run, "data.path=nowhere"])[0] == 1  # composes, and is refused when it begins
    code, _, err = called(run, "space=['optimizer.student.lr=log(1e-5,1e-3)']")
    assert code == 0, err
    assert (tmp_path / "found" / "trials.csv").is_file()


def test_a_pretraining_is_mended_where_a_stage_made_nothing(command, shards, tmp_path):
    given = ["out=made", "stages=[data]", "data.size=32"]
    assert command("pretrain", *given, f"data.path={shards}")[0] == 1  # latents, and no pictures
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for i in range(260):
        Image.new("RGB", (40, 40), (i % 256, 0, 0)).save(tmp_path / "photos" / f"{i:03d}.png")
        (tmp_path / "photos" / f"{i:03d}.txt").write_text(f"red {i}", encoding="utf-8")
    few = ["data.path=photos", "data.count=256"]
    (tmp_path / "made").mkdir(exist_ok=True)
    code, _, err = command("pretrain", *given, *few)
    asked = json.loads((tmp_path / "made" / "pretraining.json").read_text(encoding="utf-8"))
    assert asked["stages"]["data"]["settings"]["data.path"] == str(tmp_path / "photos"), err
