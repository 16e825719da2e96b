"""Numbers that are not finite: in frozen networks before training, in gradients with advice that
can be followed.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from distill.storage.loaded_weights import check_finite
from distill.training.callbacks import alarm


def broken(folder, name, value=math.nan):
    """A copy's weights with one number of this tensor spoilt."""
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    found = next(key for key in sorted(state) if name in key)
    state[found].view(-1)[0] = value
    save_file(state, file, {"format": "pt"})
    return found


def words(model, shards, *more):
    given = [f"teacher.path={model}", f"data.path={shards}", "run_dir=run", "~metrics"]
    return ["debug=smoke", *given, "callbacks.samples.every=100", *more]


def last(err):
    return [line for line in err.splitlines() if line.startswith("distill: ")][-1]


@pytest.mark.parametrize(
    ("part", "value"),
    [("transformer", math.nan), ("vae", math.inf), ("text_encoder", math.nan)],
)
def test_a_broken_part_of_the_teacher_is_named(part, value, pipelines, shards, command, tmp_path):
    model = shutil.copytree(pipelines("mmdit"), tmp_path / "model")
    tensor = broken(model / part, "weight", value)
    code, _, err = command("run", *words(model, shards))
    assert code == 1
    said = f"distill: teacher.path={model}: {part}/ holds numbers that are not finite in {tensor}"
    assert last(err).startswith(said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cache", "synthesize", "sample", "evaluate"])
def test_every_command_says_which_network_is_broken(name, pipelines, command, tmp_path):
    part = "vae" if name == "cache" else "transformer"
    model = shutil.copytree(pipelines("mmdit"), tmp_path / "model")
    tensor = broken(model / part, "weight")
    for place in ("prompts.txt", "photos/a.txt"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("a star\n", encoding="utf-8")
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "a.png")
    teacher = f"teacher.path={model}"
    given, key = {
        "cache": ([teacher, "data.path=photos", "data.size=64"], "teacher.path"),
        "synthesize": ([teacher, "prompts=prompts.txt"], "teacher.path"),
        "sample": ([f"run={model}", "prompt=a star", "guidance=4"], "run"),
        "evaluate": ([f"run={model}", "steps=1"], "run"),
    }[name]
    code, out, err = command(name, *given, "out=made")
    assert code == 1
    said = f"{key}={model}: {part}/ holds numbers that are not finite in {tensor}; fetch it anew"
    assert last(err).startswith(f"distill: {said}")
    assert "0 bad" not in out
    assert not (tmp_path / "made").exists()


def test_broken_features_are_named(pipelines, shards, command, tmp_path):
    eyes = shutil.copytree(tiny.vit(), tmp_path / "eyes")
    broken(eyes, "weight")
    features = [f"discriminator.features.path={eyes}", "discriminator.features.size=64"]
    told = ["discriminator.condition.text=teacher", "discriminator.condition.image=features"]
    more = ["method=add", *features, *told]
    code, _, err = command("run", *words(pipelines("mmdit"), shards, *more))
    assert code == 1
    assert f"discriminator.features.path={eyes} holds numbers that are not finite" in last(err)


def test_masks_and_networks_without_values_are_no_fault():
    network = nn.Linear(2, 2)
    network.register_buffer("mask", torch.full((2, 2), -math.inf))
    network.register_buffer("count", torch.tensor(3))
    network.register_buffer("none", torch.zeros(0))
    check_finite(network, "it")
    check_finite(nn.Linear(2, 2, device="meta"), "it")
    network.mask[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"it holds numbers that are not finite in mask; fetch"):
        check_finite(network, "it")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_to_do_about_a_diverged_run_can_be_done(
    precision, pipelines, shards, command, tmp_path
):
    diverging = [
        "optimizer.student.lr=1e30",
        "loop.clip_student=1e30",
        "loop.stop_after_bad=2",
    ]
    few = ["trainer.max_steps=50", f"trainer.precision={precision}", "loop.warmup_steps=0"]
    given = words(pipelines("mmdit"), shards, *diverging, *few)
    code, _, err = command("run", *given, "callbacks.checkpoint.every=100")
    assert code == 1
    assert "it has no checkpoint yet: start anew with a lower optimizer.student.lr" in last(err)
    assert ("trainer.precision=32-true" in last(err)) == (precision != "32-true")
    assert not (tmp_path / "run" / "checkpoints").exists()

    kept = [word.replace("run_dir=run", "run_dir=kept") for word in given]
    code, _, err = command("run", *kept, "callbacks.checkpoint.every=1")
    assert code == 1
    assert "resume=kept, or one of its checkpoints, with a lower optimizer.student.lr" in last(err)


def test_an_alarm_names_only_what_the_method_has():
    assert "r1_weight" in alarm(0.5, 30.0, -30.0)
    assert "r1_weight" not in alarm(0.5, 30.0, -30.0, r1=False)
