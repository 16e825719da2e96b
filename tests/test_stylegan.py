"""`student=stylegan`: a GAN's generator, from its layers to what a user does with a run of it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from omegaconf import OmegaConf
from safetensors.torch import load_file

import distill
import golden
import tiny
from distill.config.models import student_of
from distill.core.types import Cond
from distill.sampling import sampler_of
from distill.students.stylegan import parameters, stylegan
from distill.teachers import generator as layers

SEED, PROMPT = 3, "a large red star on black"
EXACT = "precision=32-true"
WORDS = [*golden.FEW, *golden.EYES, "loop.head_start=0", "loop.warmup_steps=0", "method=add"]
WORDS += ["student=stylegan", "student.channels=16", "method.levels.odds=[1,0,0,0]"]
WORDS += ["trainer.max_steps=2", "callbacks.checkpoint.every=1"]


def words(pipelines, folder, *more):
    eyes = f"discriminator.features.path={tiny.vit()}"
    return [*WORDS, f"teacher.path={pipelines('mmdit')}", eyes, f"run_dir={folder}", *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pipelines):
    """A finished run, trained by the commands' own words in Python's names."""
    folder = tmp_path_factory.mktemp("stylegan") / "run"
    settings = distill.compose(*words(pipelines, folder))
    teacher = distill.load_teacher(settings)
    data = distill.load_data(settings, teacher)
    student = distill.make_student(settings, teacher)
    players = distill.make_players(settings, teacher, student)
    method = distill.ADD(players, **distill.arguments(settings))
    distill.make_trainer(settings).fit(method, data)
    return settings, method, distill.save_student(settings, method, folder / "student")


def inputs(count=2):
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(count, 4, 16, 16, generator=generator)
    pooled = torch.randn(count, 8, generator=generator)
    return noise, Cond(tokens=torch.zeros(count, 1, 1), pooled=pooled)


def network(**options):
    torch.manual_seed(0)
    model = layers.StyleGenerator(pooled_projection_dim=8, channels=16, **options)
    return layers.GeneratorNetwork(model)


# -- the generator ---------------------------------------------------------------------------------


def test_demodulation_keeps_the_variance_under_any_style():
    torch.manual_seed(0)
    convolution = layers.ModulatedConvolution(32, 64, 3, 8)
    x, w = torch.randn(8, 32, 24, 24), 5 * torch.randn(8, 8)
    assert convolution.style(w).std() > 5
    inside = convolution(x, w)[..., 1:-1, 1:-1]  # padding lowers it at the border
    assert inside.square().mean((1, 2, 3)).sub(1).abs().max() < 0.1


def test_it_is_a_convolution_with_each_sample_s_own_weights():
    torch.manual_seed(0)
    convolution = layers.ModulatedConvolution(4, 6, 3, 8).double()
    x, w = torch.randn(3, 4, 5, 5).double(), torch.randn(3, 8).double()
    found = convolution(x, w)
    for i, style in enumerate(convolution.style(w).double()):
        own = convolution.weight * style[None, :, None, None]
        own = own / own.square().sum((1, 2, 3), keepdim=True).sqrt()
        expected = torch.nn.functional.conv2d(x[i : i + 1], own, padding=1)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-5, atol=1e-5)


def test_latents_depend_on_noise_and_caption_and_on_nothing_else():
    student, (noise, cond) = network(), inputs()
    one = torch.ones(2)
    x0 = student.x0(noise, one, cond)
    assert torch.equal(x0, student.x0(noise, one, cond))
    assert 0.3 < x0.std() < 3
    other = student.x0(noise, one, Cond(tokens=cond.tokens, pooled=-cond.pooled))
    assert (other - x0).std() > 0.1
    assert (student.x0(-noise, one, cond) - x0).std() > 0.1
    torch.testing.assert_close(x0[1:], student.x0(noise[1:], one[1:], cond.index([1])))
    # a cell's mean of the noise is z: what leaves it alone changes nothing at the start
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)
    torch.testing.assert_close(student.x0(noise + checks, one, cond), x0, rtol=1e-4, atol=1e-4)


def test_its_weights_are_counted_without_making_them():
    """As doctor counts them."""
    config = {"in_channels": 4, "sample_size": 16, "pooled_projection_dim": 8}
    config |= {"joint_attention_dim": 16, "patch_size": 2}
    counted = parameters(config, {"channels": 16, "blocks": 2})
    assert counted == sum(p.numel() for p in network(blocks=2).parameters())


def test_z_has_unit_variance():
    noise = torch.randn(500, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z = layers.StyleGenerator._averaged(noise, 4)
    assert z.shape == (500, 4, 4, 4)
    assert abs(z.std() - 1) < 0.02


@pytest.mark.parametrize(("side", "resolutions"), [(16, 3), (12, 2), (4, 1), (7, 1), (128, 6)])
def test_the_constant_has_the_smallest_side(side, resolutions):
    model = layers.StyleGenerator(sample_size=side, pooled_projection_dim=8, channels=4, blocks=0)
    assert len(model.resolutions) == resolutions
    noise = torch.randn(1, 4, side, side)
    assert model.generate(noise, torch.zeros(1, 8)).shape == noise.shape


def test_every_weight_gets_a_gradient():
    student, (noise, cond) = network(), inputs()
    student.x0(noise, torch.ones(2), cond).square().mean().backward()
    without = [name for name, p in student.named_parameters() if not p.grad.count_nonzero()]
    assert not without


def test_it_learns_with_the_learning_rate_of_other_students():
    """A picture for each caption, whatever the noise; within 60 steps."""
    student, (noise, cond) = network(), inputs()
    target = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    target = layers.doubled(layers.doubled(target))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        x_t = torch.randn(noise.shape, generator=torch.Generator().manual_seed(step))
        loss = (student.x0(x_t, torch.ones(2), cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_another_size_and_another_teacher_are_refused(teachers):
    student, (noise, cond) = network(), inputs()
    with pytest.raises(ValueError, match=r"makes latents \[4, 16, 16\] alone, not \[4, 8, 8\]"):
        student.x0(noise[..., :8, :8], torch.ones(2), cond)
    with pytest.raises(ValueError, match="called by a StableDiffusion3Pipeline, and the teacher"):
        stylegan(teachers("unet"))


# -- what a run says at once -----------------------------------------------------------------------

BASE = ("method=add", "student=stylegan")
ODDS = "method.levels.odds=[1,0,0,0]"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([*BASE], "noise; set method.levels.odds=[1,0,0,0]"),
        (
            [*BASE, "method.levels.levels=[.9]", "method.levels.odds=[1]"],
            "and method.levels.levels",
        ),
        (["student=stylegan"], "LADD needs a student that knows every noise level"),
        (["student=stylegan", "method=dmd2"], "DMD2 needs a student that knows every noise level"),
        ([*BASE, ODDS, "teacher=shapes_unet"], "and the teacher is a StableDiffusionPipeline"),
        ([*BASE, ODDS, "student.init=random"], "student.init: no such key"),
        ([*BASE, ODDS, "student.channels=0"], "student.channels=0: must be a whole number, 1 or"),
        ([*BASE, ODDS, "sampler.levels=[0.9]"], "sampler.levels=[0.9]: "),
        ([*BASE, ODDS, "metrics.student_steps=[2,4]"], "noise; set metrics.student_steps=[1]"),
        ([*BASE, ODDS, "callbacks.scores.steps=2"], "noise; set callbacks.scores.steps=1"),
        ([*BASE, ODDS, "trainer=fsdp2"], "trainer=fsdp2: a GAN's generator is not sharded"),
    ],
)
def test_a_run_that_cannot_work_is_refused_in_one_sentence(command, tmp_path, given, expected):
    code, _, err = command("run", *given, f"run_dir={tmp_path / 'run'}")
    assert code == 1
    said = [line for line in err.splitlines() if line.startswith("distill: ")]
    assert len(said) == 1
    assert expected in said[0]
    assert not (tmp_path / "run").exists()


# -- what a run gives ------------------------------------------------------------------------------


def test_the_saved_student_draws_in_diffusers_what_it_drew_in_training(trained):
    settings, method, folder = trained
    (ours,) = distill.sample_images(
        settings, method, [PROMPT], steps=1, seed=SEED, precision="32-true"
    )
    model = student_of(str(folder))
    sampler = sampler_of(model.pipeline)
    x0 = sampler(
        model,
        model.embed([PROMPT]),
        [torch.Generator().manual_seed(SEED)],
        shape=model.latent_shape,
        steps=1,
    )
    again = torch.from_numpy(np.array(ours)).float()
    expected = (model.decode(x0)[0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1) * 255
    assert (again - expected).abs().max() <= 1.01
    assert expected.std() > 1
    with pytest.raises(ValueError, match=r"steps=2: this student is a GAN's generator, which"):
        sampler.grid(2, student=model)

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    options = {"num_inference_steps": 1, "sigmas": [1.0], "guidance_scale": 0.0}
    plain = pipeline(PROMPT, generator=generator, output_type="np", **options).images[0]
    assert (torch.from_numpy(plain) * 255 - expected).abs().max() <= 1.01


def test_its_folder_is_sampled_and_exported_and_is_no_teacher(trained, command, tmp_path):
    _, _, folder = trained
    code, out, _ = command("sample", f"run={folder}", f"prompt={PROMPT}", "steps=1", EXACT, "out=p")
    assert (code, len(out.splitlines())) == (0, 1)
    code, _, err = command("sample", f"run={folder}", f"prompt={PROMPT}", "steps=2", "out=q")
    assert (code, "which makes a picture in one step from noise; use steps=1" in err) == (1, True)
    assert command("export", f"run={folder}", "to=diffusers", "dtype=float16", "out=half")[0] == 0
    card = (tmp_path / "half" / "README.md").read_text(encoding="utf-8")
    assert "distill must be installed" in card
    assert "steps = 1" in card
    refused = {
        "to=lora rank=2": "export",
        "to=single_file": "export",
        "to=delta": "export",
        "to=onnx": "export",
        "to=diffusers weights=int8 out=int8": "export",
        f"lora={folder / 'vae' / 'diffusion_pytorch_model.safetensors'} prompt=x out=r": "sample",
    }
    for given, name in refused.items():
        code, _, err = command(name, f"run={folder}", *given.split())
        assert (code, "a GAN's generator (student=stylegan), no denoiser; " in err) == (1, True)
    for key in ("teacher.path", "student.init"):
        code, _, err = command("run", f"{key}={folder}", "run_dir=no")
        assert code == 1
        assert "generator" in err.lower()


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0, 6])
def test_a_run_and_a_resumed_one_are_the_same_to_the_last_bit(command, pipelines, tmp_path, weight):
    given = words(pipelines, "whole", f"method.distill_weight={weight}", "trainer.max_steps=3")
    assert command("run", *given, "callbacks.samples.every=1")[0] == 0
    parts = ["trainer.max_steps=1", "run_dir=parts", "callbacks.samples.every=1"]
    assert command("run", *given, *parts)[0] == 0
    assert command("run", "resume=parts", "trainer.max_steps=3")[0] == 0
    files = [tmp_path / name / "checkpoints" / "step_000003.ckpt" for name in ("whole", "parts")]
    whole, resumed = (torch.load(file, weights_only=True) for file in files)
    assert tiny.same(whole["state_dict"], resumed["state_dict"])
    assert tiny.same(whole["distill"]["ema"], resumed["distill"]["ema"])
    name = "student/transformer/diffusion_pytorch_model.safetensors"
    saved = [load_file(tmp_path / run / name) for run in ("whole", "parts")]
    assert tiny.same(*saved)
    assert command("inspect", "run=whole", "samples=2")[0] == 0


@pytest.mark.nightly
def test_by_default_it_is_evaluated_in_one_step(command, tmp_path):
    """On the shipped teacher, with the command of the page."""
    given = ["debug=smoke", "method=add", "teacher=shapes_small", "student=stylegan", ODDS]
    code, out, err = command("run", *given, "run_dir=run")
    assert code == 0, err
    assert "evaluated in one step alone: this student is a GAN's generator" in out + err
    rows = OmegaConf.load(tmp_path / "run" / "evaluation.json")
    assert {(row.who, row.steps) for row in rows.rows} >= {("student", 1), ("teacher", 2)}
    assert ("student", 2) not in {(row.who, row.steps) for row in rows.rows}
    shutil.rmtree(tmp_path / "run" / "evaluation", ignore_errors=True)
    code, _, err = command("evaluate", "run=run", "steps=1,2", "metrics.prompts=4")
    assert code == 0, err
    code, _, err = command("evaluate", "run=run", "steps=2", "metrics.prompts=4")
    assert (code, "steps=[2]: this student is a GAN's generator" in err) == (1, True)
