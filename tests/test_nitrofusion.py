"""Whole runs of NitroFusion, of its crosses with the other methods, and of its experiments at the smallest size."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from safetensors.torch import save_file

import tiny


@pytest.fixture
def smoke(command, pipelines, shards, tmp_path):
    def run(*arguments, family="mmdit", data=None):
        where = [f"teacher.path={pipelines(family)}", f"data.path={data or shards}", f"run_dir={tmp_path / 'run'}"]
        code, out, err = command("run", *arguments, "debug=smoke", *where, *([] if data else ["~metrics"]))
        assert code == 0, err
        return tmp_path / "run", out

    return run


CROSSES = {
    "nitrofusion": ["method=nitrofusion"],
    "on a unet": ["method=nitrofusion", "teacher=shapes_unet"],
    "with plain heads": ["method=nitrofusion", "discriminator=teacher_features"],
    "with plain heads for its tasks": [
        "method=nitrofusion",
        "discriminator=teacher_features",
        "discriminator.features.taps=encoder",
        "discriminator.features.tasks=[global,local,local_null]",
    ],
    "ladd with the pool": ["method=ladd", "discriminator=pool"],
}


FAST = ("nitrofusion", "ladd with the pool")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CROSSES])
def test_a_run_leaves_a_student_for_plain_diffusers(name, smoke):
    folder, _ = smoke(*CROSSES[name], family="unet" if "teacher=shapes_unet" in CROSSES[name] else "mmdit")
    pipeline = AutoPipelineForText2Image.from_pretrained(folder / "student", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(tiny.CAPTIONS[0], num_inference_steps=1, guidance_scale=0.0, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)
    assert picture.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["nitrosd_realism", "nitrosd_vibrant"])
def test_experiments_run_two_steps_from_prompts(experiment, smoke, teachers, tmp_path):
    """The whole of it but for size: few-step weights put on SDXL, samples made from prompts, shift, accumulation."""
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:8]))
    torch.save(teachers("sdxl").network.model.state_dict(), tmp_path / "few.bin")
    own = [f"experiment={experiment}", f"teacher.weights={tmp_path / 'few.bin'}", "teacher.dtype=float32"]
    folder, _ = smoke(*own, "optimizer.accumulate=2", family="sdxl", data=tmp_path / "prompts.txt")
    scheduler = json.loads((folder / "student" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shifted_timestep"] == (250 if experiment == "nitrosd_realism" else 500)
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_few_step_teacher_is_all_it_needs(smoke, teachers, tmp_path):
    save_file(teachers("mmdit").network.model.state_dict(), tmp_path / "few.safetensors")
    folder, _ = smoke("experiment=nitrofusion_few_step", f"teacher.weights={tmp_path / 'few.safetensors'}")
    assert (folder / "student" / "model_index.json").is_file()


def test_prompts_alone_need_a_teacher_that_samples(command, pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    where = [f"teacher.path={pipelines('mmdit')}", f"data.path={tmp_path / 'prompts.txt'}"]
    code, _, err = command("run", "method=ladd", "data=prompts", "debug=smoke", "~metrics", *where)
    assert code == 1
    assert "distill: these data are captions alone: set method.real" in err
