"""A training step that is counted on meta tensors takes what it takes."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.checkpoint import checkpoint

import distill
import families
from distill.config.counting import can_shard
from distill.config.step_memory import of_step
from distill.core.transfers import Later
from distill.data.write import write_shard
from distill.machine.memory import Counter
from distill.machine.meta_device import meta_device

ROOT = Path(__file__).parents[1]
MIB = 2**20
DPO = ("method=dpo", "sampler=guided", "student=lora")


def test_a_checkpointed_pass_under_autocast_is_counted():
    """Ten layers keep ten inputs in bfloat16, ten casts of weights, and one layer's result."""
    x = torch.empty(512, 512, device="meta")
    weights = [torch.empty(512, 512, device="meta", requires_grad=True) for _ in range(10)]
    dtypes = set()

    def layer(x, weight):
        found = F.linear(x, weight)
        dtypes.add(found.dtype)
        return F.silu(found)

    with meta_device("cuda"), Counter("meta") as counter, torch.autocast("meta", torch.bfloat16):
        for weight in weights:
            x = checkpoint(layer, x, weight, use_reentrant=False)
        kept = counter.now
        with torch.autocast("meta", enabled=False):
            x.float().sum().backward()
    assert dtypes == {torch.bfloat16}
    assert kept == (10 + 10) * 512 * 512 * 2
    assert all(weight.grad.dtype == torch.float32 for weight in weights)
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError):  # as torch has it outside
        torch.autocast("meta")


def counted(*words: str):
    settings = distill.compose(*words, "data.batch_size=4", "trainer.precision=32-true")
    return of_step(settings, "cuda")


@pytest.mark.slow
def test_options_that_save_memory_lower_the_count(pipelines):
    plain = counted("method=ladd")
    lora = counted("method=ladd", "student=lora", "student.checkpointing=true")
    small = counted("student=lora", "teacher.quantize=nf4", "loop.optimizer_device=cpu")
    assert plain.held["optimiser states"] == pytest.approx(2 * plain.held["student"], rel=0.06)
    assert lora.within < 0.5 * plain.within
    assert small.held["frozen denoiser"] < 0.3 * lora.held["frozen denoiser"]
    assert small.held["optimiser states"] == 0
    assert small.host > 2 * small.held["student"]
    assert plain.peak == plain.within + sum(plain.held.values())


def test_source_pictures_of_edits_are_counted(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    files = {"source.png": picture.getvalue(), "target.png": picture.getvalue(), "txt": b"go"}
    write_shard(str(tmp_path / "pairs.tar"), [("000000", files)])
    words = ["teacher=shapes_edit", "student=lora", "data.size=64", "~metrics"]
    found = counted(*words, "data=pairs", f"data.path={tmp_path / 'pairs.tar'}")
    assert found.held["batch"] == 2 * 4 * 3 * 64 * 64 * 4
    assert found.within > 0


@pytest.mark.parametrize("side", [8, 16])
def test_losers_of_latents_are_counted_in_their_own_shape(side, tmp_path):
    latents = []
    for seed in range(2):
        np.save(file := io.BytesIO(), np.full((4, side, side), seed, np.float32))
        latents.append(file.getvalue())
    files = {"winner.npy": latents[0], "loser.npy": latents[1], "txt": b"a star"}
    write_shard(str(tmp_path / "pairs.tar"), [("000000", files)])
    found = counted(*DPO, "data=preference", f"data.path={tmp_path / 'pairs.tar'}")
    assert found.held["batch"] == 2 * 4 * 4 * side * side * 4
    assert found.within > 0


def test_losers_of_pictures_are_counted():
    found = counted(*DPO, "data=renders", "data.pairs=true", "data.size=64")
    assert found.held["batch"] == 2 * 4 * 3 * 64 * 64 * 4
    assert found.within > 0


@pytest.mark.slow
def test_a_score_teacher_is_counted(command, pipelines):
    words = ["method=add", f"teacher.path={pipelines('mmdit')}", "score_teacher=shapes_unet"]
    code, out, err = command("doctor", *words, "method.distill_space=pixels")
    assert (code, err) == (0, "")
    assert "activations are not counted" not in out
    assert re.search(r"held between steps, in GB: .*score teacher [\d.]+", out)


def test_a_mask_of_captions_takes_all_of_them(family_folders):
    """Z-Image's pipeline drops the padding, of which meta tensors say nothing."""
    words = families.words_of("zimage", family_folders("zimage"))
    found = counted(*words, "data=renders", "student=lora")
    assert found.within > 0
    with meta_device("cuda"):
        x, mask = (torch.empty(2, 3, 5, device="meta", dtype=d) for d in (torch.float, torch.bool))
        assert x[mask].shape == (30,)
        assert x[mask[..., 0]].shape == (6, 5)
        assert x[0, :2].shape == (2, 5)


@pytest.mark.slow
def test_a_video_is_counted_with_all_its_frames(command, family_folders):
    words = [*families.words_of("wan", family_folders("wan")), "student=lora"]
    within = [counted(*words, f"teacher.frames={n}", "data=renders").within for n in (9, 33)]
    assert within[1] > 2 * within[0]
    code, out, err = command("doctor", *words)
    assert (code, err) == (0, "")
    assert re.search(r"one process .* GB a process, [\d.]+ GB of them within a step", out)


def test_the_reason_for_no_count_is_that_of_the_part(command, pipelines):
    """Not Hydra's sentence about the call that failed."""
    words = ["teacher=sd3", f"teacher.path={pipelines('mmdit')}", "method=nitrofusion"]
    code, out, _ = command("doctor", *words, "discriminator.heads.width=17")
    (line,) = (x for x in out.splitlines() if "activations are not counted" in x)
    assert "not counted: discriminator.heads: width=17 must be a multiple of 16" in line
    assert "Error in call" not in out


@pytest.mark.parametrize(
    "more", ["teacher.quantize=int8", "optimizer=adafactor", "loop.ema_device=cpu"]
)
def test_a_strategy_that_a_run_cannot_have_is_not_counted(more):
    assert can_shard(distill.compose())
    assert not can_shard(distill.compose(more))


def test_the_doctor_has_no_row_for_what_cannot_be_sharded(command, pipelines):
    words = [f"teacher.path={pipelines('mmdit')}", "student=lora", "teacher.quantize=int8"]
    code, out, err = command("doctor", *words)
    assert (code, err) == (0, "")
    assert "one process or trainer=ddp" in out
    assert "fsdp2" not in out.partition("held between")[2]


def test_the_doctor_says_what_a_step_takes(command, pipelines):
    code, out, err = command("doctor", f"teacher.path={pipelines('mmdit')}", "student=lora")
    assert (code, err) == (0, "")
    assert "held between steps, in GB: student " in out
    assert re.search(r"one process .* GB a process, [\d.]+ GB of them within a step", out)
    assert "on top" not in out.partition("these are counts")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["method=ladd", "trainer.precision=bf16-mixed", "student=lora"],
        ["method=dmd2", "trainer.precision=32-true", "student.checkpointing=true"],
    ],
)
def test_the_count_is_within_a_tenth_of_what_was_measured(words):
    script = ROOT / "benchmarks" / "step_memory.py"
    given = ["teacher=shapes", "data.batch_size=4", "data.num_workers=0", *words]
    done = subprocess.run(
        [sys.executable, str(script), *given], capture_output=True, encoding="utf-8", check=True
    )
    found = {}
    for line in done.stdout.splitlines():
        if matched := re.match(r" *(\d+) MiB  (.*)", line):
            found[matched[2]] = int(matched[1])
    measured = found["tensors at the peak"]
    assert found["at the peak, as counted before"] == pytest.approx(measured, rel=0.1)


def test_a_step_is_counted_on_a_machine_with_a_gpu(monkeypatch):
    """There torch has events, but none of tensors without values."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    with meta_device("cuda"):
        assert len(Later(torch.empty(3, device="meta")).read()) == 3
