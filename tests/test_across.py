"""ADD across families: the distillation term by a teacher with another autoencoder, other text
encoders and another size than the student's.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
import yaml

import families
import tiny
from distill.core.across_families import AcrossFamilies, resized
from distill.core.score_distillation import ScoreDistillation
from distill.core.types import Players
from distill.methods.ladd import LADD

CAPTIONS = tiny.CAPTIONS[:2]


@pytest.fixture(scope="module")
def others(tmp_path_factory, teachers):
    """Name -> a teacher of another family: with T5 and two CLIPs; and of pictures of 96 pixels."""
    home = tmp_path_factory.mktemp("others")
    folder = families.write("sd35", home / "sd35")
    unet = families.write("sd15", home / "sd15")
    return {"sd35": families.teacher_at(folder), "large": families.teacher_at(unet, size=96)}


def method_of(teacher, other, **options):
    """ADD of this teacher's family, scored by another one."""
    return tiny.add(teacher, score_teacher=other, options=options)


@pytest.mark.parametrize(("own", "name"), [("unet", "sd35"), ("mmdit", "large")])
@pytest.mark.parametrize("kind", ["exponential", "sds"])
def test_the_term_is_that_of_the_equations(own, name, kind, teachers, others):
    """Against a computation of its own with the two pipelines' parts."""
    teacher, other = teachers(own), others[name]
    method = method_of(teacher, other, distill=ScoreDistillation(kind=kind))
    batch = tiny.simple_batch(method)
    draws, sample = tiny.drawn(method, batch)
    side = {"sd35": 64, "large": 96}[name]
    assert draws.distill.eps.shape == (2, *other.shape_of(side))
    found = method.student_loss(batch, draws, sample).terms["distill"]

    vae, config = other.pipeline.vae, other.pipeline.vae.config
    with torch.no_grad():
        shown = sample.pixels.detach()
        if side != 64:
            shown = F.interpolate(shown, (side, side), mode="bilinear", antialias=True)
        shift = config.shift_factor or 0.0
        y = (vae.encode(shown).latent_dist.mean - shift) * config.scaling_factor
        t, eps = draws.distill.t, draws.distill.eps
        if name == "sd35":
            alpha, sigma = 1 - t, t
        else:
            squares = other.pipeline.scheduler.alphas_cumprod
            alpha, sigma = other.process.alpha(t), other.process.sigma(t)
            nearest = squares[(1000 * t - 1).round().long()]  # t is step 1000 t - 1 of 1,000
            torch.testing.assert_close(alpha.square(), nearest, atol=2e-3, rtol=0)
            torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2))
        a, s = (level.view(-1, 1, 1, 1) for level in (alpha, sigma))
        y_t, cond = a * y + s * eps, other.embed(CAPTIONS)
        output = other.network.predict(y_t, t, cond)
        y_psi = y_t - s * output if name == "sd35" else (y_t - s * output) / a
        target = vae.decode(y_psi / config.scaling_factor + shift).sample
        if side != 64:
            target = F.interpolate(target, (64, 64), mode="bilinear", antialias=True)
        c = alpha if kind == "exponential" else alpha * sigma / 2
    expected = 2.5 * (c * (sample.pixels - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)

    gradient = torch.autograd.grad(found, sample.x0_hat, retain_graph=True)[0]
    direct = torch.autograd.grad(expected, sample.x0_hat)[0]
    torch.testing.assert_close(gradient, direct, rtol=1e-3, atol=1e-7)
    assert all(p.grad is None and not p.requires_grad for p in other.parameters())


def test_a_wide_picture_is_scored_wide(teachers, others):
    term = AcrossFamilies(ScoreDistillation(), teachers("unet"), others["large"])
    assert term.shape(torch.zeros(2, 4, 16, 16)) == (4, 24, 24)
    assert term.shape(torch.zeros(2, 4, 12, 24)) == (4, 17, 34)  # 96 x 96 pixels in 2:1
    pixels = torch.rand(1, 3, 8, 8)
    assert resized(pixels, (8, 8)) is pixels


def test_what_cannot_work_is_one_sentence(teachers, others):
    teacher, other = teachers("unet"), others["sd35"]
    method = method_of(teacher, other)
    players = Players(teacher=teacher, student=method.student, score_teacher=other)
    with pytest.raises(ValueError, match=r"^score_teacher: LADD reads its one teacher in the stud"):
        LADD(players, levels=method.levels, renoise=tiny.LogitNormal())
    wrong = {
        r"method\.distill_space=latents: score_teacher has other": {"distill_space": "latents"},
        r"method\.crop=8: score_teacher sees the whole picture": {"crop": 8},
        r"method\.distill_weight=0: leaves score_teacher without": {"distill_weight": 0.0},
    }
    for said, options in wrong.items():
        with pytest.raises(ValueError, match=said):
            method_of(teacher, other, **options)


def test_the_other_negative_caption_and_guidance_are_its_own(teachers, others):
    teacher, other = teachers("unet"), others["sd35"]
    distill = ScoreDistillation(kind="nfsd", guidance=3.0)
    method = method_of(teacher, other, distill=distill, negative="a drawing")
    batch = tiny.simple_batch(method)
    draws, sample = tiny.drawn(method, batch)
    found = method.student_loss(batch, draws, sample).terms["distill"]
    term, pixels = method.across, sample.pixels.detach()
    y = other.encode(pixels)
    y_psi, c = distill(
        other, y, other.embed(CAPTIONS), draws.distill, other.embed(["a drawing"] * 2)
    )
    target = other.decode(y_psi)
    expected = 2.5 * (c * (pixels - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(found, expected)
    plain = term.loss(pixels, CAPTIONS, draws.distill, None)
    assert plain != pytest.approx(found.item() / 2.5)


def test_a_resumed_half_and_two_ranks_give_the_same_draws(teachers, others):
    method = method_of(teachers("unet"), others["sd35"])
    batch = tiny.simple_batch(method)
    method.loop.iteration = 7
    first = method.draw(batch, method.loop.streams(method, 1)).distill
    again = method.draw(batch, method.loop.streams(method, 1)).distill
    other = method.draw(batch, method.loop.streams(method, 0)).distill
    assert all(torch.equal(a, b) for a, b in zip(values(first), values(again), strict=True))
    assert not torch.equal(first.eps, other.eps)


def values(draws):
    return [x for x in dataclasses.astuple(draws) if isinstance(x, torch.Tensor)]


# -- the command -----------------------------------------------------------------------------------

RUN = [
    *("method=add", "method.distill_space=pixels", "trainer.max_steps=2", "data.batch_size=2"),
    *("loop.head_start=0", "loop.discriminator_updates=1", "callbacks.samples.count=1", "~metrics"),
    *("callbacks.checkpoint.every=1", "trainer.precision=32-true", "trainer.accelerator=cpu"),
]


@pytest.mark.slow
def test_a_run_across_families_resumes_bit_by_bit(command, tmp_path):
    """The shipped UNet's student, scored by the shipped MMDiT."""
    words = ["teacher=shapes_unet", "score_teacher=shapes", *RUN]
    code, _, err = command("run", *words, "data=renders", "run_dir=whole")
    assert code == 0, err
    made = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text(encoding="utf-8"))
    assert made["score_teacher"]["_target_"] == "distill.teachers.sd3.SD3"
    log = (tmp_path / "whole" / "metrics.csv").read_text(encoding="utf-8")
    assert "g/distill" in log
    code, _, err = command("run", *words, "data=renders", "run_dir=parts", "trainer.max_steps=1")
    assert code == 0, err
    code, _, err = command("run", "resume=parts", "trainer.max_steps=2")
    assert code == 0, err
    whole, parts = (
        torch.load(next((tmp_path / name / "checkpoints").glob("step_*2.ckpt")), weights_only=False)
        for name in ("whole", "parts")
    )
    assert tiny.same(whole["state_dict"], parts["state_dict"])


def test_a_command_refuses_before_weights_are_read(command, tmp_path):
    asked = {
        "method=ladd": "score_teacher: LADD reads its one teacher in the student's own latents",
        "method=add": "method.distill_space=latents: score_teacher has other latents",
    }
    for word, said in asked.items():
        code, _, err = command("run", word, "score_teacher=shapes_unet", "run_dir=gone")
        assert (code, said in err) == (1, True), err
    gone = "score_teacher.path=./nowhere"
    words = ["method=add", "method.distill_space=pixels", "score_teacher=shapes_unet", gone]
    code, _, err = command("run", *words, "run_dir=gone")
    assert (code, gone in err) == (1, True), err
    assert not (tmp_path / "gone").exists()


@pytest.mark.slow
def test_the_doctor_counts_both_teachers(command):
    words = ["method=add", "method.distill_space=pixels", "score_teacher=shapes_unet"]
    _, out, _ = command("doctor", *words)
    assert re.search(r"held between steps, in GB: .*score teacher 0\.01", out), out
