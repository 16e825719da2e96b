"""`distill.sample` fills the masked part of a picture by the student of an inpainting teacher."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import families
import tiny
from distill.config import picture_keys
from distill.core.types import FILL
from distill.evaluation.features import open_rgb
from distill.exporting.card import write_card
from distill.sampling import Consistency
from distill.students import full, save_pipeline
from families import opened
from test_inpaint import picture_and_mask

EXACT = "precision=32-true"  # as plain diffusers draws, on any machine
PROMPT = tiny.CAPTIONS[0]
CASES = ("sd_inpaint", "sdxl_inpaint")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Family -> the folder of a student that fills masks."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("filling")
            teacher = families.teacher_at(families.write(family, folder / "teacher"))
            student, sampler = tiny.shake(full(teacher), 5, std=0.02), Consistency()
            made[family] = save_pipeline(
                student, teacher, folder / "student", sampler.scheduler(student, teacher), sampler
            )
        return made[family]

    return of


@pytest.fixture
def asked(tmp_path):
    """The words that name a picture and its mask."""
    picture, mask = picture_and_mask()
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    return [f"image={tmp_path / 'picture.png'}", f"mask={tmp_path / 'mask.png'}"]


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


@pytest.mark.parametrize("family", CASES)
def test_a_filled_picture_is_the_pipeline_s(family, exported, asked, command, tmp_path):
    folder = exported(family)
    words = [EXACT, f"run={folder}", f"prompt='{PROMPT}'", *asked]
    code, _, err = command("sample", *words, "seed=3", "out=out")
    assert code == 0, err
    (path,) = (tmp_path / "out").iterdir()
    picture, mask = picture_and_mask()
    expected = opened(folder)(
        PROMPT, image=picture, mask_image=mask, height=64, width=64, strength=1.0,
        guidance_scale=0.0, num_inference_steps=1, generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert abs(pixels(path) - np.asarray(expected, dtype=int)).max() <= 1
    assert Image.open(path).text["mask"].endswith("mask.png")
    assert Image.open(path).text["strength"] == "1.0"
    if family == "sdxl":
        return
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "picture.png")
    assert command("sample", *words, "seed=3", "out=other")[0] == 0
    (other,) = (tmp_path / "other").iterdir()
    assert abs(pixels(path) - pixels(other)).max() > 3  # what is around the mask matters


def test_several_steps_prompts_and_sizes_are_filled(exported, asked, command, tmp_path):
    code, _, err = command(
        "sample", EXACT, f"run={exported('sd_inpaint')}", "prompts=[one,two]", "count=2", "steps=4",
        "strength=0.5", "size=[96,64]", *asked, "out=out",
    )  # fmt: skip
    assert code == 0, err
    paths = sorted(p for p in (tmp_path / "out").iterdir() if p.name != "grid.png")
    assert len(paths) == 4
    assert {Image.open(path).size for path in paths} == {(96, 64)}


def test_a_mask_of_grey_levels_is_cut_at_half(tmp_path):
    from distill.sample import _around

    grey = np.full((64, 64), 100, np.uint8)
    grey[:32] = 150
    Image.fromarray(grey).save(tmp_path / "grey.png")

    class Model:
        def image_of(self, batch):
            return batch[FILL]

    cfg = type("Settings", (), {"mask": str(tmp_path / "grey.png")})
    found = _around(cfg, Model(), torch.zeros(1, 3, 64, 64))
    assert found.shape == (1, 1, 64, 64)
    assert (found[..., :32, :] == 1).all()
    assert (found[..., 32:, :] == 0).all()


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [("i.tif", (0, 255), np.int32), ("16.png", (300, 40_000), np.uint16)],
)
def test_a_mask_of_more_bits_is_checked_as_it_is_read(name, values, kind, tmp_path):
    grey = np.full((64, 64), values[0], kind)
    grey[:32] = values[1]
    Image.fromarray(grey).save(tmp_path / name)
    picture_keys.check_mask("picture.png", (64, 64), str(tmp_path / name))
    read = np.asarray(open_rgb(tmp_path / name))
    assert (read[:32] >= 128).all()
    assert (read[32:] < 128).all()


def test_dark_16_bits_of_a_pgm_stay_dark(tmp_path):
    """Pillow reads them in the mode of 32-bit integers."""
    Image.fromarray(np.full((8, 8), 255, np.uint16)).save(tmp_path / "dark.pgm")
    assert Image.open(tmp_path / "dark.pgm").mode == "I"
    assert np.asarray(open_rgb(tmp_path / "dark.pgm")).max() == 0


def test_a_mask_whose_white_is_cropped_away_is_named(asked, exported, command, tmp_path):
    mask = np.zeros((64, 200), np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(tmp_path / "edge.png")
    Image.new("RGB", (200, 64)).save(tmp_path / "wide.png")
    given = [f"run={exported('sd_inpaint')}", "prompt=x", "image=wide.png", "mask=edge.png"]
    code, _, err = command("sample", *given)
    assert code == 1
    assert "mask=edge.png: its white lies outside of the crop of the picture to 64x64; give" in err
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"mask": None}, "run=.*: fills masked parts of pictures; add image=<picture> mask="),
        ({"image": None}, "mask=.*: there is no picture to fill; add image="),
        ({"mask": "nowhere.png"}, "mask=nowhere.png: no such file; give a picture of the size"),
        (
            {"mask": "small.png"},
            "mask=small.png: is 32x64, and image=.* is 64x64; make them of one",
        ),
        ({"mask": "black.png"}, "mask=black.png: has no white, so nothing to fill"),
        ({"mask": "dark.png"}, "mask=dark.png: has no white, so nothing to fill"),
        ({"mask": "floats.tif"}, "mask=floats.tif: cannot be read .*its pixels are floats; save"),
        ({"mask": "text.png"}, "mask=text.png: cannot be read as a picture"),
        ({"image": "text.png"}, "image=text.png: cannot be read as a picture .*; give another"),
        ({"mask": "clear.png"}, "mask=clear.png: has transparent parts, which may mean both; save"),
        ({"image": "turned.jpg"}, "mask=.*: is 64x64, and image=turned.jpg is 32x64; make them"),
        ({"size": "61"}, "size=61: must be a multiple of 4 for this teacher; use 60 or 64"),
        ({"run": "mmdit"}, "mask=.*: run=.* is no inpainting model and fills no masks"),
        ({"strength": 0.2}, "steps=1 strength=0.2: their product must be at least 1"),
    ],
)
def test_what_cannot_be_filled_is_said_before_weights_are_read(
    changed, said, exported, pipelines, asked, command, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "distill.config.models.student_of", lambda *_: pytest.fail("weights were read")
    )
    Image.new("L", (32, 64), 255).save(tmp_path / "small.png")
    Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
    # Of 65535; and not known to be white.
    Image.fromarray(np.full((64, 64), 300, np.uint16)).save(tmp_path / "dark.png")
    Image.fromarray(np.ones((64, 64), np.float32)).save(tmp_path / "floats.tif")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (clear := Image.new("RGBA", (64, 64))).paste("white", (8, 8, 40, 40))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 32)).save(tmp_path / "turned.jpg", exif=exif)
    given = dict(word.split("=", 1) for word in asked)
    given |= {"run": str(exported("sd_inpaint")), "prompt": "x"} | changed
    if changed.get("run"):
        given["run"] = str(pipelines(changed["run"]))
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    code, _, err = command("sample", *words)
    assert code == 1
    assert err.count("\n") == 1
    assert re.match(f"distill: {said}", err), err
    assert not (tmp_path / "samples").exists()


def test_commands_of_whole_pictures_refuse_what_fills_masks(exported, command, tmp_path):
    folder = exported("sd_inpaint")
    (tmp_path / "prompts.txt").write_text("x\n", encoding="utf-8")
    code, _, err = command(
        "evaluate", f"run={folder}", "metrics=prompts", "metrics.path=prompts.txt"
    )
    assert code == 1
    assert err.count("\n") == 1
    assert (
        "fills masked parts of pictures, and this evaluation makes whole ones; use the sample"
        in err
    )
    with pytest.raises(ValueError, match="teacher=.*fills masked parts"):
        picture_keys.refuse_readers(str(folder), "the demonstration", "teacher")


def test_the_card_calls_the_pipeline_with_a_mask(exported, tmp_path):
    from huggingface_hub import ModelCard

    folder = exported("sd_inpaint")
    text = ModelCard.load(write_card(folder, tmp_path, None)).text
    code = text.split("```python")[1].split("```")[0]
    picture, mask = picture_and_mask()
    within = {"image": picture, "mask": mask}
    exec(code.replace("<this folder>", str(folder)), within)
    assert within["picture"].size == (64, 64)


def test_shapes_are_masked_by_their_numbers_alone():
    from distill.evaluation.shapes import masked
    from distill.worlds.shapes.judge import fresh_renders, judging_prompts

    prompts = judging_prompts(6, seed=0)
    found, some = masked(prompts, range(6)), masked(prompts[4:], [4, 5])
    assert all(torch.equal(some[key], found[key][4:]) for key in found)
    assert found["pixels"].shape == (6, 3, 64, 64)
    assert found[FILL].shape == (6, 1, 64, 64)
    assert 0.05 < found[FILL].mean() < 0.95
    assert not torch.equal(found["pixels"], fresh_renders(prompts, seed=0))


@pytest.mark.slow
def test_an_inpainting_student_of_shapes_is_evaluated(exported, tmp_path):
    """It fills masked renders; the scores are those of whole pictures."""
    from distill.config.models import student_of
    from distill.evaluation.shapes import generate_pictures
    from distill.terminal.progress import Bar
    from distill.worlds.shapes.judge import judging_prompts

    model, seen = student_of(str(exported("sd_inpaint"))), []

    def sample(cond, generators):
        seen.append(cond.image)
        return torch.zeros(len(generators), *model.latent_shape)

    prompts = judging_prompts(3, seed=0)
    with Bar("filling", 3) as bar:
        assert len(generate_pictures(model, sample, prompts, range(3), bar)) == 3
        generate_pictures(model, sample, [prompts[1]] * 2, [5, 6], bar, [1, 1])
    assert seen[0].shape == (3, 5, 16, 16)
    torch.testing.assert_close(seen[1], seen[0][1:2].expand(2, -1, -1, -1))
