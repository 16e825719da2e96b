"""Inpainting: what a network reads beside the sample, masks, and the pipelines of nine channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cards
import families
import tiny
from distill.core.score_distillation import guided_x0
from distill.core.types import FILL, Cond
from distill.data.masks import Masks, masks_of
from distill.data.source import images
from distill.exporting.card import write_card
from distill.sampling import Consistency, Euler, seeded
from distill.students import full, save_pipeline
from families import INPAINTERS, opened, packed, unpacked

PROMPTS = tiny.CAPTIONS[:2]
FLOWS = ("sd3_inpaint", "flux_fill")
CHANNELS = {"sd_inpaint": 5, "sdxl_inpaint": 5, "sd3_inpaint": 17, "flux_fill": 20}
each = pytest.mark.parametrize("family", INPAINTERS)


@pytest.fixture
def inpainting(family_folders):
    return family_folders


@pytest.fixture
def fillers(family_teachers):
    return family_teachers


def asked(family):
    """Arguments of its pipeline to fill a part of a small picture, from pure noise."""
    picture, mask = picture_and_mask()
    call = families.CALL_OF_FLUX if family == "flux_fill" else families.SMALL
    return {"image": [picture] * 2, "mask_image": [mask] * 2, "strength": 1.0, **call}


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def picture_and_mask():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[8:40, 16:60] = 255
    return picture, Image.fromarray(mask)


def batch_of(count):
    picture, mask = picture_and_mask()
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    fill = (torch.from_numpy(np.array(mask)) > 0).float()
    return {
        "pixels": pixels.expand(count, -1, -1, -1),
        FILL: fill.expand(count, 1, -1, -1),
        "caption": PROMPTS[:count],
    }


def cond_of(teacher, count=2):
    return replace(teacher.embed(PROMPTS[:count]), image=teacher.image_of(batch_of(count)))


# -- against diffusers -----------------------------------------------------------------------------


@each
def test_a_guided_estimate_is_that_of_the_pipeline(family, inpainting, fillers):
    """FLUX's guidance is an input of its network: its pipeline has no second pass."""
    teacher, pipeline = fillers(family), opened(inpainting(family))
    assert type(pipeline) is teacher.kind
    of_flux, flow = family == "flux_fill", family in FLOWS
    assert tuple(teacher.latent_shape) == (16 if family == "sd3_inpaint" else 4, 16, 16)
    x_t = noise(2, *teacher.latent_shape)
    seen, step = [], pipeline.scheduler.step

    def spy(output, index, x, **options):
        seen.append((float(index), output, x))
        return step(output, index, x, **options)

    pipeline.scheduler.step = spy
    options = {"sigmas": [0.6]} if flow else {}
    pipeline(
        PROMPTS, latents=packed(x_t) if of_flux else x_t.clone(), num_inference_steps=1,
        guidance_scale=teacher.guidance if of_flux else 5.0, output_type="latent",
        **options, **asked(family),
    )  # fmt: skip
    ((index, output, x),) = seen
    if of_flux:
        output, x = unpacked(output), unpacked(x)
    t = torch.full((2,), index / 1000)
    t = t if flow else teacher.process.time(torch.tensor([int(index)] * 2))
    cond, scale = cond_of(teacher), 1.0 if of_flux else 5.0
    with torch.no_grad():
        found = guided_x0(teacher, x, t, cond, torch.tensor(scale))
        nothing = replace(cond, image=torch.zeros_like(cond.image))
        other = guided_x0(teacher, x, t, nothing, scale)
    expected = teacher.process.to_x0(output, x, t, teacher.prediction)
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * size)
    assert (other - expected).abs().max() > 1e-3 * size  # the image channels matter


def exported(teacher, sampler, folder):
    """A student of other weights, and its folder."""
    student = full(teacher)
    tiny.shake(student, 5, std=0.02)
    scheduler = sampler.scheduler(student, teacher)
    return student, save_pipeline(student, teacher, folder, scheduler, sampler)


def with_shift(pipeline):
    """The pipeline, decoding with the autoencoder's shift: SD3's leaves it out."""
    decode, shift = pipeline.vae.decode, pipeline.vae.config.shift_factor
    pipeline.vae.decode = lambda z, **how: decode(z + shift, **how)
    return pipeline


@each
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exported_student_has_the_same_pixels_in_diffusers(family, steps, fillers, tmp_path):
    """Pipelines of flows give the noise of later steps no generator, unless the student has
    Euler's steps, which draw none.
    """
    teacher, sampler = fillers(family), Euler() if family in FLOWS else Consistency()
    student, folder = exported(teacher, sampler, tmp_path / "student")
    with torch.no_grad():
        options = {"shape": teacher.latent_shape, "steps": steps}
        x0 = sampler(student, cond_of(teacher), seeded([3, 4]), **options)
        expected = ((teacher.pictures(x0) + 1) / 2).clamp(0, 1)
    pipeline, flow = opened(folder), family in FLOWS
    assert type(pipeline) is teacher.kind
    options = {"sigmas": [1 - i / steps for i in range(steps)]} if flow else {}
    pipeline = with_shift(pipeline) if family == "sd3_inpaint" else pipeline
    found = pipeline(
        PROMPTS, num_inference_steps=steps, output_type="pt", generator=seeded([3, 4]),
        guidance_scale=getattr(teacher, "guidance", 0.0), **options, **asked(family),
    ).images  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("family", "steps"), [(family, 3) for family in FLOWS])
def test_the_card_s_code_fills_as_we_do(family, steps, fillers, tmp_path):
    teacher, sampler = fillers(family), Consistency()
    student, folder = exported(teacher, sampler, tmp_path / "student")
    text = write_card(folder, tmp_path).read_text(encoding="utf-8")
    assert "pipeline_tag: image-to-image" in text
    picture, mask = picture_and_mask()
    found = cards.drawn(folder, PROMPTS[0], steps=steps, seed=0, image=picture, mask=mask)
    with torch.no_grad():
        options = {"shape": teacher.latent_shape, "steps": steps}
        x0 = sampler(student, cond_of(teacher, 1), seeded([0]), **options)
        expected = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert (255 * (found - expected)).abs().max() <= 1.01


# -- the conditioning ------------------------------------------------------------------------------


def test_every_operation_of_a_cond_keeps_its_image():
    null = Cond(tokens=torch.zeros(1, 2, 3))
    image = torch.arange(2 * 5 * 4 * 4.0).view(2, 5, 4, 4)
    cond = Cond(tokens=torch.ones(2, 2, 3), null=null, image=image)
    assert torch.equal(cond.index(slice(1, 2)).image, image[1:])
    assert torch.equal(cond.unconditional().image, image)
    assert torch.equal(Cond.cat([cond, cond.unconditional()]).image, torch.cat([image, image]))
    assert cond.to(torch.float16).image.dtype == torch.float16
    assert torch.equal(cond.crop([1, 2], [2, 1]).image, image[:, :, 1:3, 2:3])
    assert cond.unconditional().null is null
    with pytest.raises(ValueError, match="share one batch size"):
        replace(cond, image=image[:1])
    with pytest.raises(ValueError, match="1 of 2 Conds have 'image'"):
        Cond.cat([cond, replace(cond, image=None)])


@each
def test_a_network_refuses_other_channels_than_its_own(family, fillers, teachers):
    teacher, t = fillers(family), torch.tensor([0.5, 0.5])
    x_t = torch.zeros(2, 4, 16, 16)
    said = f"reads {CHANNELS[family]} channels of pictures .* has 0"
    with pytest.raises(ValueError, match=said):
        teacher.x0(torch.zeros(2, *teacher.latent_shape), t, teacher.embed(PROMPTS))
    plain = teachers("unet")
    cond = replace(plain.embed(PROMPTS), image=torch.zeros(2, 5, 16, 16))
    with pytest.raises(ValueError, match="reads 0 channels of pictures .* has 5"):
        plain.x0(x_t, t, cond)
    with pytest.raises(ValueError, match="these data have no masks"):
        teacher.image_of({"pixels": torch.zeros(2, 3, 64, 64)})
    with pytest.raises(ValueError, match="^a mask of 32x64 pixels for a picture of 64x64$"):
        teacher.image_of({"pixels": torch.zeros(2, 3, 64, 64), FILL: torch.zeros(2, 1, 64, 32)})


@each
def test_maps_see_the_picture_and_pass_gradient_to_the_sample(family, fillers):
    """As a discriminator reads them."""
    teacher, t = fillers(family), torch.tensor([0.9, 0.4])
    x_t, cond = noise(2, *teacher.latent_shape).requires_grad_(), cond_of(teacher)
    side = 16 // teacher.patch
    nothing = replace(cond, image=torch.zeros_like(cond.image))
    blind = teacher.features(x_t, t, nothing, teacher.blocks)
    for found, other in zip(teacher.features(x_t, t, cond, teacher.blocks), blind, strict=True):
        assert teacher.patch == 1 or found.shape[-2:] == (side, side)
        assert torch.autograd.grad(found.sum(), x_t, retain_graph=True)[0].abs().max() > 0
        assert not torch.allclose(found, other, atol=1e-4)


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        ("boxes", 0.03, 0.85),
        ("strokes", 0.03, 0.85),
        ("half", 0.25, 0.75),
        ("outpainting", 0.3, 0.9),
    ],
)
def test_a_kind_of_mask_fills_its_share(kind, least, most):
    drawn = masks_of({kind: 1})(0, range(200), (48, 96))
    assert drawn.shape == (200, 1, 48, 96)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    shares = drawn.mean((1, 2, 3))
    assert least <= shares.min()
    assert shares.max() <= most
    assert len({row.numpy().tobytes() for row in drawn}) > 80


def test_a_mask_is_of_its_place_and_seed_alone():
    masks = Masks()
    ahead = masks(3, range(8), (64, 64))
    assert torch.equal(masks(3, range(5, 8), (64, 64)), ahead[5:])
    assert not torch.equal(masks(4, range(8), (64, 64)), ahead)


def test_two_processes_and_a_resumed_run_read_the_same_masks(tmp_path):
    folder = tiny.write_pictures(tmp_path / "pictures", 12)

    def batches(size, count, **where):
        source = images(str(folder), size=64, batch_size=size, masks=True)
        loader = iter(source.loader(seed=7, **where))
        return [next(loader) for _ in range(count)]

    whole = batches(4, 3)
    halves = [batches(2, 3, rank=rank, world=2) for rank in (0, 1)]
    for step in range(3):
        for key in ("pixels", FILL):
            joined = torch.cat([half[step][key] for half in halves])
            assert torch.equal(joined, whole[step][key])
    (later,) = batches(4, 1, start=2)
    assert torch.equal(later[FILL], whole[2][FILL])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"circles": 1}, "data.masks.circles: there is no such kind; there are boxes, strokes"),
        ({"boxes": -1}, "data.masks.boxes=-1: must be a number, 0 or more"),
        ({"boxes": 0}, "data.masks: all odds are 0"),
    ],
)
def test_odds_that_cannot_be_are_named(value, said):
    with pytest.raises(ValueError, match=said):
        masks_of(value)


# -- whole runs ------------------------------------------------------------------------------------


def run(command, inpainting, tmp_path, name, *words):
    data = tmp_path / "pictures"
    if not data.exists():
        tiny.write_pictures(data, 12)
    return command(
        "run", "experiment=sd_inpaint_turbo", f"teacher.path={inpainting('sd_inpaint')}",
        "teacher.config=null", f"data.path={data}", "data.size=64", "debug=smoke",
        f"run_dir={tmp_path / name}", *words,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_leaves_a_student_that_fills_masks(command, inpainting, tmp_path):
    code, _, err = run(command, inpainting, tmp_path, "run")
    assert code == 0, err
    assert list((tmp_path / "run" / "samples").glob("step_*.png"))
    picture, mask = picture_and_mask()
    found = opened(tmp_path / "run" / "student")(
        PROMPTS[0], image=picture, mask_image=mask, height=64, width=64, strength=1.0,
        guidance_scale=0.0, num_inference_steps=1, output_type="pt",
    ).images  # fmt: skip
    assert found.isfinite().all()


RUNS = {
    "sd3_inpaint": [],
    "flux_fill": [f"teacher.{key}={value}" for key, value in families.OF_FLUX.items()],
}


@pytest.mark.slow
@pytest.mark.parametrize("family", RUNS)
def test_a_run_of_a_flow_leaves_a_student_that_samples_as_its_pipeline(
    family, command, inpainting, tmp_path
):
    data, run = tiny.write_pictures(tmp_path / "pictures", 8), tmp_path / "run"
    words = ["method=ladd", f"teacher={family}", f"teacher.path={inpainting(family)}"]
    words += ["teacher.dtype=float32", "data=images", "data.masks=true", f"data.path={data}"]
    words += ["data.size=64", "data.num_workers=0", "method.distill_weight=2.5", "sampler=euler"]
    code, _, err = command(
        "run", *words, *RUNS[family], "~metrics", "debug=smoke", f"run_dir={run}"
    )
    assert code == 0, err
    picture, mask = picture_and_mask()
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    given = [f"run={run}", "prompt=a star", "out=drawn", "seed=3", "steps=2"]
    given += ["precision=32-true", f"image={tmp_path / 'picture.png'}"]
    code, out, err = command("sample", *given, f"mask={tmp_path / 'mask.png'}")
    assert code == 0, err
    pipeline = opened(run / "student")
    pipeline = with_shift(pipeline) if family == "sd3_inpaint" else pipeline
    options = {**asked(family), "image": picture, "mask_image": mask, "sigmas": [1.0, 0.5]}
    options |= {"guidance_scale": 30.0 if family == "flux_fill" else 0.0}
    expected = pipeline(
        "a star", generator=seeded([3]), num_inference_steps=2, output_type="np", **options
    ).images[0]
    assert np.abs(np.asarray(Image.open(out.strip())) / 255.0 - expected).max() < 0.01


def test_a_teacher_of_another_kind_is_named_at_once(command, inpainting, pipelines, tmp_path):
    data = tiny.write_pictures(tmp_path / "pictures", 2)
    given = [f"data.path={data}", "data.size=64", "teacher.config=null"]
    code, _, err = command(
        "run", "experiment=sd_inpaint_turbo", f"teacher.path={pipelines('unet')}", *given
    )
    assert code == 1
    assert err.count("\n") == 1
    assert "StableDiffusionPipeline" in err
    assert "choose another teacher=" in err
    plain = ["method=ladd", "teacher=sd15", "data=images"]
    code, _, err = command("run", *plain, f"teacher.path={inpainting('sd_inpaint')}", *given)
    assert code == 1
    assert err.count("\n") == 1
    assert "StableDiffusionInpaintPipeline" in err
    code, _, err = run(command, inpainting, tmp_path, "no_masks", "data.masks=false")
    assert code == 1
    assert "these data have no masks" in err


def test_masks_are_drawn_where_a_smoke_test_has_no_data(command, inpainting):
    """The doctor assumes the same renders, and counts a step of them."""
    words = ["teacher=sd_inpaint", f"teacher.path={inpainting('sd_inpaint')}", "debug=smoke"]
    code, out, err = command("doctor", "method=ladd", *words, "teacher.config=null", "~metrics")
    assert (code, err) == (0, "")
    assert "no data given: renders of shapes are assumed" in out
    assert "held between steps, in GB: student" in out
