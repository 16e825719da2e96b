"""`distill.sample` on what is no run: many prompts, sizes, models that were not distilled, and what
it refuses.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image

import tiny
from distill import sample, students
from distill.config.models import student_of
from distill.evaluation.features import open_rgb, to_model_input
from distill.sampling import Consistency, seeded, to_bytes
from distill.sampling.guided import guided

EXACT = "precision=32-true"  # as plain diffusers draws, on any machine
PROMPTS = [tiny.CAPTIONS[0], tiny.CAPTIONS[1], tiny.CAPTIONS[0]]


@pytest.fixture(scope="module")
def exported(teachers, tmp_path_factory):
    """Family -> the folder of a student."""

    def of(family):
        folder, teacher = tmp_path_factory.getbasetemp() / f"student_{family}", teachers(family)
        if not folder.exists():
            student = tiny.shake(students.full(teacher), 21, std=0.03)
            students.save_pipeline(
                student, teacher, folder, Consistency().scheduler(student, teacher)
            )
        return folder

    return of


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def test_prompts_of_a_file_in_batches_are_those_alone(
    family, exported, command, tmp_path, monkeypatch
):
    """However many at a time; a grid has a row for each prompt."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    run, embedded = f"run={exported(family)}", []
    of = sample._picture_function
    monkeypatch.setattr(
        sample, "_picture_function", lambda *a: lambda p, s: embedded.append(len(p)) or of(*a)(p, s)
    )
    code, out, _ = command(
        "sample", EXACT, run, "prompts=prompts.txt", "count=2", "seed=3", "batch_size=4", "out=many"
    )
    assert code == 0
    assert embedded == [4, 2]
    *paths, grid = [tmp_path / line for line in out.split()]
    assert len(paths) == len(set(paths)) == 6
    assert [Image.open(p).text["seed"] for p in paths] == ["3", "4"] * 3
    assert [Image.open(p).text["prompt"] for p in paths] == [p for p in PROMPTS for _ in range(2)]
    assert Image.open(grid).size == (2 * (tiny.SIDE + 2) + 2, 3 * (tiny.SIDE + 2) + 2)
    assert abs(pixels(grid)[2 : 2 + tiny.SIDE, 2 : 2 + tiny.SIDE] - pixels(paths[0])).max() == 0
    assert command("sample", EXACT, run, f"prompt='{PROMPTS[1]}'", "seed=4", "out=alone")[0] == 0
    (alone,) = (tmp_path / "alone").iterdir()  # one picture has no grid
    assert abs(pixels(alone) - pixels(paths[3])).max() <= 1


def test_a_runs_own_levels_are_those_it_is_sampled_with(exported, command, tmp_path):
    shutil.copytree(exported("mmdit"), tmp_path / "run" / "student")
    (tmp_path / "run" / "config.yaml").write_text(
        "sampler: {_target_: distill.sampling.Consistency, levels: [0.5]}\n", encoding="utf-8"
    )
    for run in ("run/student", "run"):  # into one folder: neither writes over the other
        assert command("sample", EXACT, f"run={run}", "prompt=x", "out=out")[0] == 0
    exports, own = (
        pixels(p) for p in sorted((tmp_path / "out").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    )
    model = student_of(str(tmp_path / "run"))
    how = {"shape": model.latent_shape, "steps": 1}
    x0 = Consistency(levels=[0.5])(model, model.embed(["x"]), seeded([0]), **how)
    expected = to_bytes(model.decode(x0).detach())[0].permute(1, 2, 0).numpy().astype(int)
    assert abs(own - expected).max() <= 1
    assert abs(own - exports).max() > 1


@pytest.mark.parametrize("size", [96, [96, 64]])
def test_a_size_of_one_s_own_is_the_pipeline_s(size, exported, command, tmp_path):
    folder, (width, height) = exported("unet"), [size, size] if isinstance(size, int) else size
    assert (
        command(
            "sample", EXACT, f"run={folder}", "prompt=x", f"size={size}".replace(" ", ""), "out=out"
        )[0]
        == 0
    )
    (path,) = (tmp_path / "out").iterdir()
    pipeline = AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": height, "width": width}
    expected = pipeline("x", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert Image.open(path).size == expected.size == (width, height)
    assert Image.open(path).text["size"] == str(size)
    assert abs(pixels(path) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize(("tiling", "taken"), [("false", "7.2 GB"), ("true", "0.8 GB")])
def test_a_picture_that_no_memory_holds_is_refused(
    tiling, taken, pipelines, command, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "distill.config.models.student_of", lambda *_: pytest.fail("weights were read")
    )
    monkeypatch.setattr("distill.machine.hardware.room", lambda kind: 5 * 10**8)
    words = [f"run={pipelines('unet')}", "prompt=x", "guidance=4", "size=[8192,8128]"]
    code, _, err = command("sample", *words, f"tiling={tiling}")
    assert code == 1
    what = f"a picture of 8192x8128 takes {taken} or more to decode, and 0.5 GB are free"
    assert f"size=[8192, 8128]: {what}; make it smaller" in err
    assert not (tmp_path / "samples").exists()


def test_what_was_not_distilled_is_sampled_with_guidance(family, pipelines, command, tmp_path):
    run = f"run={pipelines(family)}"
    code, _, err = command("sample", EXACT, run, "prompt=x")
    assert code == 1
    assert err.endswith("was not distilled to few steps; add guidance=5 steps=28 or the like\n")
    asked = [run, f"prompt='{PROMPTS[0]}'", "steps=3", "guidance=4.5"]
    assert command("sample", EXACT, *asked, "out=out")[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    model = student_of(str(pipelines(family)))
    with torch.no_grad():
        cond, shape = model.embed(PROMPTS[:1]), model.latent_shape
        x0 = guided(model, cond, seeded([0]), shape=shape, steps=3, guidance=4.5)
        expected = (model.decode(x0)[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    assert abs(pixels(path) - expected.round().numpy()).max() == 0
    assert Image.open(path).text["guidance"] == "4.5"


def test_what_was_not_distilled_goes_on_from_a_picture_too(pipelines, command, tmp_path):
    start, folder = tmp_path / "start.png", str(pipelines("mmdit"))
    Image.new("RGB", (64, 64), (200, 30, 30)).save(start)
    how = {"steps": 4, "guidance": 2.0, "strength": 0.5}
    asked = [f"run={folder}", f"prompt='{PROMPTS[0]}'", f"image={start}", "out=out"]
    given = [f"{key}={value}" for key, value in how.items()]
    assert command("sample", EXACT, *asked, *given)[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    model = student_of(folder)
    with torch.no_grad():
        image = model.encode(to_model_input(open_rgb(start, "image="), 64, 64))
        cond, shape = model.embed(PROMPTS[:1]), model.latent_shape
        x0 = guided(model, cond, seeded([0]), shape=shape, image=image, **how)
        expected = to_bytes(model.decode(x0))[0].permute(1, 2, 0)
    assert abs(pixels(path) - expected.numpy().astype(int)).max() == 0
    assert Image.open(path).text["strength"] == "0.5"


def test_a_picture_to_go_on_from_stands_upright(tmp_path):
    """As a phone writes it: what is left in the file is up, and a mark says so; diffusers reads it
    so too.
    """
    from diffusers.utils import load_image

    lying = np.zeros((64, 64, 3), np.uint8)
    lying[:, :32] = 255
    (exif := Image.Exif())[0x0112] = 6
    Image.fromarray(lying).save(tmp_path / "phone.jpg", exif=exif)
    found = to_model_input(open_rgb(tmp_path / "phone.jpg"), 64, 64)[0].permute(1, 2, 0)
    expected = np.asarray(load_image(str(tmp_path / "phone.jpg")))
    assert abs((found.numpy() + 1) * 127.5 - expected).max() < 0.01
    assert found[:20].mean() > 0.9
    assert found[44:].mean() < -0.9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["prompt=x", "prompts=y"], "prompt: given, and prompts too"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt: no such file; check the path"),
        (["prompts=blank.txt"], "prompts=blank.txt: has no line"),
        (
            ["prompt=x", "size=60"],
            "size=60: must be a multiple of 8 for this teacher; use 56 or 64",
        ),
        (["prompt=x", "size=100000"], "size=100000: must be"),
        (["prompt=x", "size=[64,64,64]"], "size=[64, 64, 64]: must be"),
        (["prompt=x", "size=64.5"], "size=64.5: must be"),
        (["prompt=x", "guidance=5"], "guidance=5: run="),
        (["prompt=x", "batch_size=0"], "batch_size=0: must be a whole number"),
        (
            ["prompt=x", "image=nowhere.png", "steps=2"],
            "image=nowhere.png: no such file",
        ),
    ],
)
def test_what_cannot_be_sampled_is_said(options, said, exported, command, tmp_path):
    (tmp_path / "blank.txt").write_text("\n", encoding="utf-8")
    code, _, err = command("sample", EXACT, f"run={exported('mmdit')}", *options)
    assert code == 1
    *before, last = err.splitlines()
    assert last.startswith(f"distill: {said}")
    assert all(line.startswith("loading ") for line in before)
    assert not (tmp_path / "samples").exists()


def test_an_id_of_the_hub_is_asked_for_its_class(command):
    code, _, err = command("sample", EXACT, "run=someone/something", "prompt=x")
    assert code == 1
    assert err.startswith(
        "distill: run=someone/something: no such folder, and cannot be fetched from the hub ("
    )


def test_an_id_of_the_hub_goes_to_its_adapter(exported, command, monkeypatch, tmp_path):
    """The hub is played by a folder."""
    folder = exported("unet")
    monkeypatch.setattr(
        "distill.teachers.loading.reading.hf_hub_download", lambda of, name: str(folder / name)
    )
    monkeypatch.setattr("distill.teachers.sd.SD.kind.download", lambda of, **_: str(folder))
    assert command("sample", EXACT, "run=someone/something", "prompt=x", "out=out")[0] == 0
    (path,) = (tmp_path / "out").iterdir()
    assert Image.open(path).text["run"] == "someone/something"
