"""Going on from another place, with other files, or by another run's checkpoint: what is found,
said and refused.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import tiny
from distill.config import compose, paths
from distill.storage import fingerprints as content
from distill.storage.renames import renamed
from distill.training import resuming
from distill.training.run_metadata import RunMetadata

STEPS = 2


def arguments(model, data, folder, *more, method="ladd"):
    return [
        "debug=smoke",
        f"method={method}",
        f"teacher.path={model}",
        f"data.path={data}",
        "callbacks.samples.every=100",
        "callbacks.checkpoint.every=1",
        f"trainer.max_steps={STEPS}",
        f"run_dir={folder}",
        "~metrics",
        *more,
    ]


def last(err):
    return [line for line in err.splitlines() if line.startswith("distill: ")][-1]


@pytest.fixture(scope="module")
def began(tmp_path_factory, pipelines, shards):
    """A copy of `project` in which a run of two steps has finished, begun by relative paths."""
    folder = tmp_path_factory.mktemp("began") / "project"
    shutil.copytree(pipelines("mmdit"), folder / "models" / "teacher")
    shutil.copytree(shards, folder / "data")
    words = arguments("models/teacher", "data", "runs/ladd")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["distill.run", *words])
        importlib.import_module("distill.run").main()
    return folder.rename(folder.with_name("kept"))


@pytest.fixture
def project(began):
    """A working folder with a teacher and data of its own, under names that are relative to it.

    It is anew in every test, and always at the place where the run of `began` was made.
    """
    folder = began.with_name("project")
    shutil.copytree(began, folder, ignore=shutil.ignore_patterns("runs"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run(project, began, command, monkeypatch):
    """The folder of a finished run of two steps, begun in `project` by relative paths.

    The tests work in `project`; `command`, asked for before, has gone elsewhere.
    """
    monkeypatch.chdir(project)
    shutil.copytree(began / "runs", project / "runs")
    return project / "runs" / "ladd"


def kept_of(folder, step=STEPS):
    return torch.load(folder / "checkpoints" / f"step_{step:06d}.ckpt", weights_only=True)


@pytest.mark.parametrize("other", ["adafactor", "adamw8bit", "prodigy", "schedule_free", "muon"])
def test_a_run_keeps_its_optimizers(other, run, command):
    """Their state is in the checkpoint. A refused command leaves the run as it was."""
    before = (run / "config.yaml").read_bytes()
    code, _, err = command("run", f"resume={run}", f"optimizer={other}", "trainer.max_steps=3")
    assert code == 1
    assert "optimizer.student._target_=" in last(err)
    assert "(was torch.optim.AdamW)" in last(err)
    assert last(err).endswith("would be another run; take that back, or start a new run")
    assert (run / "config.yaml").read_bytes() == before


def test_a_learning_rate_may_change(run, command):
    code, _, err = command(
        "run", f"resume={run}", "optimizer.student.lr=1e-6", "trainer.max_steps=3"
    )
    assert code == 0, err


# -- keys that only the groups of the run have -----------------------------------------------------


@pytest.fixture(scope="module")
def of_other_groups(tmp_path_factory, pipelines, shards):
    """A finished run of two steps, of which hardly a group is the default one."""
    folder = tmp_path_factory.mktemp("groups")
    groups = ("data=synthetic", "data.num_workers=0", "student=lora")
    words = arguments(pipelines("mmdit"), shards, folder / "run", *groups, method="dmd2")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["distill.run", *words])
        importlib.import_module("distill.run").main()
    return folder / "run"


@pytest.fixture
def other(of_other_groups, command, tmp_path):
    return shutil.copytree(of_other_groups, tmp_path / "run")


@pytest.mark.slow
def test_keys_of_the_run_s_own_groups_can_be_given(other, command):
    """The default groups, which Hydra composes, have none of them."""
    words = ["data.max_bad_share=0.5", "optimizer.fake_score.lr=1e-6", "~data.cache_dir"]
    code, _, err = command("run", f"resume={other}", *words, "trainer.max_steps=3")
    assert code == 0, err
    now = OmegaConf.load(other / "config.yaml")
    assert (now.data.max_bad_share, now.data.cache_dir) == (0.5, None)
    assert now.optimizer.fake_score.lr == 1e-6
    assert now.optimizer.fake_score._target_ == "torch.optim.AdamW"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "method.adversarial_weight=1",
            "method.adversarial_weight=1 (was 0.02): would be another run",
        ),
        ("student.rank=3", "student.rank=3 (was 64): would be another run"),
        (
            "data.max_bad_shar=0.5",
            "data.max_bad_shar: no such key (did you mean data.max_bad_share?); config.yaml of the"
            " run has all",
        ),
        ("loop.foo=2", "loop.foo: no such key; config.yaml of the run has all"),
        ("data.max_bad_share=2", "data.max_bad_share=2: must be a share, from 0 to 1"),
        (
            "metrics.guidance=2",
            "metrics.guidance: the run has no metrics; add metrics=..., or leave",
        ),
    ],
)
def test_other_keys_are_refused_by_what_the_run_has(word, said, other, command):
    before = (other / "config.yaml").read_bytes()
    code, _, err = command("run", f"resume={other}", word, "trainer.max_steps=3")
    assert code == 1
    assert said in last(err)
    assert (other / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_each_run_of_a_sweep_may_be_resumed_by_common_keys(other, command, tmp_path):
    second = shutil.copytree(other, tmp_path / "second")
    code, _, err = command("run", "-m", f"resume={other},{second}", "trainer.max_steps=3")
    assert code == 0, err
    for folder in (other, second):
        assert OmegaConf.load(folder / "config.yaml").trainer.max_steps == 3


# -- whose checkpoint it is ------------------------------------------------------------------------


def test_another_method_s_checkpoint_is_refused_by_name(run, project, command):
    other = ["models/teacher", "data", "runs/other", "loop.head_start=0"]
    assert command("run", *arguments(*other, method="consistency"))[0] == 0
    foreign = project / "runs" / "other" / "checkpoints" / "step_000009.ckpt"
    shutil.copy(run / "checkpoints" / "step_000002.ckpt", foreign)
    code, _, err = command("run", f"resume={foreign}", "trainer.max_steps=12")
    assert code == 1
    assert last(err).startswith(f"distill: resume={foreign}: another run made this checkpoint (")
    assert "method._target_=distill.methods.ladd.LADD, here distill.methods.consistency" in err

    # One of before these records is known by its tensors.
    kept = torch.load(foreign, weights_only=True)
    del kept["about"]
    torch.save(kept, foreign)
    code, _, err = command("run", f"resume={foreign}", "trainer.max_steps=12")
    assert code == 1
    assert "is of another method, teacher, student or discriminator: nothing here takes" in err
    assert "heads." in last(err)


def test_a_checkpoint_that_says_nothing_of_itself_is_taken_if_it_fits(run, command):
    kept = kept_of(run)
    del kept["about"]
    torch.save(kept, run / "checkpoints" / "step_000002.ckpt")
    assert command("run", f"resume={run}", "trainer.max_steps=3")[0] == 0
    assert kept_of(run, 3)["global_step"] == 3


def test_another_teacher_s_checkpoint_is_refused(run, project, command):
    other = project / "models" / "other"
    shutil.copytree(project / "models" / "teacher", other)
    shaken(other)
    assert command("run", *arguments("models/other", "data", "runs/other"))[0] == 0
    foreign = run / "checkpoints" / "step_000005.ckpt"
    shutil.copy(project / "runs" / "other" / "checkpoints" / "step_000002.ckpt", foreign)
    code, _, err = command("run", f"resume={run}", "trainer.max_steps=6")
    assert code == 1
    assert f"resume={foreign}: another run made this checkpoint (teacher.path={other}" in last(err)


DAMAGED = [  # where in a checkpoint, what stands there, and what is said
    (("about",), [1], r"has about=\[1\]"),
    (("about", "train_seconds"), "x", "has about.train_seconds=x"),
    (("about", "loggers"), [1], r"has about.loggers=\[1\]"),
    (("distill", "iteration"), "x", "has iteration=x"),
    (("distill", "iteration"), -1, "has iteration=-1"),
    (("distill", "ema"), [1], r"has ema=\[1\]"),
    (("global_step",), "x", "has global_step=x"),
    (("loops",), 5, "has loops=5"),
    (("callbacks",), [5], r"has callbacks=\[5\]"),
    (("optimizer_states",), 3, "has optimizer_states=3"),
    (("pytorch-lightning_version",), 3, "has pytorch-lightning_version=3"),
    (("global_step",), None, "has global_step=None"),
    (("pytorch-lightning_version",), None, "has pytorch-lightning_version=None"),
    (("state_dict",), None, "has state_dict=None"),
    (("distill",), {"iteration": 2}, "its state cannot be loaded"),
    (("distill", "ema"), None, "has ema=None"),
    (("state_dict", "student.model.proj_out.weight"), "x", "its student.model.proj_out.weight is"),
    (("pytorch-lightning_version",), "x", "Invalid version"),
    (("loops",), {"fit_loop": {"epoch_loop.batch_progress": 5}}, "its state cannot be loaded"),
    (("callbacks",), {"Checkpoints": 5}, "its state cannot be loaded"),
    (("optimizer_states",), [{}, {}], "its state cannot be loaded"),
    (("distill", "ema"), {}, "the saved average does not fit"),
]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_in_a_sentence(run, command):
    whole = kept_of(run)
    file = run / "checkpoints" / "step_000002.ckpt"
    for place in (run / "checkpoints").iterdir():
        place.unlink()
    for (*path, last_key), value, said in DAMAGED:
        kept = {key: dict(x) if isinstance(x, dict) else x for key, x in whole.items()}
        here = kept
        for key in path:
            here = here[key]
        here[last_key] = value
        torch.save(kept, file)
        code, _, err = command("run", f"resume={run}", "trainer.max_steps=3")
        assert code == 1, (path, last_key, value)
        assert "Traceback" not in err
        assert re.search(rf"{file}.*{said}", last(err)), (said, last(err))


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_refused_before_training(run, command):
    kept = kept_of(run)
    kept["state_dict"] = {name: x * float("nan") for name, x in kept["state_dict"].items()}
    file = run / "checkpoints" / "step_000002.ckpt"
    torch.save(kept, file)
    before = (run / "metrics.csv").read_bytes()
    # the one before is gone on from, and without it nothing is
    assert command("run", f"resume={run}", "trainer.max_steps=2")[0] == 0
    torch.save(kept, file)
    (run / "checkpoints" / "step_000001.ckpt").unlink()
    code, _, err = command("run", f"resume={run}", "trainer.max_steps=3")
    assert code == 1
    assert re.search(rf"{file}: its student\.\S+ is not a number; name an earlier", last(err))
    assert (run / "metrics.csv").read_bytes().startswith(before[:20])


FACTS = [
    *({"content": content} for content in ([], 3, "x", {"models": [1]}, {"data": "x"})),
    *({"content": {"data": data}} for data in ({"digest": 1}, {"samples": "x"}, [])),
    {"content": {"models": {"teacher.path": [1]}, "data": {"samples": 1, "digest": [1]}}},
    {"train_seconds": "x", "resumed": 3, "began": [1], "content": {"texts": 3}},
    {"train_seconds": float("nan")},
]


@pytest.mark.parametrize("damaged", FACTS)
def test_damaged_facts_are_as_if_they_had_not_been_kept(damaged, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"name": "x", **damaged}), encoding="utf-8")
    record = RunMetadata(tmp_path)
    before, now = (OmegaConf.create({"data": {"path": name}}) for name in ("a", "b"))
    resuming.check_moved(before, now, record.facts)
    resuming.check_data(before, now, record.facts, {"samples": 24, "digest": None})
    record.start("command", "x")
    record.record_inputs({"teacher.path": "1"}, {"samples": 24}, {})
    assert record.facts["content"]["models"] == {"teacher.path": "1"}
    assert record.train_seconds() < 60


def test_a_run_of_damaged_facts_goes_on(run, command):
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    facts |= {"content": {"models": [1], "data": {"digest": 1}}, "train_seconds": "x"}
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    assert command("run", f"resume={run}", "trainer.max_steps=3")[0] == 0


def test_inspect_refuses_a_foreign_checkpoint(run, project, command):
    other = ["models/teacher", "data", "runs/other", "discriminator.heads.kernel=3"]
    assert command("run", *arguments(*other))[0] == 0
    theirs = project / "runs" / "other" / "checkpoints" / "step_000002.ckpt"
    shutil.copy(theirs, run / "checkpoints" / "step_000002.ckpt")
    code, _, err = command("inspect", f"run={run}", "samples=2")
    assert code == 1
    assert "another run made this checkpoint (discriminator.heads.kernel=3, here 1" in last(err)


def shaken(model):
    """Give the pipeline in this folder other weights of the same names and shapes."""
    (file,) = (model / "transformer").glob("*.safetensors")
    save_file({name: x + 0.01 for name, x in load_file(file).items()}, file, {"format": "pt"})


# -- from anywhere ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_used_from_any_folder(run, command, monkeypatch, tmp_path):
    config = OmegaConf.load(run / "config.yaml")
    assert config.teacher.path == str(run.parents[1] / "models" / "teacher")
    assert config.data.path == str(run.parents[1] / "data")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert command("inspect", f"run={run}", "samples=2")[0] == 0
    assert command("export", f"run={run}", "to=delta", "out=delta.safetensors")[0] == 0
    assert command("sample", f"run={run}", "prompt=a red square")[0] == 0
    assert command("run", f"resume={run}", "trainer.max_steps=3")[0] == 0
    assert kept_of(run, 3)["about"]["config"]["teacher"]["path"] == config.teacher.path


@pytest.mark.slow
def test_a_run_of_relative_paths_goes_on_from_where_it_was_begun(run, command):
    config = OmegaConf.load(run / "config.yaml")
    config.teacher.path, config.data.path = "models/teacher", "data"
    OmegaConf.save(config, run / "config.yaml")
    assert command("run", f"resume={run}", "trainer.max_steps=3")[0] == 0
    assert (
        command("run", f"resume={run}", "teacher.path=models/teacher", "trainer.max_steps=4")[0]
        == 0
    )


def test_a_run_that_moved_with_what_it_reads_goes_on(run, project, command, monkeypatch, tmp_path):
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    folder = moved / "runs" / "ladd"
    assert command("export", f"run={folder}", "to=delta", "out=delta.safetensors")[0] == 0
    assert command("run", f"resume={folder}", "trainer.max_steps=3")[0] == 0
    assert OmegaConf.load(folder / "config.yaml").teacher.path == str(moved / "models" / "teacher")


def test_a_copied_run_goes_on_beside_the_first(run, command, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    assert command("run", f"resume={copy}", "trainer.max_steps=3")[0] == 0
    assert (copy / "checkpoints" / "step_000003.ckpt").is_file()
    assert not (run / "checkpoints" / "step_000003.ckpt").exists()


def test_a_model_or_data_that_moved_can_be_named(run, project, command):
    model = (project / "models" / "teacher").rename(project / "models" / "renamed")
    data = (project / "data").rename(project / "renamed")
    code, _, err = command("run", f"resume={run}", "trainer.max_steps=3")
    assert code == 1
    assert "teacher.path=" in last(err)
    named = [f"teacher.path={model}", f"data.path={data}"]
    assert command("run", f"resume={run}", "trainer.max_steps=3", *named)[0] == 0
    assert OmegaConf.load(run / "config.yaml").data.path == str(data)


def test_another_model_or_other_data_are_refused_and_change_nothing(run, project, command):
    model = shutil.copytree(project / "models" / "teacher", project / "models" / "other")
    shaken(model)
    before = (run / "config.yaml").read_bytes()
    code, _, err = command("run", f"resume={run}", "trainer.max_steps=3", f"teacher.path={model}")
    assert code == 1
    assert f"teacher.path={model}: is not the model of this run" in last(err)
    fewer = tiny.write_shards(project / "fewer", count=20)
    code, _, err = command("run", f"resume={run}", "trainer.max_steps=3", f"data.path={fewer}")
    assert code == 1
    assert f"data.path={fewer}: holds 20 samples, and the run started with 24" in last(err)
    assert (run / "config.yaml").read_bytes() == before


def test_data_that_changed_are_said(run, project, command, caplog):
    shutil.rmtree(project / "data")
    tiny.write_shards(project / "data", count=20)
    code, out, err = command("run", f"resume={run}", "trainer.max_steps=3")
    assert code == 0
    said = (
        "holds 20 samples, and the run started with 24: the resumed run will not be bit-identical"
    )
    assert said in out + err + caplog.text


# -- paths -----------------------------------------------------------------------------------------


def test_only_what_lies_here_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "data", "ViT-g-14", "openai"):
        (tmp_path / name).mkdir()
    (tmp_path / "prompts.txt").write_text("a star\n", encoding="utf-8")
    clip = {"_target_": "distill.evaluation.networks.OpenClip", "path": "ViT-g-14"}
    cfg = OmegaConf.create(
        {
            "teacher": {"path": "owner/model", "vae": "data", "config": None},
            "student": {"init": "teacher"},
            "data": {"path": "data/x-{000..003}.tar"},
            "metrics": {"path": "prompts.txt", "prompts": 8, "networks": {"c": clip}},
            "callbacks": {"samples": {"prompts": ["data"]}, "mine": {"dirpath": "made"}},
            "name": "data",
        }
    )
    cfg.metrics.networks.c.pretrained = "openai"
    made = paths.absolute(cfg)
    assert compose.dotted(OmegaConf.to_container(made)) == {
        **compose.dotted(OmegaConf.to_container(made)),
        "teacher.path": "owner/model",
        "teacher.vae": str(tmp_path / "data"),
        "student.init": "teacher",
        "data.path": str(tmp_path / "data" / "x-{000..003}.tar"),
        "metrics.path": str(tmp_path / "prompts.txt"),
        "metrics.networks.c.path": "ViT-g-14",
        "metrics.networks.c.pretrained": "openai",
        "callbacks.samples.prompts": ["data"],
        "callbacks.mine.dirpath": str(tmp_path / "made"),
        "name": "data",
    }
    assert cfg.data.path == "data/x-{000..003}.tar"


def test_a_mark_tells_fine_tunes_apart_and_not_copies(pipelines, tmp_path):
    model = shutil.copytree(pipelines("mmdit"), tmp_path / "one")
    copy = shutil.copytree(model, tmp_path / "two")
    (copy / "README.md").write_text("a card", encoding="utf-8")
    assert content.path_fingerprint(model) == content.path_fingerprint(copy)
    shaken(copy)
    assert content.path_fingerprint(model) != content.path_fingerprint(copy)
    assert content.path_fingerprint(tmp_path / "nowhere") is None


# -- time ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_seconds_of_a_part_that_was_killed_count(run, command):
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert 0 < kept_of(run)["about"]["train_seconds"] <= facts["train_seconds"]
    kept = kept_of(run)
    kept["about"]["train_seconds"] = 1000.0  # of a part that was killed after it
    torch.save(kept, run / "checkpoints" / "step_000002.ckpt")
    assert command("run", f"resume={run}", "trainer.max_steps=3")[0] == 0
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert 1000 < facts["train_seconds"] < 1600


# -- what other commands keep ----------------------------------------------------------------------


def test_cached_latents_are_of_one_teacher_however_it_was_typed(
    project, pipelines, command, monkeypatch, tmp_path
):
    shutil.copytree(pipelines("mmdit") / "vae", project / "vae")
    monkeypatch.chdir(project)
    (project / "prompts.txt").write_text("a red star\na blue disc\n", encoding="utf-8")
    teacher = ["teacher.path=models/teacher", "+teacher.vae=vae"]
    make = ["synthesize", *teacher, "prompts=prompts.txt", "steps=1", "count=4", "per_shard=2"]
    assert command(*make, "out=made")[0] == 0
    (project / "made" / "latents-000001.tar").unlink()
    (project / "made" / "manifest.json").unlink()
    monkeypatch.chdir(tmp_path)
    full = [
        f"teacher.path={project / 'models' / 'teacher'}",
        f"+teacher.vae={project / 'vae'}",
        f"prompts={project / 'prompts.txt'}",
    ]
    again = ["synthesize", *full, "steps=1", "count=4", "per_shard=2", f"out={project / 'made'}"]
    assert command(*again)[0] == 0
    assert (
        json.loads((project / "made" / "manifest.json").read_text(encoding="utf-8"))["samples"] == 4
    )
    run = arguments(project / "models" / "teacher", project / "made", tmp_path / "run")
    assert command("run", *run, f"+teacher.vae={project / 'vae'}")[0] == 0


def test_old_manifests_name_a_teacher_as_it_was_typed():
    assert content.maybe_same_path("models/sd", "/home/me/models/sd")
    assert not content.maybe_same_path("models/sd", "/home/me/models/other-sd")
    assert not content.maybe_same_path("sd", "/home/me/other-sd")
    assert content.maybe_same_path(None, None)
    assert not content.maybe_same_path(None, "/home/me/vae")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("distill.methods.consistency.Consistency", "consistency.ConsistencyDistillation"),
        ("distill.sampling.Consistency", "distill.sampling.Consistency"),
        ("distill.times.Discrete", "distill.core.times.Discrete"),
        ("torch.optim.AdamW", "torch.optim.AdamW"),
    ],
)
def test_a_class_is_found_under_its_name_of_earlier_versions(old, new):
    from hydra.utils import get_class

    found = renamed({"method": {"_target_": old}, "list": [{"_target_": old}]})
    assert found["method"]["_target_"].endswith(new)
    assert found["list"] == [found["method"]]
    assert get_class(found["method"]["_target_"]).__name__ == new.rpartition(".")[2]
