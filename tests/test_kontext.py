"""FLUX Kontext, which reads its source as further tokens, against its own pipeline in diffusers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from PIL import Image

import families
import tiny
from distill.config.models import student_of
from distill.core.score_distillation import guided_x0
from distill.sampling import Euler, seeded
from distill.sampling.guided import guided
from distill.students import full, save_pipeline
from families import opened, packed, unpacked
from test_editors import LADD, ORDERS, SOURCE, pairs  # noqa: F401

# Without these the pipeline makes pictures of about 1024 x 1024, and such sources.
SMALL = {"max_area": tiny.SIDE**2, "_auto_resize": False, **families.CALL_OF_FLUX}


@pytest.fixture(scope="module")
def folder(family_folders):
    return family_folders("flux_kontext")


@pytest.fixture(scope="module")
def teacher(family_teachers):
    return family_teachers("flux_kontext")


def conditioned(teacher):
    return replace(teacher.embed(ORDERS), image=teacher.image_of({"source": SOURCE}))


def noise(seed=0):
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_source_is_scaled_as_the_sample(teacher):
    assert (teacher.image_channels, teacher.latent_shape) == (4, (4, 16, 16))
    torch.testing.assert_close(teacher.image_of({"source": SOURCE}), teacher.encode(SOURCE))
    with pytest.raises(ValueError, match="^this teacher edits pictures, and these data have no"):
        teacher.image_of({"pixels": SOURCE})
    with pytest.raises(ValueError, match="reads 4 channels of pictures .* has 0"):
        teacher.x0(noise(), torch.tensor([0.9, 0.4]), teacher.embed(ORDERS))


@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_a_guided_estimate_is_one_step_of_the_pipeline(sigma, teacher, folder):
    pipeline, x_t = opened(folder), noise()
    assert type(pipeline) is FluxKontextPipeline
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()  # a step to 0 of it is the estimate
    options = {"num_inference_steps": 1, "sigmas": [sigma], "output_type": "latent", **SMALL}
    options |= {"guidance_scale": 3.5, "true_cfg_scale": 5.0, "negative_prompt": [""] * 2}
    expected = pipeline(SOURCE, ORDERS, latents=packed(x_t), **options).images
    t, cond = torch.full((2,), sigma), conditioned(teacher)
    with torch.no_grad():
        found = guided_x0(teacher, x_t, t, cond, torch.tensor(5.0))
        swapped = replace(cond, image=cond.image.flip(0))
        other = guided_x0(teacher, x_t, t, swapped, torch.tensor(5.0))
    torch.testing.assert_close(found, unpacked(expected), rtol=0, atol=1e-4)
    assert (other - found).abs().max() > 1e-3


def test_many_steps_are_those_of_the_pipeline(teacher, folder):
    """The source's tokens do not count for the shift of the grid."""
    options = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 3.5, **SMALL}
    expected = opened(folder)(SOURCE, ORDERS, generator=seeded([3, 4]), **options).images
    settings = {"shape": teacher.latent_shape, "steps": 3, "guidance": 1.0}
    found = guided(teacher, conditioned(teacher), seeded([3, 4]), **settings)
    torch.testing.assert_close(found, unpacked(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_student_gives_our_pixels_in_the_same_pipeline(steps, teacher, tmp_path):
    student = tiny.shake(full(teacher), 9, std=0.03).eval()
    sampler = Euler()
    scheduler = sampler.scheduler(student, teacher)
    folder = save_pipeline(student, teacher, tmp_path / "student", scheduler, sampler)
    pipeline, read = opened(folder), student_of(str(folder))
    assert type(pipeline) is FluxKontextPipeline
    assert read.family_options() == teacher.family_options()
    with torch.no_grad():
        options = {"shape": read.latent_shape, "steps": steps}
        found = read.decode(sampler(read, conditioned(read), seeded([3, 4]), **options))
    call = {"num_inference_steps": steps, "guidance_scale": 3.5, "output_type": "pt", **SMALL}
    made = pipeline(SOURCE, ORDERS, generator=seeded([3, 4]), **call).images
    torch.testing.assert_close(made, (found / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_maps_are_of_the_picture_s_own_tokens(teacher):
    x_t, t, cond = noise().requires_grad_(), torch.tensor([0.9, 0.4]), conditioned(teacher)
    heard = families.heard(teacher, x_t.detach(), t, cond)
    swapped = replace(cond, image=cond.image.flip(0))
    others = teacher.features(x_t, t, swapped, teacher.blocks)
    maps = teacher.features(x_t, t, cond, teacher.blocks)
    for name, found, other in zip(teacher.blocks, maps, others, strict=True):
        tokens = heard[name][1]
        assert tokens.shape[1] == 2 * 8 * 8
        assert found.shape == (2, teacher.channels[name], 8, 8)
        assert torch.equal(found[:, :, 3, 5], tokens[:, 3 * 8 + 5])
        assert not torch.allclose(found, other, atol=1e-4)
        assert torch.autograd.grad(found.sum(), x_t, retain_graph=True)[0].abs().max() > 0


# -- the commands ----------------------------------------------------------------------------------

OWN = [*LADD[:3], "teacher=flux_kontext", "teacher.dtype=float32"]
OWN += [f"teacher.size={tiny.SIDE}", "teacher.length=64"]


@pytest.mark.slow
def test_a_run_on_pairs_leaves_an_editor_that_samples(command, folder, pairs, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    words = [*OWN, f"teacher.path={folder}", "data=pairs", f"data.path={pairs}", "data.size=64"]
    words += ["data.num_workers=0", "method.distill_weight=1", f"run_dir={run}"]
    code, _, err = command("run", *words)
    assert code == 0, err
    index = json.loads((run / "student" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "FluxKontextPipeline"
    pixels = ((SOURCE[0] + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(tmp_path / "source.png")
    ask = [f"run={run}", "prompt=make it red", "out=drawn", "seed=3", "precision=32-true"]
    code, out, err = command("sample", *ask, f"image={tmp_path / 'source.png'}")
    assert code == 0, err
    made = np.asarray(Image.open(out.strip()))
    options = {"num_inference_steps": 1, "generator": seeded([3]), **SMALL}
    options["guidance_scale"] = 2.5  # that of the configuration
    expected = opened(run / "student")(SOURCE[:1], ["make it red"], output_type="np", **options)
    assert np.abs(made / 255.0 - expected.images[0]).max() < 0.01


def test_what_an_in_context_editor_does_not_take_is_refused(command, folder, pairs, tmp_path):  # noqa: F811
    words = [*OWN, f"teacher.path={folder}", "data=pairs", f"data.path={pairs}", "data.size=64"]
    code, _, err = command("run", *words, "method.distill.image_guidance=1.5")
    assert code == 1
    said = "method.distill.image_guidance=1.5: a FluxKontextPipeline is not guided by its source"
    assert said in err
    pictures = tiny.write_pictures(tmp_path / "pictures", 2)
    data = ["data=images", f"data.path={pictures}", "data.size=64"]
    code, _, err = command("run", *OWN, f"teacher.path={folder}", *data)
    assert code == 1
    assert "these data have no source pictures; give edit pairs by data=pairs" in err
    plain = families.write("flux", tmp_path / "flux")
    code, _, err = command("run", *OWN, f"teacher.path={plain}", *words[-3:])
    assert code == 1
    assert "holds a FluxPipeline" in err
    assert err.count("\n") == 1
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    ask = [f"run={folder}", "prompt=x", "out=drawn", "guidance=2", f"image={tmp_path / 'a.png'}"]
    code, _, err = command("sample", *ask, "image_guidance=1.5")
    assert code == 1
    assert "image_guidance=1.5: a model that reads it in context is not guided by its" in err
