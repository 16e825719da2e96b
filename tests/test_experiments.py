"""The experiments on the papers' models: each is composed, built and run for two steps, with a tiny
teacher in place of the real one; and each says what it takes."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import families
import tiny
from distill.data.write import write_pairs

CONF = Path(__file__).parents[1] / "conf" / "experiment"
# Experiment -> the family of its teacher, its data, and what a tiny world needs besides.
EYES = ["discriminator.features.size=64", "discriminator.condition.text=teacher"]
IMAGES = ["data.size=64", "discriminator.condition.image=features"]
LESS = ["loop.accumulate=2", "data.batch_size=2", "data.num_workers=0"]
OPENED = ["method.warm_start=1"]  # of the two steps the first
OF_FLUX = ["data.size=64", "teacher.size=64", "teacher.length=64", "student.rank=4"]
EXPERIMENTS = {
    "add_m_sd15": ("unet", "pictures", [*EYES, *IMAGES]),
    "add_m_sd21": ("unet", "pictures", [*EYES, *IMAGES]),
    "sdxl_turbo": ("sdxl", "pictures", [*EYES, *IMAGES, "teacher.size=64", "method.crop=8"]),
    "sd3_turbo": ("mmdit", "latents", ["discriminator.heads.width=16"]),
    "sd35_turbo": ("sd35", "latents", ["discriminator.heads.width=16"]),
    "ladd_sdxl": ("sdxl", "latents", []),
    "sdxl_dmd2": ("sdxl", "latents", []),
    "sd_inpaint_turbo": ("sd_inpaint", "pictures", ["data.size=64"]),
    "sdxl_inpaint_turbo": ("sdxl_inpaint", "pictures", ["data.size=64"]),
    "instruct_pix2pix_turbo": ("instruct_pix2pix", "pairs", ["data.size=64"]),
    "flux_fill_turbo": ("flux_fill", "pictures", OF_FLUX),
    "kontext_turbo": ("flux_kontext", "pairs", OF_FLUX),
    "dpo_sdxl": ("sdxl", "preferences", ["data.size=64", "student.rank=4"]),
    "nitrosd_realism": ("sdxl", "prompts", OPENED),
    "nitrosd_vibrant": ("sdxl", "prompts", OPENED),
}
SLOW = set(EXPERIMENTS) - {"sd3_turbo"}


def write_preferences(path: Path) -> Path:
    """Pictures of noise, each preferred to another."""
    with tarfile.open(path, "w") as tar:
        for i in range(8):
            for n, side in enumerate(("winner", "loser")):
                colours = np.random.default_rng([i, n]).integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(colours).save(file := io.BytesIO(), "PNG")
                member = tarfile.TarInfo(f"{i}.{side}.png")
                member.size = len(file.getvalue())
                tar.addfile(member, io.BytesIO(file.getvalue()))
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = len(caption := tiny.CAPTIONS[i].encode())
            tar.addfile(member, io.BytesIO(caption))
    return path


@pytest.fixture
def data(shards, tmp_path):
    """Kind -> where it is: captioned pictures, a teacher's latents, or prompts."""
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for i in range(8):
            colours = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(colours).save(file := io.BytesIO(), "PNG")
            for end, content in (("png", file.getvalue()), ("txt", tiny.CAPTIONS[i].encode())):
                member = tarfile.TarInfo(f"{i}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:8]), encoding="utf-8")
    grey = np.full((64, 64, 3), 90, np.uint8)
    pairs = [(str(i), grey, grey + i, tiny.CAPTIONS[i], {}) for i in range(1, 9)]
    write_pairs(f"{tmp_path}/pairs-%d.tar", pairs, 8)
    return {
        "pairs": tmp_path / "pairs-0.tar",
        "pictures": tmp_path / "pictures.tar",
        "latents": shards,
        "prompts": tmp_path / "prompts.txt",
        "preferences": write_preferences(tmp_path / "preferences.tar"),
    }


@pytest.fixture
def teacher_of(pipelines, tmp_path):
    """Family -> the folder of its pipeline."""
    return lambda family: (
        pipelines(family)
        if family in ("unet", "mmdit", "sdxl")
        else families.write(family, tmp_path / family)
    )


def with_tiny_parts(name: str, folder: Path, teachers, tmp_path: Path) -> list[str]:
    """The experiment with every network that it names replaced by a small one."""
    experiment = OmegaConf.load(CONF / f"{name}.yaml")
    arguments = [
        f"experiment={name}",
        f"teacher.path={folder}",
        "teacher.dtype=float32",
        *EXPERIMENTS[name][2],
    ]
    if any(key in name for key in ("add_m", "sdxl_turbo")):
        arguments.append(f"discriminator.features.path={tiny.vit()}")
    if OmegaConf.select(experiment, "teacher.weights"):
        torch.save(teachers("sdxl").network.model.state_dict(), tmp_path / "few.bin")
        arguments.append(f"teacher.weights={tmp_path / 'few.bin'}")
    return arguments


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXPERIMENTS]
)
def test_an_experiment_runs_two_steps(name, command, data, teacher_of, teachers, tmp_path):
    family, kind, _ = EXPERIMENTS[name]
    arguments = with_tiny_parts(name, teacher_of(family), teachers, tmp_path)
    where = [f"data.path={data[kind]}", f"run_dir={tmp_path / 'run'}"]
    code, _, err = command("run", "debug=smoke", *arguments, *LESS, *where)
    assert code == 0, err
    with (tmp_path / "run" / "metrics.csv").open(encoding="utf-8") as file:
        lost = "g/dpo" if kind == "preferences" else "d/adv"
        rows = [row for row in csv.DictReader(file) if row[lost]]
    assert {int(float(row["step"])) for row in rows} == {1, 2}
    opened = EXPERIMENTS[name][2] is OPENED
    if lost == "d/adv":
        assert [bool(row["g/adv"]) for row in rows] == [not opened, True]
    assert all(float(row["g/grad_norm"]) > 0 for row in rows)
    assert (tmp_path / "run" / "report.html").is_file()
    scheduler = json.loads(
        (tmp_path / "run" / "student" / "scheduler" / "scheduler_config.json").read_text(
            encoding="utf-8"
        )
    )
    if name.startswith("nitrosd"):
        assert scheduler["shifted_timestep"] == (250 if name == "nitrosd_realism" else 500)


def on_papers_models() -> set[str]:
    return {file.stem for file in CONF.glob("*.yaml") if not file.stem.endswith("_shapes")}


def test_every_experiment_is_run():
    assert on_papers_models() == set(EXPERIMENTS)


@pytest.mark.parametrize("name", sorted(on_papers_models()))
def test_an_experiment_says_what_it_takes(name):
    """In its head, or in that of the one that it begins from: its command, what is ours, that it
    was not run.
    """
    text = (CONF / f"{name}.yaml").read_text(encoding="utf-8")
    head = text.partition("\ndefaults:")[0]
    parent = next(iter(OmegaConf.load(CONF / f"{name}.yaml").defaults))
    whole = head + (
        (CONF / f"{parent}.yaml").read_text(encoding="utf-8") if isinstance(parent, str) else ""
    )
    assert f"python -m distill.run experiment={name} " in head
    assert "ot run here" in head
    assert "From the paper" in whole
    assert "Ours" in whole
    assert "Hardware" in whole
    assert all(len(line) <= 120 for line in head.splitlines())
