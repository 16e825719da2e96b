"""Every key of every configuration: misspelt, of a wrong kind or out of range it is named before
torch is imported.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from distill import recipes
from distill.cli import COMMANDS, NO_CONFIG, config_of
from distill.commandline.composed import Composed
from distill.commandline.keys import check_known, check_own_keys
from distill.commandline.quoting import own_keys
from distill.config import validate
from distill.config.compose import dotted
from hostile import png
from tiny import put_tar

OPTIONS = [  # of groups that no experiment takes
    "teacher=sdxl_instruct_pix2pix data=pairs ~metrics",
    "teacher=sd3_inpaint data=images data.masks=true ~metrics",
    "data=images data.size=64",
    "data=synthetic", "data=renders", "logger=[wandb,mlflow,trackio]",
    "metrics=coco5k",
    "student=lora", "student=stylegan method=add method.levels.odds=[1,0,0,0]",
    "teacher=flux", "teacher=flux2", "teacher=flux2_klein",
    "teacher=pixart_sigma", "teacher=sana", "trainer=fsdp2", "trainer=ddp",
    "teacher=wan",
    "teacher=z_image", "teacher=z_image_turbo", "teacher=qwen_image", "teacher=lumina2",
    "sampler=euler",
]  # fmt: skip
WORDS = ["", *(f"experiment={name}" for name in recipes.names()), *OPTIONS]
WRONG: dict[type, list[Any]] = {  # kind of a value -> what can be none of that
    bool: ["abc", 2, [1]],
    int: ["abc", True, {"a": 1}, [[1]], -1e9],
    float: ["abc", True, {"a": 1}, [["a"]], -1e9],
    str: [{"a": 1}, [[1]], True],
    list: ["abc def", {"a": 1}, True],
    dict: [3, "abc", [1]],
    type(None): [{"zzz": 1}, True, [[{"a": 1}]]],
}
# Where any sign is right: the place on the noise axis, and numbers of scores that scale or smooth
# alone.
MAPPINGS = {"logger.mlflow.tags"}  # the user's own names
ANY_SIGN = {"method.renoise.m", "metrics.scores.cmmd.bandwidth", "metrics.scores.cmmd.times"}


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a file for each kind of path that must be given."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "prompts.txt").write_text("a\n", encoding="utf-8")
    (folder / "few_step.safetensors").write_bytes(b"")
    # one sample of every kind of data: the first ones are looked at
    np.save(latents := io.BytesIO(), np.zeros((4, 8, 8), np.float32))
    files = {f"0.{part}png": png(1024, 1024) for part in ("", "source.", "target.")}
    files |= {f"0.{side}.npy": latents.getvalue() for side in ("winner", "loser")}
    put_tar(folder / "x.tar", {**files, "0.latent.npy": latents.getvalue(), "0.txt": b"a"})
    return folder


def composed(word: str, here: Path) -> dict[str, Any]:
    """The configuration of a run with what must be given."""
    tree: Any = Composed("config", tuple(word.split())).tree
    tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    lines, data = str(here / "prompts.txt"), tree["data"]
    if data.get("path") == "???":
        data["path"] = lines if data["_target_"].endswith("prompts") else str(here / "x.tar")
    if (tree.get("metrics") or {}).get("path") == "???":
        tree["metrics"]["path"] = lines
    if tree["teacher"]["path"] == "???":
        tree["teacher"]["path"] = "an/id"
    if tree["teacher"].get("weights") == "few_step.safetensors":
        tree["teacher"]["weights"] = str(here / "few_step.safetensors")
    return tree


def refusal(tree: dict[str, Any], config: str = "config") -> str | None:
    """What is said of it, as the command does."""
    cfg = OmegaConf.create(tree)
    try:
        check_known(cfg, config)
        check_own_keys(cfg, config)
        if config == "config":
            validate.check_run(cfg)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def inside(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The node that a dotted key stands in, and its name there."""
    *parents, last = key.split(".")
    for name in parents:
        tree = tree[name]
    return tree, last


def changed(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    node, last = inside(tree, key)
    node[last] = value
    return tree


def wrong(tree: dict[str, Any], seen: set[tuple[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """(key, what an error must name, value): a misspelt neighbour of every key, and values that it
    cannot have.

    A key of a class that was `seen` is passed over.
    """
    for key, value in dotted(tree).items():
        node, last = inside(tree, key)
        place = (key, node.get("_target_"))
        if last.startswith("_") or place in seen:
            continue
        seen.add(place)
        yield f"{key}x", f"{last}x", 1
        for other in WRONG[type(value)]:
            own = isinstance(other, dict) and key in MAPPINGS
            if not own and not (other == -1e9 and key in ANY_SIGN):
                yield key, last, other


@pytest.mark.slow
def test_every_key_of_every_experiment(here):
    seen: set[tuple[str, Any]] = set()
    passed, tries = [], 0
    for word in WORDS:
        tree = composed(word, here)
        assert refusal(tree) is None, word
        for key, named, value in wrong(tree, seen):
            tries += 1
            said = refusal(changed(tree, key, value))
            if said is None or named not in said or "\n" in said:
                passed.append((word, key, value, said))
    assert not passed, "\n" + "\n".join(map(str, passed))
    assert tries > 1000
    misspelt = refusal(changed(composed("", here), "method.distil_weight", 2))
    assert (
        misspelt == "method.distil_weight: distill.methods.ladd.LADD takes no such key "
        "(did you mean distill_weight?); leave it out"
    )


CONFIGS = sorted({config_of(name) for name in COMMANDS if name not in NO_CONFIG})


@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "config"])
def test_the_own_keys_of_every_command(config):
    tree = Composed(config).tree
    assert refusal(tree, config) is None
    for key, value in dotted(own_keys(config)).items():
        _, last = inside(tree, key)
        said = refusal(changed(tree, f"{key}x", 1), config)
        assert (
            "." in key
            or said == f"{key}x: nothing reads this key (did you mean {key}?); leave it out"
        )
        if (
            isinstance(value, bool | float | str) and key != "space"
        ):  # a list, each item of it asked
            for other in ({"a": 1}, None):
                said = refusal(changed(tree, key, other), config)
                assert said is not None, (key, other)
                assert said.startswith(key), said


def test_what_a_key_refers_to_is_read(here):
    tree = changed(composed("", here), "pace", 50)
    assert refusal(tree) == "pace: nothing reads this key; leave it out"
    cfg = OmegaConf.create(changed(tree, "callbacks.samples.every", "${pace}"))
    check_known(cfg, "config")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("method.players", 1, "method.players=1: the program sets it itself; leave it out"),
        ("method.loop", 1, "method.loop=1: the program sets it itself; leave it out"),
        ("student.teacher", 1, "student.teacher=1: the program sets it itself; leave it out"),
        ("trainer.max_epochs", 3, "trainer.max_epochs=3: a run is counted in steps"),
        ("logger.csv.save_dir", "x", "logger.csv.save_dir=x: the program sets it itself"),
        ("logger.tensorboard.flush", 1, "takes no such key (did you mean flush_secs?)"),
        ("optimizer.student.lr", float("nan"), "optimizer.student.lr=nan: must be 0 or more"),
        (
            "trainer.accelerator",
            "gpuu",
            "must be auto or cpu or gpu or cuda or mps (did you mean gpu?)",
        ),
        ("callbacks.progress.rate", 1, "distill.training.callbacks.Progress takes no such key"),
        ("discriminator.feature", {}, "nothing reads this key (did you mean features?); leave"),
    ],
)
def test_what_would_be_passed_over_is_refused(key, value, said, here):
    assert said in (refusal(changed(composed("", here), key, value)) or "")


@pytest.mark.parametrize("key", ["method.levels", "data.path", "callbacks.x", "metrics.prompts"])
def test_what_a_class_needs_and_does_not_get(key, here):
    tree = composed("", here)
    node, last = inside(tree, key)
    node.pop(last, None)
    needed = "." in key and key not in ("callbacks.x", "metrics.prompts")
    assert ((refusal(tree) or "").startswith(f"{key}: not given; ")) == needed


def test_nothing_heavy_is_imported_for_any_of_this():
    code = (
        "import sys, distill.config.validate, distill.commandline.keys, distill.config.errors\n"
        "sys.exit(','.join(m for m in ('torch', 'lightning', 'diffusers') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False
    )
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("method", ["ladd", "nitrofusion"])
@pytest.mark.parametrize(("loss", "shared"), [("relativistic", False), ("relativistic", True)])
def test_pairs_that_differ_by_their_noise_are_said_once(method, loss, shared, here, caplog):
    tree = composed(f"method={method}", here)
    tree["method"] |= {"loss": loss, "shared": shared}
    assert refusal(tree) is None
    said = [r.getMessage() for r in caplog.records if "in pairs" in r.getMessage()]
    what = "method.loss=relativistic compares real and fake logits in pairs, and method.shared="
    assert [line.startswith(what) for line in said] == ([] if shared else [True])
