"""What only a GPU can show: `pytest -m gpu`. All of it takes about a minute.

The same is tested on the CPU, where numbers are the same to the last bit. A GPU adds in another
order from time to time, so runs are compared by how far they have gone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from common import composed, fit, unet_overrides
from diffusers import AutoPipelineForText2Image

import contracts
import tiny
from distill.config import build
from distill.config.models import student_of
from distill.config.step_memory import of_step
from distill.sampling import sampler_of, seeded
from test_contracts import ADAPTERS, MEMORY
from test_export import called, close, opened, pixels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU is what is asked about"),
]
ON_GPU = "trainer.accelerator=gpu"
NEAR = 0.05  # of the way that a student has gone
WORKSPACE = 64 * 2**20  # bytes that kernels ask of the allocator for themselves


@pytest.mark.parametrize("family", ["sdxl", "zimage", "flux2_klein"])
def test_a_resumed_run_ends_where_the_whole_one_does(family, family_folders, tmp_path):
    words = contracts.words_of(family, family_folders(family), *MEMORY[ADAPTERS], ON_GPU)
    whole, again = contracts.resumed(words, tmp_path)
    assert contracts.apart(again, whole) < NEAR
    assert again.step == whole.step == contracts.STEPS
    assert not tiny.same(whole.student, whole.began)
    assert all(x.isfinite().all() for x in whole.student.values())


def test_compiled_blocks_train_as_the_others(family_folders, tmp_path):
    from torch._dynamo.utils import counters

    words = contracts.words_of("zimage", family_folders("zimage"), ON_GPU, *contracts.ROUNDED)
    eager = contracts.train(words, tmp_path / "eager")
    counters.clear()
    compiled = contracts.train([*words, "trainer.compile=blocks"], tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] > 0
    assert contracts.apart(compiled, eager) < NEAR


@pytest.mark.parametrize("option", ["shapes", "shapes_unet"])
def test_an_exported_student_draws_the_same_in_plain_diffusers(
    option, pipelines, shards, command, tmp_path
):
    family = {"shapes": "mmdit", "shapes_unet": "unet"}[option]
    where = [f"teacher.path={pipelines(family)}", f"data.path={shards}", "run_dir=run"]
    run = ["debug=smoke", f"teacher={option}", "data=latents", "student=lora", "~metrics", ON_GPU]
    code, _, err = command("run", *run, *where)
    assert code == 0, err
    code, _, err = command("export", "run=run", "to=diffusers", "out=mine")
    assert code == 0, err
    model = student_of("run").to("cuda")
    with torch.no_grad():
        cond = model.embed([tiny.CAPTIONS[0]])
        draw = sampler_of(model.pipeline)
        x0 = draw(model, cond, seeded([5]), shape=model.latent_shape, steps=1)
        expected = pixels(model, x0).cpu()
    pipeline = opened(AutoPipelineForText2Image, tmp_path / "mine").to("cuda")
    sides = {"height": tiny.SIDE, "width": tiny.SIDE} if family == "mmdit" else {}
    close(called(pipeline, 1, **sides), expected)


def measured(words: list[str]) -> tuple[int, int]:
    """Bytes at the peak of a step: counted, and of the allocator."""
    cfg = composed(words)
    counted = of_step(cfg, "cuda").peak
    before = torch.cuda.memory_allocated()
    source, method = build.build_training(cfg)
    torch.cuda.reset_peak_memory_stats()
    fit(cfg, method, source, 3)
    return counted, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.precision=bf16-mixed", "student=lora", "student.checkpointing=true"],
        ["trainer.precision=32-true"],
    ],
    ids=["lora", "full"],
)
def test_the_count_of_doctor_is_the_allocator_s_peak(words, tmp_path):
    given = [*unet_overrides(tmp_path), "data.batch_size=16", *words]
    counted, peak = measured(given)
    assert counted == pytest.approx(peak, rel=0.1, abs=WORKSPACE)


def test_the_count_of_shapes_is_the_allocator_s_peak():
    words = ["teacher=shapes", "data=renders", "data.batch_size=64", "data.num_workers=0"]
    counted, peak = measured([*words, "~metrics", "method=ladd", "trainer.precision=bf16-mixed"])
    assert counted == pytest.approx(peak, rel=0.1, abs=WORKSPACE)
