"""What the doctor says of a machine and of a configuration, and the alarms about a
discriminator.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import psutil
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import tiny
from distill import doctor
from distill.config import counting
from distill.data.shard_job import put_null
from distill.machine import hardware
from distill.storage import locks
from distill.teachers.loading import sizes
from distill.training.callbacks import Alarms, alarm


def test_parameters_are_counted_from_headers(tmp_path, teacher):
    folder = tmp_path / "part"
    folder.mkdir()
    save_file(
        {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16)},
        folder / "model.safetensors",
    )
    save_file(
        {"a": torch.zeros(3, 5)}, folder / "model.fp16.safetensors"
    )  # a variant of the same weights
    assert sizes.parameters(folder) == 22
    part = "transformer" if teacher.pipeline.config.get("transformer") else "unet"
    assert sizes.parameters(teacher.folder / part) == sum(
        p.numel() for p in teacher.network.state_dict().values()
    )


def test_a_healthy_machine_gets_no_fail(command, pipelines):
    code, out, err = command("doctor", f"teacher.path={pipelines('mmdit')}")
    assert err == ""
    lines = out.splitlines()
    assert code == 0
    assert all(line.startswith(("ok ", "warn ")) for line in lines)
    assert any("torchvision" in line and "fits torch" in line for line in lines)
    assert any("trainer=fsdp2" in line for line in lines)
    assert (
        any(line.startswith("warn") and " -> " in line for line in lines)
        or torch.cuda.is_available()
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.accelerator=gpu"], "there is no such GPU here"),
        (
            ["+trainer.strategy=fsdp"],
            "FSDP1 wraps the forward pass of one model; use trainer=fsdp2",
        ),
        (["+trainer.strategy=ddp_find_unused_parameters_true"], "use trainer=ddp"),
    ],
)
def test_what_cannot_work_fails_with_a_remedy(arguments, said, command, pipelines):
    if "gpu" in arguments[0] and torch.cuda.is_available():
        pytest.skip("has a GPU")
    code, out, _ = command("doctor", f"teacher.path={pipelines('mmdit')}", *arguments)
    assert code == 1
    assert said in next(line for line in out.splitlines() if line.startswith("fail"))


def test_a_model_too_large_is_said(command, pipelines, monkeypatch):
    monkeypatch.setattr(hardware, "memory", lambda *_: 1e6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, _ = command("doctor", f"teacher.path={pipelines('mmdit')}")
    assert code == 1
    assert "more devices with trainer=fsdp2" in out


def test_the_default_settings_are_counted(command, pipelines, tmp_path):
    """Encoders, autoencoder and pictures on the way; without the callback there is nothing to
    decode.
    """
    mine = ["teacher=sd15", f"teacher.path={pipelines('unet')}"]
    code, out, _ = command("doctor", *mine)
    assert code == 0
    (line,) = (x for x in out.splitlines() if "held between steps" in x)
    assert re.search(r"student .*, text encoders .*, autoencoder ", line)
    assert "beside steps: decoding pictures of 64x64 " in out
    assert "student with gradient, optimiser and average" not in out  # the count without a step
    assert "no data given: renders of shapes are assumed" in out
    code, out, _ = command("doctor", *mine, "~callbacks.samples")
    assert "decoding" not in out


@pytest.mark.parametrize(
    ("health", "said"),
    [
        ((0.75, 0.8, -0.7), None),
        ((0.99, 1.5, -1.6), "saturated"),
        ((0.5, 0.01, 0.0), "not learning"),
        ((0.3, -0.5, 0.5), "collapsed"),
        ((0.9, 30.0, -3.0), "diverge"),
    ],
)
def test_alarms(health, said):
    assert (alarm(*health) or "") == (alarm(*health) if said else "")
    assert said is None or said in alarm(*health)


def test_an_alarm_is_raised_once_and_in_words(tmp_path, caplog):
    """A discriminator that cannot learn: its rate is zero, and its logits are zero from the
    start.
    """
    toy = tiny.Toy()
    method = tiny.ladd(toy, critic_rate=0.0)
    for head in method.heads.heads.values():
        torch.nn.init.zeros_(head.out.weight)
        torch.nn.init.zeros_(head.out.bias)
    watched = tiny.trainer(tmp_path, 9, Alarms(window=3))
    watched.fit(method, tiny.Stream(toy, 4).loader())
    assert [r.message for r in caplog.records if "not learning" in r.message] == [
        "step 3: the discriminator is not learning (equal real and fake logits): raise"
        " optimizer.discriminator.lr or loop.head_start"
    ]
    (row,) = map(json.loads, (tmp_path / "alarms.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["step"] == 3
    assert "is not learning" in row["alarm"]

    # Killed after more alarms, the run goes on from its checkpoint, and what was said before is not
    # said again.
    watched.save_checkpoint(tmp_path / "killed.ckpt")
    later = json.dumps({"step": 10, "alarm": "of the steps that are done again"})
    with (tmp_path / "alarms.jsonl").open("a", encoding="utf-8") as file:
        file.write(f'{later}\n{{"step": 1')
    again = tiny.trainer(tmp_path, 15, Alarms(window=3))
    loader = tiny.Stream(toy, 4, start=9).loader()
    again.fit(method, loader, ckpt_path=tmp_path / "killed.ckpt", weights_only=True)
    assert [
        json.loads(x) for x in (tmp_path / "alarms.jsonl").read_text(encoding="utf-8").splitlines()
    ] == [row]


LEFT = """
import subprocess, sys, time
code = "import time; print('ready', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", code, "distill.training.rank_process", "run"])
time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="a process whose parent has died")
def test_processes_whose_launcher_is_gone_are_found():
    """By their command, which is that of a worker; one with a launcher that lives is none."""
    command = [sys.executable, "-c", LEFT, "distill"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    assert launcher.stdout.readline() == "ready\n"
    (worker,) = psutil.Process(launcher.pid).children()
    assert worker.pid not in doctor.orphaned()
    launcher.kill()
    launcher.wait()
    assert worker.pid in doctor.orphaned()
    worker.kill()


def test_a_folder_that_is_written_and_one_that_was_left(command, pipelines, tmp_path):
    for name in ("held", "left"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "left" / locks.NAME).write_text("", encoding="utf-8")
    with locks.one_writer(tmp_path / "runs" / "held", "run_dir"):
        _, out, _ = command("doctor", f"teacher.path={pipelines('mmdit')}")
    assert f"warn runs/held is written by process {os.getpid()} on" in out
    assert "ok   runs/left was locked by a killed command; the next one can write there" in out


@pytest.mark.parametrize(
    ("data", "level", "said"),
    [
        ({"num_workers": 0, "batch_size": 4}, "ok", "0 loader workers a process read ahead 0 MB"),
        ({"num_workers": 2, "batch_size": 4, "size": 512}, "ok", "2 loader workers a process read"),
        ({"num_workers": 900, "batch_size": 999, "size": 4096}, "fail", "900 loader workers"),
    ],
)
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_shared_memory_is_held_against_the_workers(data, level, said):
    cfg = OmegaConf.create({"data": data, "trainer": {"devices": 1}})
    ((got, what, remedy),) = doctor.shared_memory(cfg)
    assert (got, said in what) == (level, True), what
    assert remedy.startswith("data.num_workers=0")


@pytest.mark.parametrize(
    ("precision", "accelerator", "width", "expected"),
    [
        ("32-true", "auto", 4, 4),
        ("bf16-mixed", "cpu", 4, 4),
        ("bf16-mixed", "cpu", 2, 2),
        ("bf16-mixed", "auto", 4, 2 if torch.cuda.is_available() else 4),
    ],
)
def test_frozen_weights_are_counted_as_training_holds_them(precision, accelerator, width, expected):
    cfg = OmegaConf.create({"trainer": {"precision": precision, "accelerator": accelerator}})
    assert counting.frozen_width(cfg, width) == expected


@pytest.mark.parametrize("rank", [4, 16])
def test_the_adapters_of_a_lora_are_counted_from_headers(rank, family, pipelines):
    """As many as a student has; and its state, average and gradient by the chosen options."""
    from distill.machine import budget
    from distill.students.lora import lora
    from families import teacher_at

    teacher = teacher_at(pipelines(family))
    part = "transformer" if teacher.part == "transformer" else "unet"
    shapes = sizes.shapes(teacher.folder / part)
    count = budget.adapters(shapes, counting.targets_of(type(teacher)), rank)
    student = lora(teacher, rank=rank)
    assert count == sum(p.numel() for p in student.parameters())


def test_optimizers_and_averages_are_counted_by_their_kind():
    from distill.machine import budget

    ours = "distill.training.optimizers."
    adam = {"_target_": "torch.optim.AdamW", "betas": [0.0, 0.99]}
    assert budget.trained_bytes(adam, {}) == (20, 0)
    assert budget.trained_bytes(adam, {"ema_device": "cpu"}) == (16, 4)
    both = {"ema_device": "cpu", "optimizer_device": "cpu"}
    assert budget.trained_bytes(adam, both) == (8, 20)
    eight = budget.state_bytes({"_target_": f"{ours}adamw8bit"})
    assert 2 < eight < 2.1
    prodigy = {"_target_": f"{ours}prodigy", "betas": [0.0, 0.99], "slice_p": 1}
    assert budget.state_bytes(prodigy) == 12
    assert budget.frozen_bytes(2, "int8") == 1
    assert budget.frozen_bytes(2, "nf4") == 4.5 / 8
    assert budget.frozen_bytes(2, None) == 2


@pytest.mark.slow
def test_latents_in_a_store_are_counted_as_those_of_a_folder(
    command, pipelines, teachers, tmp_path
):
    """Also their embedded captions, with which no text encoder is read."""
    fs, shards = fsspec.filesystem("memory"), tiny.write_shards(tmp_path / "shards")
    mine = ["teacher=sd3", f"teacher.path={pipelines('mmdit')}", "data=latents"]
    mine += ["data.batch_size=2", f"data.cache_dir={tmp_path / 'copies'}"]
    found = {}
    for name in ("plain", "embedded"):
        if name == "embedded":
            put_null(teachers("mmdit"), shards)
        for file in shards.iterdir():
            fs.pipe_file(f"/doctor/{name}/{file.name}", file.read_bytes())
        for path in (shards, f"memory://doctor/{name}"):
            code, out, err = command("doctor", *mine, f"data.path={path}")
            assert code == 0, err
            lines = [line for line in out.splitlines() if "GB" in line and "free" not in line]
            assert found.setdefault(name, lines) == lines
    fs.rm("/doctor", recursive=True)


@pytest.mark.slow
def test_a_folder_of_pictures_and_micro_batches_are_counted(command, pipelines, tmp_path):
    """Only the last micro-batch of an iteration trains; the gradient is within the step."""
    data = tiny.write_pictures(tmp_path / "pictures", 4)
    mine = ["teacher=sd15", f"teacher.path={pipelines('unet')}", "data=images", f"data.path={data}"]
    within = []
    for accumulate in (1, 3):
        code, out, err = command("doctor", *mine, "data.size=64", f"loop.accumulate={accumulate}")
        assert (code, err) == (0, "")
        (line,) = (x for x in out.splitlines() if "one process or" in x)
        within.append(float(re.search(r"([\d.]+) GB of them within a step", line)[1]))
    assert min(within) > max(within) / 2 > 0
