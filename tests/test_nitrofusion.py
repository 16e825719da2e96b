"""Whole runs of NitroFusion and of its crosses with the other methods, at the smallest size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from diffusers import AutoPipelineForText2Image

import tiny


@pytest.fixture
def smoke(command, pipelines, shards, tmp_path):
    def run(*arguments, family="mmdit", data=None):
        where = [
            f"teacher.path={pipelines(family)}",
            f"data.path={data or shards}",
            f"run_dir={tmp_path / 'run'}",
        ]
        code, out, err = command(
            "run", *arguments, "debug=smoke", *where, *([] if data else ["~metrics"])
        )
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


@pytest.mark.parametrize("name", tiny.tiered(CROSSES, quick=["nitrofusion"], slow=CROSSES))
def test_a_run_leaves_a_student_for_plain_diffusers(name, smoke):
    folder, _ = smoke(
        *CROSSES[name], family="unet" if "teacher=shapes_unet" in CROSSES[name] else "mmdit"
    )
    pipeline = AutoPipelineForText2Image.from_pretrained(folder / "student", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        tiny.CAPTIONS[0], num_inference_steps=1, guidance_scale=0.0, output_type="pt"
    ).images
    assert picture.shape == (1, 3, 64, 64)
    assert picture.isfinite().all()


@pytest.mark.slow
def test_by_default_it_refines_the_shipped_student(command, tmp_path):
    """With nothing but a length given: the teacher is a few-step model, and evaluated as one."""
    folder = tmp_path / "run"
    code, _, err = command(
        "run", "method=nitrofusion", f"run_dir={folder}",
        "trainer.max_steps=1", "loop.head_start=1", "metrics.prompts=64",
        "metrics.student_steps=[1]", "metrics.teacher_steps=[1]",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert found["protocol"]["teacher sampler"] == "Consistency(levels=None)"
    assert "teacher guidance" not in found["protocol"]
    # a many-step teacher has .01 in one step
    assert all(row["prompt_accuracy"] > 0.7 for row in found["rows"]), found["rows"]


def test_prompts_alone_need_a_teacher_that_samples(command, pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\n", encoding="utf-8")
    where = [f"teacher.path={pipelines('mmdit')}", f"data.path={tmp_path / 'prompts.txt'}"]
    code, out, err = command(
        "run", "method=ladd", "data=prompts", "debug=smoke", "~metrics", *where
    )
    assert code == 1
    assert err.startswith("distill: method.real=null: these data are captions alone, without ")
    assert "set method.real, by which" in err
    assert "loading" not in out  # before weights are read


def test_regression_on_pairs_needs_pairs(teachers):
    method = tiny.nitrofusion(teachers("mmdit"), options={"warm_start": 200})
    batch = replace(tiny.simple_batch(method, 2), noise=None)
    with pytest.raises(ValueError, match="method.pairs_weight needs the noise"):
        method.student_loss(batch, *tiny.drawn(method, batch))
