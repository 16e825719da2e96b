"""Runs that are killed, told to stop, or find a damaged checkpoint, and go on as if nothing had
happened.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import tiny
from distill.config import compose
from distill.storage import checkpoint_files

STEPS = 12


def arguments(pipelines, shards, folder, workers=0, method="ladd"):
    return [
        "debug=smoke",
        f"method={method}",
        *([f"discriminator.features.path={tiny.vit()}"] if method == "add" else []),
        f"teacher.path={pipelines('mmdit')}",
        f"data.path={shards}",
        f"data.num_workers={workers}",
        f"trainer.max_steps={STEPS}",
        "callbacks.checkpoint.every=1",
        *(["loop.head_start=2"] if method != "consistency" else []),
        "callbacks.samples.every=100",
        f"run_dir={folder}",
        "~metrics",
    ]


def end_of(folder):
    kept = torch.load(folder / "checkpoints" / f"step_{STEPS:06d}.ckpt", weights_only=True)
    moments = {
        f"{i}.{k}.{name}": torch.as_tensor(value)
        for i, optimizer in enumerate(kept["optimizer_states"])
        for k, state in optimizer["state"].items()
        for name, value in state.items()
    }
    return {
        **kept["state_dict"],
        **moments,
        **{f"ema.{k}": v for k, v in kept["distill"]["ema"].items()},
    }


@pytest.mark.parametrize(
    ("method", "workers"),
    tiny.tiered(
        [
            ("ladd", 0),
            ("ladd", 2),
            *((m, 0) for m in ("add", "nitrofusion", "consistency", "dmd2")),
        ],
        slow=[("ladd", 0)],
    ),
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(
    method, workers, forks, pipelines, shards, tmp_path
):
    """SIGKILL at random moments, once while a checkpoint is being written; no part of a file may
    pass for a whole.
    """
    whole = arguments(pipelines, shards, tmp_path / "whole", workers, method)
    assert forks.command("run", whole, folder=tmp_path).wait(timeout=300) == 0
    chance = random.Random(7 + workers)
    command, checkpoints = (
        arguments(pipelines, shards, tmp_path / "parts", workers, method),
        tmp_path / "parts" / "checkpoints",
    )
    for kill in ("while writing", "at random", "at random"):
        process = forks.command("run", command, folder=tmp_path)
        had = set(checkpoints.glob("step_*.ckpt"))
        wait = chance.uniform(0.0, 0.4)
        while process.poll() is None:  # once it has got further, so that every part counts
            if kill == "while writing" and had and list(checkpoints.glob("*.part")):
                break
            had |= set(checkpoints.glob("step_*.ckpt")) if kill == "while writing" else set()
            if kill == "at random" and set(checkpoints.glob("step_*.ckpt")) - had:
                time.sleep(wait)
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        command = [
            *[c for c in command if not c.startswith(("run_dir", "resume"))],
            f"resume={tmp_path / 'parts'}",
        ]
    assert forks.command("run", command, folder=tmp_path).wait(timeout=300) == 0
    assert tiny.same(end_of(tmp_path / "parts"), end_of(tmp_path / "whole"))
    assert not list(checkpoints.glob("*.part"))


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)]


@pytest.mark.parametrize(("number", "code"), tiny.tiered(SIGNALS, quick=SIGNALS[:1], slow=SIGNALS))
def test_told_to_stop_it_saves_says_how_to_go_on_and_does(
    number, code, command, monkeypatch, pipelines, shards, finished, tmp_path
):
    from distill.training.callbacks import Alarms

    asked = []
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    slurm = SimpleNamespace(run=lambda arguments, **_: asked.append(arguments))
    monkeypatch.setattr("distill.machine.signals.subprocess", slurm)

    def tell(self, trainer, pl_module, *_):
        if pl_module.step == 3:
            os.kill(os.getpid(), number)

    common = [a for a in arguments(pipelines, shards, tmp_path / "parts") if "every=1" not in a]
    with monkeypatch.context() as patch:
        patch.setattr(Alarms, "on_train_batch_start", tell, raising=False)
        before = signal.getsignal(number)
        stopped, out, err = command("run", *common)
    assert (stopped, signal.getsignal(number)) == (code, before)
    assert (
        f"stopped by {number.name} at step 4; go on with: python -m distill.run"
        f" resume={tmp_path / 'parts'}" in out
    )
    assert "Traceback" not in err
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step_000004.ckpt"]
    assert [a for a in asked if a[0] == "scontrol"] == (
        [["scontrol", "requeue", "17"]] if code == 0 else []
    )
    assert (
        command("run", f"resume={tmp_path / 'parts'}")[0] == 0
    )  # and nothing else: the run knows what it is
    assert tiny.same(end_of(tmp_path / "parts"), end_of(finished))


@pytest.mark.slow
def test_checkpoints_rotate_keep_an_archive_and_the_best(command, pipelines, shards, tmp_path):
    rules = ["callbacks.checkpoint.archive=5", "callbacks.checkpoint.best=g/grad_norm"]
    assert command("run", *arguments(pipelines, shards, tmp_path / "run"), *rules)[0] == 0
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["best.ckpt", *(f"step_{n:06d}.ckpt" for n in (5, 10, 11, 12))]
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8") as file:
        import csv

        norms = {
            int(float(r["step"])): float(r["g/grad_norm"])
            for r in csv.DictReader(file)
            if r["g/grad_norm"]
        }
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == min(norms, key=norms.get)
    assert best["about"]["config"]["trainer"]["max_steps"] == STEPS
    assert "torch" in best["about"]["versions"]
    assert not any(name.startswith("teacher") for name in best["state_dict"])


@pytest.mark.slow
def test_a_branch_that_is_abandoned_is_set_aside(command, pipelines, shards, tmp_path):
    """Gone on from an earlier checkpoint and stopped early, the run goes on from its own newest
    one.
    """
    folder, rules = (
        tmp_path / "run",
        ["trainer.max_steps=4", "callbacks.samples.every=1", "callbacks.checkpoint.keep=0"],
    )
    assert command("run", *arguments(pipelines, shards, folder), *rules)[0] == 0
    was = {
        name: (folder / name).read_bytes()
        for name in ("checkpoints/step_000004.ckpt", "samples/step_000004.png")
    }
    for _ in range(2):  # and again: nothing is written over
        code, out, _ = command(
            "run", f"resume={folder}/checkpoints/step_000002.ckpt", "trainer.max_steps=3"
        )
        assert code == 0
        assert "resuming from step 2: " in out
        assert checkpoint_files.newest_checkpoint(folder).name == "step_000003.ckpt"
        assert not (folder / "samples" / "step_000004.png").exists()
        time.sleep(1)
    first, second = sorted((folder / "checkpoints" / "abandoned").iterdir())
    assert [p.name for p in sorted(first.iterdir())] == [
        f"step_00000{i}.{k}" for i in (3, 4) for k in ("ckpt", "png")
    ]
    assert [p.name for p in sorted(second.iterdir())] == ["step_000003.ckpt", "step_000003.png"]
    assert {name: (first / name.split("/")[1]).read_bytes() for name in was} == was
    out = command("run", f"resume={folder}", "trainer.max_steps=4")[1]
    assert "resuming from step" not in out


@pytest.mark.parametrize(
    "damage",
    tiny.tiered(["cut short", "foreign", "empty"], quick=["cut short"], slow=["foreign", "empty"]),
)
def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(
    damage, command, finished, tmp_path, caplog
):
    folder = shutil.copytree(finished, tmp_path / "run")
    expected = end_of(folder)
    newest = folder / "checkpoints" / f"step_{STEPS:06d}.ckpt"
    whole = newest.read_bytes()
    if damage == "foreign":
        torch.save({"state_dict": {}}, newest)
    else:
        newest.write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"")
    code, out, _ = command("run", f"resume={folder}")
    assert code == 0
    assert f"{newest} is incomplete or no checkpoint of distill" in out + caplog.text
    assert "resuming from step_000011.ckpt instead" in out + caplog.text
    assert tiny.same(end_of(folder), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("method.loss=non_saturating", "method.loss=non_saturating (was relativistic)"),
        ("discriminator.heads.kernel=3", "discriminator.heads.kernel=3 (was 1)"),
        ("data.batch_size=3", "samples a step=3 (was 4"),
        ("seed=5", "seed=5 (was 0)"),
        (
            "experiment=ladd_long_shapes",
            "experiment=ladd_long_shapes (sets many keys, only for new runs; name the keys)",
        ),
    ],
)
def test_another_run_is_not_resumed(change, said, command, pipelines, shards, tmp_path, finished):
    code, _, err = command("run", f"resume={finished}", change)
    assert code == 1
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("distill: ")]) == 1


def test_what_the_run_began_with_may_be_given_again(gone_on):
    before, now = gone_on("callbacks.samples.every=70", began=["debug=smoke"], again=True)
    assert set(compose.changes(before, now)) == {"resume"}


@pytest.mark.slow
def test_a_longer_run_with_another_rate_is_allowed(command, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    more = [
        "trainer.max_steps=14",
        "optimizer.student.lr=1e-7",
        "data.num_workers=0",
        "trainer.log_every_n_steps=1",
    ]
    assert command("run", f"resume={folder}", *more)[0] == 0
    kept = torch.load(folder / "checkpoints" / "step_000014.ckpt", weights_only=True)
    assert kept["global_step"] == 14
    assert kept["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-7
    assert kept["about"]["config"]["teacher"]["path"]


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        (
            ["trainer=fsdp2"],
            {
                "devices": "auto",
                "strategy._target_": "distill.training.strategies.FullyShardedDataParallel",
            },
        ),
        (
            ["trainer.precision=bf16-mixed", "trainer=ddp"],
            {"devices": "auto", "precision": "bf16-mixed"},
        ),
    ],
)
def test_another_trainer_is_taken_without_what_a_new_run_would_have(given, changed, gone_on):
    before, now = gone_on(*given)
    expected = before.trainer.copy()
    OmegaConf.set_struct(expected, False)
    for key, value in {"strategy": now.trainer.strategy, **changed}.items():
        OmegaConf.update(expected, key, value)
    assert now.trainer == expected  # max_steps of the run, and not of the recipe
    assert now.trainer.strategy._target_.startswith("distill.training.strategies.")


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        (["callbacks.samples=null", "~logger"], {"callbacks.samples": None, "logger": None}),
        (
            ["metrics=prompts", "metrics.path=prompts.txt"],
            {"metrics.path": "prompts.txt", "metrics.prompts": None},
        ),
    ],
)
def test_what_is_given_besides_counts_and_nothing_else(given, changed, gone_on, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n", encoding="utf-8")
    before, now = gone_on(*given)
    assert {key: OmegaConf.select(now, key) for key in changed} == changed
    named = ("resume", *(key if now.callbacks.samples is None else "metrics" for key in changed))
    assert [key for key in compose.changes(before, now) if not key.startswith(named)] == []


@pytest.fixture
def gone_on(command, monkeypatch, tmp_path):
    """The configuration of a run that is longer than its recipe says, and the one with which it
    goes on.
    """
    seen = []
    monkeypatch.setattr("distill.config.build.check", seen.append)
    monkeypatch.setattr("distill.config.build.build_training", lambda _: None)
    monkeypatch.setattr("distill.run.train", lambda *_: 0)
    monkeypatch.setattr("distill.config.compose.processes", lambda _: 1)

    def call(*given, began=(), again=False):
        given = [*began, *given] if again else given
        own = [*began, "trainer.max_steps=5000", "metrics.prompts=50", "callbacks.samples.every=70"]
        assert command("run", "run_dir=run", *own)[0] == 0
        state = {"distill": {"iteration": 1}, "about": {"config": {}}}
        checkpoint_files.write_checkpoint(
            state, tmp_path / "run" / "checkpoints" / "step_000001.ckpt"
        )
        assert command("run", "resume=run", *given)[0] == 0
        return seen

    return call


@pytest.fixture(scope="module")
def finished(pipelines, shards, tmp_path_factory):
    """A finished run that no test may change."""
    import importlib

    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr(sys, "argv", ["distill.run", *arguments(pipelines, shards, folder)])
        importlib.import_module("distill.run").main()
    return folder
