"""The pages on real models, run as they stand: their commands in their order, in one folder, then
their Python.

What is not at hand is played by tiny things: real teachers by random pipelines of their classes,
photos by noise. Only sizes and counts are added to a command; none of its own words is changed.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

import eyes
import families
import ldm
import tiny

ROOT = Path(__file__).parents[1]
# In the order in which a reader follows them: each goes on with what the ones before have left.
PAGES = ("fine_tune", "evaluate", "prompts_only", "lora", "in_diffusers")
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
# A word of a command -> what makes it small. Every word that names a real model must be among them.
SMALL = {
    "teacher=sdxl": ["teacher.dtype=float32"],
    "teacher.path=mine.safetensors": ["teacher.config={sdxl}", "teacher.dtype=float32"],
    "teacher=sd3": ["teacher.path={sd3}", "teacher.dtype=float32", "steps=2"],
    "experiment=sd3_turbo": [
        "teacher.path={sd3}",
        "teacher.dtype=float32",
        "discriminator.heads.width=16",
    ],
    "data.size=1024": ["data.size=64", "data.num_workers=0"],
    "data=prompts": ["data.num_workers=0"],
    "metrics=coco5k": ["metrics.prompts=8"],
    "student=lora": ["teacher.path={sdxl}", "teacher.dtype=float32", "student.rank=4"],
}
RUN = ["debug=smoke", "data.batch_size=2", "data.num_workers=0", "loop.accumulate=2"]
# As in test_export: two steps that can be seen.
RUN += ["optimizer.student.lr=0.01", "loop.warmup_steps=0", "loop.ema_decay=0"]
CALLBACKS = set(OmegaConf.load(ROOT / "conf" / "callbacks" / "default.yaml"))


def section() -> str:
    pages = (ROOT / "docs" / "how_to" / f"{name}.md" for name in PAGES)
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def blocks(language: str) -> list[str]:
    return [
        code
        for name, code in re.findall(r"```(\w*)\n(.*?)```", section(), re.DOTALL)
        if name == language
    ]


def commands() -> list[str]:
    return [line for block in blocks("") for line in block.splitlines() if line]


def words_of(line: str) -> tuple[str, list[str]]:
    """Name and arguments of a command as a shell hands them over."""
    python, flag, module, *arguments = shlex.split(line)
    assert (python, flag) == ("python", "-m"), line
    return module.removeprefix("distill."), arguments


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The folder in which a reader of the pages stands: a fine-tune, photos, prompts; and the tiny
    base models.
    """
    here = tmp_path_factory.mktemp("readme")
    sdxl = families.write("sdxl", here / "models" / "sdxl")
    families.write("sd35", here / "models" / "sd3")
    eyes.write_clip(here / "models" / "clip")
    eyes.write_open_clip(here / "models" / "open_clip")
    whole = diffusers.DiffusionPipeline.from_pretrained(sdxl, dtype=torch.float32)
    tiny.shake(whole.unet, 9, std=0.01)  # a fine-tune: another denoiser than the base's
    ldm.write(whole, "sdxl", here / "mine.safetensors")
    (here / "photos").mkdir()
    for i in range(6):
        colours = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(colours).save(here / "photos" / f"{i}.png")
        (here / "photos" / f"{i}.txt").write_text(tiny.CAPTIONS[i], encoding="utf-8")
    eyes.write_coco(here / "coco")
    (here / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:4]), encoding="utf-8")
    return here


def small(world: Path, name: str, arguments: list[str]) -> list[str]:
    more = [extra for word in arguments for extra in SMALL.get(word, [])]
    places = {name: world / "models" / name for name in ("sdxl", "sd3", "clip", "open_clip")}
    more += eyes.small(places) if name == "evaluate" else []
    return [
        *arguments,
        *(extra.format(**places) for extra in more),
        *(RUN if name == "run" else []),
    ]


@pytest.fixture(scope="module")
def said(world) -> dict[str, str]:
    """Every command of the section, once, in its order -> what it printed."""
    outputs = {}
    for line in commands():
        name, arguments = words_of(line)
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
            patch.chdir(world)
            patch.setenv("XDG_CACHE_HOME", str(world / "kept"))
            patch.delenv("HYDRA_FULL_ERROR", raising=False)
            patch.setattr(sys, "argv", [f"distill.{name}", *small(world, name, arguments)])
            importlib.import_module(f"distill.{name}").main()  # raises SystemExit where it fails
        outputs[line] = out.getvalue()
    return outputs


# -- what each leaves behind: a check for every command, chosen by its words -----------------------


def is_checked(world, out):
    assert "6 of 6 samples are good" in out


def is_cached(world, out):
    made = json.loads((world / "cached" / "manifest.json").read_text(encoding="utf-8"))
    assert (made["samples"], made["teacher"], made["size"], made["embeddings"]) == (
        6,
        str(world / "mine.safetensors"),
        [64] * 2,
        True,
    )


def is_synthesized(world, out):
    made = json.loads((world / "synthetic" / "manifest.json").read_text(encoding="utf-8"))
    assert (made["samples"], made["guidance"], made["embeddings"]) == (4, 4.5, True)


def is_run(name: str, expected: dict[str, object]) -> Callable[[Path, str], None]:
    def check(world, out):
        folder = world / "runs" / name
        config = OmegaConf.load(folder / "config.yaml")
        found = {key: OmegaConf.select(config, key) for key in expected}
        # paths are kept absolute
        assert {k: v if v == expected[k] else Path(v).name for k, v in found.items()} == expected
        assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
        assert (folder / "student" / "README.md").is_file()
        assert set(config.callbacks) == CALLBACKS
        for step in range(3):
            assert Image.open(folder / "samples" / f"step_{step:06d}.png").height == 68
        captions = (folder / "samples" / "captions.txt").read_text(encoding="utf-8").splitlines()
        assert set(captions) <= set(tiny.CAPTIONS)

    return check


def has_pictures(world, out):
    paths = [world / line for line in out.split()]
    assert len(paths) == 5  # four and their grid
    assert all(Image.open(path).text["steps"] == "4" for path in paths)


def is_folder(world, out):
    assert out.startswith("exporting\n")
    assert out.endswith("\nwrote fast\n")
    index, of_run = (
        folder / "model_index.json"
        for folder in (world / "fast", world / "runs" / "mine" / "student")
    )
    assert index.read_bytes() == of_run.read_bytes()


def is_int8(world, out):
    config = json.loads((world / "fast_int8" / "unet" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" in config


def is_judged(folder: str, *rows: tuple[str, int]) -> Callable[[Path, str], None]:
    def check(world, out):
        found = json.loads((world / folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
        assert [(row["who"], row["steps"]) for row in found] == list(rows)
        assert all(
            np.isfinite(row["clip_score"]) and ("fid" in row) == (folder != "evaluations/fast")
            for row in found
        )
        assert "clip score" in out

    return check


def is_single_file(world, out):
    found, base = (load_file(world / name) for name in ("fast.safetensors", "mine.safetensors"))
    assert {x.dtype for x in found.values() if x.is_floating_point()} == {torch.float16}
    denoiser = [name for name in base if name.startswith("model.diffusion_model.")]
    assert set(denoiser) <= set(found)
    assert any(not torch.equal(found[name], base[name].half()) for name in denoiser)


def is_lora(name: str, begins: str) -> Callable[[Path, str], None]:
    def check(world, out):
        state = load_file(world / name)
        assert all(key.startswith(begins) for key in state)
        assert {x.dtype for x in state.values() if x.is_floating_point()} == {torch.float16}

    return check


CHECKS: dict[tuple[str, ...], Callable[[Path, str], None]] = {
    ("check", "data.path=photos"): is_checked,
    ("cache", "out=cached"): is_cached,
    ("run", "run_dir=runs/mine"): is_run(
        "mine", {"teacher.path": "mine.safetensors", "method.distill_weight": 2.5}
    ),
    ("sample", "run=runs/mine"): has_pictures,
    ("export", "out=fast"): is_folder,
    ("export", "out=fast_int8"): is_int8,
    ("export", "to=single_file"): is_single_file,
    ("evaluate", "run=runs/mine"): is_judged("runs/mine", *(("student", n) for n in (1, 2, 4))),
    ("evaluate", "run=fast"): is_judged("evaluations/fast", ("student", 4)),
    ("evaluate", "run=photos"): is_judged("scores", ("pictures", 0)),
    ("synthesize", "out=synthetic"): is_synthesized,
    ("run", "run_dir=runs/sd3"): is_run("sd3", {"data.path": "synthetic", "name": "sd3_turbo"}),
    ("run", "run_dir=runs/sd3_prompts"): is_run(
        "sd3_prompts", {"data.path": "prompts.txt", "method.real.guidance": 4.5}
    ),
    ("sample", "run=runs/sd3"): has_pictures,
    ("run", "run_dir=runs/lora"): is_run("lora", {"student.checkpointing": True}),
    ("export", "out=lora.safetensors"): is_lora("lora.safetensors", "unet."),
    ("export", "out=lora_kohya.safetensors"): is_lora("lora_kohya.safetensors", "lora_unet_"),
}


def test_every_command_of_the_section_is_covered(tmp_path):
    """A command that is added, removed or renamed there must be so here; names of real models must
    be made small.
    """
    found = [words_of(line) for line in commands()]
    for name, word in CHECKS:
        assert sum(name == n and word in arguments for n, arguments in found) == 1, (name, word)
    assert len(found) == len(CHECKS)
    for check in CHECKS.values():  # one that holds where no command was run would check nothing
        with pytest.raises((AssertionError, FileNotFoundError)):
            check(tmp_path, "")
    known = set(SMALL) | {
        "experiment=ladd_sdxl"
    }  # whose teacher another word of the command brings
    for _, arguments in found:
        assert {
            a for a in arguments if a.startswith(("teacher=", "experiment=", "teacher.path="))
        } <= known


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_a_command_leaves_what_the_page_says(line, said, world):
    """The assertions are those of its check; a command without one fails."""
    name, arguments = words_of(line)
    checks = [
        check for (command, word), check in CHECKS.items() if command == name and word in arguments
    ]
    assert len(checks) == 1, (
        f"{len(checks)} entries of CHECKS are for this command, and it needs one"
    )
    checks[0](world, said[line])


@pytest.mark.slow
def test_its_python_draws_with_what_the_commands_left(said, world, monkeypatch):
    (code,) = blocks("python")
    for real, little in {
        BASE: "models/sdxl",
        '.to("cuda")': "",
        "torch.bfloat16": "torch.float32",
    }.items():
        assert real in code
        code = code.replace(real, little)
    monkeypatch.chdir(world)
    exec(compile(code, "in_diffusers.md", "exec"), {})
    for name in ("fast.png", "lora.png", "sd3.png"):
        picture = np.asarray(Image.open(world / name), dtype=float)
        assert picture.shape == (64, 64, 3)
        assert picture.std() > 1


def test_the_section_names_every_teacher_and_experiment():
    conf, text = ROOT / "conf", section()
    for file in (conf / "teacher").glob("*.yaml"):
        assert file.stem.startswith("shapes") or re.search(rf"\b{file.stem}\b", text), file.stem
    for file in (conf / "experiment").glob("*.yaml"):
        assert file.stem.endswith("_shapes") or re.search(rf"\b{file.stem}\b", text), file.stem
