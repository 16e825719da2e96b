"""Runs that were saved with earlier names: they resume with the same bits, and can be sampled."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

import tiny
from distill.storage.renames import KEYS, MOVED, renamed

ENGINE = "distill.engine.Engine"


def with_earlier_names(tree):
    """The configuration with the names from before modules were moved and `loop` became a group."""
    tree = json.loads(json.dumps(tree))
    loop, known = tree.pop("loop"), {now.partition(".")[2] for now in KEYS.values()}
    kept = {k: v for k, v in loop.items() if k in known}  # later keys have their defaults
    tree["optimizer"] |= {"_target_": ENGINE, **kept}
    for before, now in KEYS.items():
        group, name = now.split(".")
        if group == "method" and name in tree["method"]:
            tree["method"][before.partition(".")[2]] = tree["method"].pop(name)
    return earlier_targets(tree)


def earlier_targets(tree):
    if isinstance(tree, list):
        return [earlier_targets(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    modules = {now: before for before, now in MOVED.items()}
    found = {key: earlier_targets(value) for key, value in tree.items()}
    module, _, name = str(found.get("_target_", "")).rpartition(".")
    return {**found, "_target_": f"{modules[module]}.{name}"} if module in modules else found


def test_every_earlier_name_is_renamed():
    tree = {
        "method": {
            "_target_": "distill.methods.nitrofusion.NitroFusion",
            "opening": 3,
            "one_step_prob": 0.2,
        },
        "optimizer": {"_target_": ENGINE, "student": {"lr": 1}, "ema_decay": 0.9},
        "callbacks": {"checkpoint": {"_target_": "distill.checkpoint.Checkpoints"}},
    }
    now = renamed(tree)
    assert now == {
        "method": {
            "_target_": "distill.methods.nitrofusion.NitroFusion",
            "warm_start": 3,
            "one_step_prob": 0.2,
        },
        "optimizer": {"student": {"lr": 1}},
        "loop": {
            "_target_": "distill.training.loop_settings.LoopSettings",
            "ema_decay": 0.9,
        },
        "callbacks": {"checkpoint": {"_target_": "distill.training.checkpoints.Checkpoints"}},
    }
    assert renamed(now) == now


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ladd", "nitrofusion"])
def test_a_run_with_earlier_names_resumes_with_the_same_bits(
    method, pipelines, shards, tmp_path, command
):
    words = [
        "debug=smoke", f"method={method}", f"teacher.path={pipelines('mmdit')}",
        f"data.path={shards}", "data.num_workers=0", "callbacks.checkpoint.every=1",
        "callbacks.samples.every=100", "loop.head_start=1", "loop.schedule=constant", "~metrics",
    ]  # fmt: skip
    assert command("run", *words, "trainer.max_steps=3", "run_dir=straight")[0] == 0
    assert command("run", *words, "trainer.max_steps=2", "run_dir=parts")[0] == 0
    folder = tmp_path / "parts"
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    before = with_earlier_names(config)
    assert before["optimizer"]["head_start"] == 1
    assert "loop" not in before
    OmegaConf.save(OmegaConf.create(before), folder / "config.yaml")
    file = folder / "checkpoints" / "step_000002.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["about"]["config"] = before
    torch.save(checkpoint, file)
    code, _, err = command("run", f"resume={folder}", "trainer.max_steps=3")
    assert code == 0, err
    checkpoints = [
        torch.load(tmp_path / name / "checkpoints" / "step_000003.ckpt", weights_only=True)
        for name in ("straight", "parts")
    ]
    assert tiny.same(*(c["state_dict"] for c in checkpoints))
    assert tiny.same(*(c["distill"]["ema"] for c in checkpoints))
    after = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    kept = {k: v for k, v in config["loop"].items() if v is not None}  # later keys are absent
    assert after["loop"] == kept
    code, _, err = command("sample", f"run={folder}", "prompt=a red disc")
    assert code == 0, err
