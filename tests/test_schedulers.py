"""NitroFusion's timestep shift: the paper's table, the formula, and plain diffusers pipelines that
do what we do.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
)

import tiny
from distill import students
from distill.sampling import Consistency, draw_noise, seeded
from distill.teachers.schedulers import ShiftedLCMScheduler
from distill.teachers.sd import SD

# steps -> what LCM would take, and what a shift of 250 and of 500 make of it (by the authors' code)
TABLE = {
    1: ([999], [249], [499]),
    2: ([999, 499], [249, 124], [499, 249]),
    3: ([999, 749, 499], [249, 187, 124], [499, 374, 249]),
    4: ([999, 749, 499, 249], [249, 187, 124, 62], [499, 374, 249, 124]),
}
LEVELS = {249: (0.8218, 0.5697), 499: (0.5269, 0.8499), 124: (0.9292, 0.3696), 62: (0.9689, 0.2476)}


@pytest.mark.parametrize("steps", TABLE)
@pytest.mark.parametrize("shift", [250, 500])
def test_timesteps_are_those_of_the_table(steps, shift):
    scheduler = ShiftedLCMScheduler(shifted_timestep=shift)
    scheduler.set_timesteps(steps)
    assert scheduler.unshifted.tolist() == TABLE[steps][0]
    assert scheduler.timesteps.tolist() == TABLE[steps][1 if shift == 250 else 2]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_is_the_formula(prediction):
    """x0 by the constants that papers.md prints for SDXL's schedule, the next x by an alpha
    computed here.
    """
    scheduler = ShiftedLCMScheduler(shifted_timestep=250, prediction_type=prediction)
    scheduler.set_timesteps(2)
    x, output = torch.randn(
        2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    later = (1 - betas).cumprod(0)[499]
    found = scheduler.step(output, 249, x, generator=torch.Generator().manual_seed(1))
    alpha, sigma = LEVELS[249]
    x0 = (x - sigma * output) / alpha if prediction == "epsilon" else alpha * x - sigma * output
    torch.testing.assert_close(found.denoised, x0, rtol=1e-3, atol=1e-3)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        found.prev_sample,
        later.sqrt() * found.denoised + (1 - later).sqrt() * z,
        rtol=1e-5,
        atol=1e-5,
    )
    alpha, sigma = LEVELS[124]
    last = scheduler.step(output, 124, x)
    x0 = (x - sigma * output) / alpha if prediction == "epsilon" else alpha * x - sigma * output
    torch.testing.assert_close(
        last.prev_sample, x0, rtol=1e-3, atol=1e-3
    )  # the last step adds no noise


def test_a_schedule_stretched_to_end_in_noise(pipelines, tmp_path):
    """diffusers' own rescaling (arXiv 2305.08891), in the teacher and in what is exported of its
    student.
    """
    folder = shutil.copytree(pipelines("unet"), tmp_path / "v")
    file = folder / "scheduler" / "scheduler_config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(said | {"prediction_type": "v_prediction"}), encoding="utf-8")
    plain, teacher = SD(str(folder)), SD(str(folder), zero_terminal_snr=True)
    assert not plain.process.ends_in_noise
    assert teacher.process.ends_in_noise
    assert float(teacher.process.alpha(torch.ones(1))) == 0
    steps = torch.arange(1, 1001) / 1000
    student = students.full(teacher)
    for scheduler in (
        DDIMScheduler.from_config(teacher.pipeline.scheduler.config),
        Consistency().scheduler(student, teacher),
    ):
        expected = scheduler.alphas_cumprod.sqrt()
        torch.testing.assert_close(student.process.alpha(steps), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="zero_terminal_snr=true: this network predicts eps"):
        SD(str(pipelines("unet")), zero_terminal_snr=True)


@pytest.fixture(scope="module")
def shifted(teachers, tmp_path_factory):
    """A folder of a student with a shift, and the student."""
    teacher = teachers("unet")
    student = students.full(teacher, shift=250).eval()
    tiny.shake(student, 8)
    folder = tmp_path_factory.mktemp("shifted") / "student"
    students.save_pipeline(student, teacher, folder, Consistency().scheduler(student, teacher))
    return folder, student


def test_the_student_answers_at_the_shifted_step(shifted, teachers):
    _, student = shifted
    batch = tiny.simple_batch(tiny.ladd(teachers("unet")))
    t = torch.tensor([1.0, 0.5])
    with torch.no_grad():
        eps = student.model(
            batch.x0, torch.tensor([249, 124]), encoder_hidden_states=batch.cond.tokens
        ).sample
        expected = [
            (batch.x0[i] - s * eps[i]) / a for i, (a, s) in enumerate((LEVELS[249], LEVELS[124]))
        ]
        torch.testing.assert_close(
            student.x0(batch.x0, t, batch.cond), torch.stack(expected), rtol=2e-3, atol=2e-3
        )


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_plain_diffusers_gives_our_pixels(steps, shifted):
    folder, student = shifted
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["scheduler"] == ["distill.teachers.schedulers", "ShiftedLCMScheduler"]
    prompt, seed = tiny.CAPTIONS[0], 3
    pipeline = AutoPipelineForText2Image.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images
    opened = SD(str(folder))
    assert opened.network.shift == 250
    with torch.no_grad():
        cond = opened.embed([prompt])
        ours = Consistency()(opened, cond, seeded([seed]), shape=opened.latent_shape, steps=steps)
        alone = Consistency()(student, cond, seeded([seed]), shape=opened.latent_shape, steps=steps)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone, ours, rtol=2e-2, atol=2e-2)  # the folder is in half precision


def test_image_to_image_begins_at_the_unshifted_level(shifted):
    """Two steps of four: the picture is noised to the level of 499, and the network told 124 and
    62.
    """
    folder, _ = shifted
    pipeline = AutoPipelineForImage2Image.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    seed = {
        "generator": torch.Generator().manual_seed(3),
        "guidance_scale": 0.0,
        "output_type": "latent",
    }
    theirs = pipeline(
        tiny.CAPTIONS[0], image=latents, strength=0.5, num_inference_steps=4, **seed
    ).images
    opened = SD(str(folder))
    with torch.no_grad():
        cond = opened.embed(tiny.CAPTIONS[:1])
        how = {"shape": opened.latent_shape, "steps": 4, "image": latents, "strength": 0.5}
        ours = Consistency()(opened, cond, seeded([3]), **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_it_goes_on_any_pipeline_and_survives_saving(pipelines, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(pipelines("unet"), safety_checker=None)
    scheduler = ShiftedLCMScheduler.from_config(pipeline.scheduler.config, shifted_timestep=500)
    scheduler.save_pretrained(tmp_path)
    again = ShiftedLCMScheduler.from_pretrained(tmp_path)
    assert again.config.shifted_timestep == 500
    torch.testing.assert_close(again.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


@pytest.mark.parametrize("shift", [0, 1001])
def test_a_shift_that_cannot_be_is_refused(shift, teachers):
    with pytest.raises(ValueError, match=f"student.shift={shift}: must lie in"):
        students.full(teachers("unet"), shift=shift)
    with pytest.raises(ValueError, match=r"student\.shift=250: .* eps or v"):
        students.full(teachers("mmdit"), shift=250)


def test_noise_is_what_a_pipeline_draws():
    noise = draw_noise((4, 8, 8), seeded([5]))
    assert torch.equal(noise, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("shift", [None, 500])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_an_exported_schedule_is_the_teachers(shift, zero_snr):
    """That a schedule was rescaled to end in pure noise, and betas of its own, go along."""
    how = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    of_teacher = DDIMScheduler(beta_schedule="scaled_linear", **how)
    teacher = SimpleNamespace(pipeline=SimpleNamespace(scheduler=of_teacher))
    student = SimpleNamespace(prediction="v", shift=shift, process=None)
    found = Consistency().scheduler(student, teacher)
    torch.testing.assert_close(found.alphas_cumprod, of_teacher.alphas_cumprod)
    again = type(found).from_config(dict(found.config))
    torch.testing.assert_close(again.alphas_cumprod, of_teacher.alphas_cumprod)
