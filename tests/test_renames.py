"""Runs that were saved under earlier names: they go on with the same bits, and are evaluated."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

import tiny
from distill.storage.renames import KEYS, MOVED, renamed

ENGINE = "distill.engine.Engine"


def aged(tree):
    """The configuration as it was called before every module had a room, and the loop a group."""
    tree = json.loads(json.dumps(tree))
    loop = tree.pop("loop")
    tree["optimizer"] |= {"_target_": ENGINE, **{k: v for k, v in loop.items() if k[0] != "_"}}
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


def test_every_earlier_name_has_one_of_today():
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


@pytest.mark.parametrize("method", ["ladd", "nitrofusion"])
def test_a_run_of_earlier_names_goes_on_with_the_same_bits(
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
    before = aged(config)
    assert before["optimizer"]["head_start"] == 1
    assert "loop" not in before
    OmegaConf.save(OmegaConf.create(before), folder / "config.yaml")
    file = folder / "checkpoints" / "step_000002.ckpt"
    kept = torch.load(file, weights_only=True)
    kept["about"]["config"] = before
    torch.save(kept, file)
    code, _, err = command("run", f"resume={folder}", "trainer.max_steps=3")
    assert code == 0, err
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "step_000003.ckpt", weights_only=True)
        for name in ("straight", "parts")
    ]
    assert tiny.same(ends[0]["state_dict"], ends[1]["state_dict"])
    assert tiny.same(ends[0]["distill"]["ema"], ends[1]["distill"]["ema"])
    after = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert after["loop"] == config["loop"]
    code, _, err = command("sample", f"run={folder}", "prompt=a red disc")
    assert code == 0, err
