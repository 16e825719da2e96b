"""The commands as a user types them, on tiny pipelines: what a run leaves behind, and what a
mistake costs.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from omegaconf import OmegaConf
from PIL import Image

import tiny

TEACHERS = {"mmdit": "shapes", "unet": "shapes_unet", "sdxl": "sdxl"}
NO_JUDGE = "~metrics"


@pytest.fixture(scope="module")
def smoke(pipelines, shards, tmp_path_factory):
    """Family -> the folder of a finished `debug=smoke` run."""
    made = {}

    def run(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("runs") / family
            arguments = smoke_arguments(family, pipelines, shards, folder)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder.parent)
                patch.setattr(sys, "argv", ["distill.run", *arguments])
                importlib.import_module("distill.run").main()
            made[family] = folder
        return made[family]

    return run


def smoke_arguments(family, pipelines, shards, folder, *more):
    return [
        "debug=smoke",
        f"teacher={TEACHERS[family]}",
        f"teacher.path={pipelines(family)}",
        f"data.path={shards}",
        f"run_dir={folder}",
        NO_JUDGE,
        *more,
    ]


ADD = ["method=add", "discriminator.features.size=64", "discriminator.condition.text=teacher"]


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        ("mmdit", "consistency"),
        pytest.param("unet", "ancestral", marks=pytest.mark.slow),
        pytest.param("sdxl", "ancestral", marks=pytest.mark.slow),
    ],
)
def test_add_runs_on_every_teacher(family, sampler, command, pipelines, shards, tmp_path):
    folder, eyes = (
        tmp_path / "run",
        [f"discriminator.features.path={tiny.vit()}", "discriminator.condition.image=features"],
    )
    arguments = smoke_arguments(
        family, pipelines, shards, folder, *ADD, *eyes, f"sampler={sampler}"
    )
    assert command("run", *arguments)[0] == 0
    rows = terms_of(folder)
    assert len(rows) == 2
    assert all(
        float(row[name]) > 0 for row in rows for name in ("d/adv", "g/distill", "g/grad_norm")
    )
    assert float(rows[0]["d/r1"]) > 0  # the second has none where the recipe says every fourth
    index = json.loads((folder / "student" / "model_index.json").read_text(encoding="utf-8"))
    scheduler = {"mmdit": "FlowMatchEulerDiscreteScheduler"}.get(
        family, "EulerAncestralDiscreteScheduler"
    )
    assert index["scheduler"] == ["diffusers", scheduler]
    start = tmp_path / "start.png"
    Image.new("RGB", (100, 80), (200, 30, 30)).save(start)
    sample = [f"run={folder}", "prompt=a red square", f"out={tmp_path / 'out'}", f"image={start}"]
    assert command("sample", *sample, "steps=2")[0] == 0
    (made,) = (tmp_path / "out").iterdir()
    assert Image.open(made).text["strength"] == "0.5"
    code, _, err = command("sample", *sample, "steps=1")
    said = "distill: steps=1 strength=0.5: their product must be at least 1; use steps=2"
    assert (code, err.splitlines()[-1]) == (1, said)


def terms_of(folder):
    """Rows of the metrics that hold losses: one a step in a smoke run."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["g/adv"]]


# -- what a run leaves behind ----------------------------------------------------------------------


def test_what_a_run_can_be_without_may_be_left_out(command, pipelines, shards, tmp_path):
    left_out = ["~logger", "~callbacks", "~metrics"]
    few = ["trainer.max_steps=1", "trainer.accelerator=cpu", "data.batch_size=2"]
    given = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "loop.head_start=0"]
    assert command("run", "run_dir=run", *left_out, *few, *given)[0] == 0
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "run.json", "run.log", "report.html", "student"}


def test_smoke_writes_every_file_of_a_run(family, smoke, pipelines):
    folder = smoke(family)
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    expected = {"config.yaml", "run.json", "metrics.csv", "report.html", "student/model_index.json"}
    expected |= {"checkpoints/step_000002.ckpt", "samples/captions.txt"}
    expected |= {f"samples/step_{step:06d}.png" for step in (0, 1, 2)}
    assert expected <= present, expected - present

    config = OmegaConf.load(folder / "config.yaml")
    assert config.teacher.path == str(pipelines(family))
    assert config.trainer.max_steps == 2
    assert config.method._target_ == "distill.methods.ladd.LADD"

    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished"
    assert (facts["steps"], facts["images_seen"], facts["method"]) == (2, 8, "LADD")
    assert facts["teacher"] == {"mmdit": "SD3", "unet": "SD"}[family]
    assert facts["command"].startswith("python -m distill.run debug=smoke")
    assert 0 < facts["train_seconds"] <= facts["wall_seconds"]
    assert {"hardware", "commit", "versions", "started", "name"} <= set(facts)
    assert {"python", "torch", "lightning", "diffusers"} <= set(facts["versions"])

    terms = terms_of(folder)
    assert [int(float(row["step"])) for row in terms] == [1, 2]
    for row in terms:
        assert all(
            np.isfinite(float(row[name]))
            for name in ("d/adv", "g/adv", "d/grad_norm", "g/grad_norm")
        )

    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in report.replace("http://www.w3.org", "")  # self-contained
    kept = torch.load(folder / "checkpoints" / "step_000002.ckpt", weights_only=True)
    assert kept["global_step"] == kept["distill"]["iteration"] == 2


def test_exported_student_of_a_run_is_its_average(family, smoke, teachers):
    from distill.config.models import student_of

    folder = smoke(family)
    average = torch.load(folder / "checkpoints" / "step_000002.ckpt", weights_only=True)["distill"][
        "ema"
    ]
    network = student_of(str(folder)).network
    found = dict(network.named_parameters())
    assert set(found) == set(average)
    for name, value in average.items():
        assert torch.equal(found[name].detach(), value), name
    before = dict(teachers(family).network.named_parameters())
    assert any(not torch.equal(before[name], value) for name, value in found.items())


def test_sample_writes_the_pipeline_s_pixels_and_its_settings(family, smoke, command, tmp_path):
    folder, prompt = smoke(family), tiny.CAPTIONS[3]
    asked = [f"run={folder}", f"prompt='{prompt}'", "seed=7", "count=2", "out=pictures"]
    code, out, _ = command("sample", *asked, "precision=32-true")
    assert code == 0
    paths = [tmp_path / line for line in out.split()]
    assert sorted(paths) == sorted((tmp_path / "pictures").glob("*.png"))
    assert paths.pop().name == "grid.png"
    assert [p.stem.split("_")[-2] for p in paths] == ["seed7", "seed8"]
    pipeline = AutoPipelineForText2Image.from_pretrained(folder / "student", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for seed, path in zip((7, 8), paths, strict=True):
        picture = Image.open(path)
        assert picture.text == {
            "prompt": prompt,
            "seed": str(seed),
            "steps": "1",
            "run": str(folder),
            "precision": "32-true",
        }
        expected = pipeline(
            prompt,
            num_inference_steps=1,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        difference = np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int)
        assert picture.size == (tiny.SIDE, tiny.SIDE)
        assert abs(difference).max() <= 1  # a batch of two rounds differently than one of one
        assert (difference != 0).mean() < 0.01


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(family, smoke, command, pipelines, shards, tmp_path):
    """Two steps, then `resume` to four: the checkpoint of four steps at a stretch, bit by bit."""
    # the cosine is one of all steps, which here change on the way
    constant = "loop.schedule=constant"
    plain = smoke_arguments(
        family, pipelines, shards, tmp_path / "whole", constant, "trainer.max_steps=4"
    )
    assert command("run", *plain)[0] == 0
    first = smoke_arguments(family, pipelines, shards, tmp_path / "parts", constant)
    assert command("run", *first)[0] == 0
    again = [argument for argument in first if not argument.startswith("run_dir")]
    assert command("run", *again, f"resume={tmp_path / 'parts'}", "trainer.max_steps=4")[0] == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "step_000004.ckpt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert one["global_step"] == other["global_step"] == 4
    assert tiny.same(one["state_dict"], other["state_dict"])
    assert tiny.same(one["distill"]["ema"], other["distill"]["ema"])
    assert one["distill"]["images_seen"] == other["distill"]["images_seen"] == 16


@pytest.mark.slow
def test_metrics_of_a_resumed_run_hold_both_parts(command, pipelines, shards, tmp_path):
    first = smoke_arguments("unet", pipelines, shards, tmp_path / "parts")
    assert command("run", *first)[0] == 0
    assert command("run", *first, f"resume={tmp_path / 'parts'}", "trainer.max_steps=4")[0] == 0
    assert [int(float(row["step"])) for row in terms_of(tmp_path / "parts")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_smoke_with_the_judge_writes_its_verdict(command, pipelines, shards, tmp_path):
    arguments = smoke_arguments("mmdit", pipelines, shards, tmp_path / "judged")
    code, out, _ = command("run", *[a for a in arguments if a != NO_JUDGE])
    assert code == 0
    verdict = json.loads((tmp_path / "judged" / "evaluation.json").read_text(encoding="utf-8"))
    found = [(row["who"], row["steps"]) for row in verdict["rows"]]
    assert found == [("teacher", 1), ("teacher", 2), ("student", 1), ("student", 2)]
    assert verdict["protocol"]["prompts"] == 16
    assert all(0 <= row["prompt_accuracy"] <= 1 and row["frechet"] > 0 for row in verdict["rows"])
    assert (tmp_path / "judged" / "samples" / "comparison.png").is_file()
    assert "prompt accuracy" in out

    before = (tmp_path / "judged" / "evaluation.json").read_text(encoding="utf-8")
    assert (
        command(
            "evaluate",
            f"run={tmp_path / 'judged'}",
            "metrics.prompts=16",
            "metrics.student_steps=[1]",
            "metrics.teacher_steps=[1]",
        )[0]
        == 0
    )
    after = json.loads((tmp_path / "judged" / "evaluation.json").read_text(encoding="utf-8"))
    assert json.dumps(after) != before
    accuracy = {(r["who"], r["steps"]): r["prompt_accuracy"] for r in verdict["rows"]}
    for row in after["rows"]:  # the same prompts and seeds, read back from the exported student
        assert row["prompt_accuracy"] == accuracy[row["who"], row["steps"]]


# -- the user's own mistakes -----------------------------------------------------------------------


def mistakes(pipelines, shards, tmp_path):
    """Name -> (command, its arguments, what is said)."""
    nowhere = tmp_path / "nowhere"
    run = ["debug=smoke", NO_JUDGE, f"run_dir={tmp_path / 'run'}", f"data.path={shards}"]
    teacher = f"teacher.path={pipelines('mmdit')}"
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "config.yaml").touch()
    return {
        "no teacher": (
            "run",
            [*run, f"teacher.path={nowhere}"],
            f"teacher.path={nowhere}: no such folder",
        ),
        "teacher of another class": (
            "run",
            [*run, f"teacher.path={pipelines('unet')}"],
            "holds a StableDiffusionPipeline, but this teacher reads a StableDiffusion3Pipeline",
        ),
        "no such shipped model": (
            "run",
            [*run, "teacher.path=shapes:unknown"],
            "nothing of this name is shipped",
        ),
        "no data": ("run", [*run, teacher, f"data.path={nowhere}"], str(nowhere)),
        "run_dir is taken": ("run", [*run, teacher, f"run_dir={taken}"], "holds a run already"),
        "resume from no run": ("run", [*run, teacher, f"resume={nowhere}"], "not a run folder"),
        "resume without a checkpoint": (
            "run",
            [*run, teacher, f"resume={taken}"],
            "has no checkpoint",
        ),
        "a target that is not allowed": (
            "run",
            [*run, teacher, "student._target_=os.getcwd"],
            "os.getcwd is refused",
        ),
        "a hidden target that is not allowed": (
            "run",
            [*run, teacher, "optimizer.student._target_=subprocess.run"],
            "subprocess.run is refused",
        ),
        "an unknown tap": (
            "run",
            [*run, teacher, "discriminator.features.taps=[block9]"],
            "block9",
        ),
        "an unknown schedule": (
            "run",
            [*run, teacher, "loop.schedule=linear"],
            "loop.schedule=linear",
        ),
        "an unknown loss": (
            "run",
            [*run, teacher, "method.loss=square"],
            "method.loss=square: must be hinge or non_saturating or relativistic",
        ),
        "sample of no run": ("sample", [f"run={nowhere}", "prompt=x"], "neither a finished run"),
        "no steps": (
            "sample",
            [f"run={pipelines('mmdit')}", "prompt=x", "steps=0"],
            "steps=0: must be a whole number",
        ),
        "evaluate no run": ("evaluate", [f"run={nowhere}"], "neither a finished run"),
    }


NAMES = (
    "no teacher",
    "teacher of another class",
    "no such shipped model",
    "no data",
    "run_dir is taken",
    "resume from no run",
    "resume without a checkpoint",
    "a target that is not allowed",
    "a hidden target that is not allowed",
    "an unknown tap",
    "an unknown schedule",
    "an unknown loss",
    "sample of no run",
    "no steps",
    "evaluate no run",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_said_in_one_sentence(name, command, pipelines, shards, tmp_path):
    known = mistakes(pipelines, shards, tmp_path)
    assert set(known) == set(NAMES)
    called, arguments, said = known[name]
    code, _, err = command(called, *arguments)
    assert code == 1
    assert said in err
    lines = [line for line in err.splitlines() if line.startswith("distill: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in err


def test_the_whole_error_is_there_for_who_asks(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError, match="neither a finished run"):
        command("sample", f"run={tmp_path / 'nowhere'}", "prompt=x")


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(tmp_path):
    path = tmp_path / "nowhere"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "distill.run",
            "debug=smoke",
            f"teacher.path={path}",
            f"run_dir={tmp_path / 'run'}",
        ],
        cwd=tmp_path,
        env={**os.environ, "HYDRA_FULL_ERROR": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        encoding="utf-8",
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"distill: teacher.path={path}: no such folder" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1
    assert Path(tmp_path / "run" / "student").exists() is False
