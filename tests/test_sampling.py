"""Samplers and exported students against diffusers: anyone who opens the folder gets the pictures
that we measured.
"""

from __future__ import annotations

import filecmp
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)

import cards
import tiny
from distill.config.models import sampler_of as of_run
from distill.config.models import student_of
from distill.core.score_distillation import guided_x0
from distill.exporting.card import write_card
from distill.sampling import (
    Consistency,
    Euler,
    EulerAncestral,
    distilled,
    draw_noise,
    sampler_of,
    seeded,
)
from distill.sampling.guided import guided
from distill.students import full, save_pipeline

PROMPT, SEED = tiny.CAPTIONS[0], 5


@pytest.fixture(scope="module")
def exported(teachers, tmp_path_factory):
    """Family -> (a student that is not its teacher any more, the folder it was written to)."""
    made = {}

    def of(family):
        if family not in made:
            student = tiny.shake(full(teachers(family)), 21, std=0.03).eval()
            made[family] = (
                student,
                saved(student, teachers(family), tmp_path_factory.mktemp("export") / "student"),
            )
        return made[family]

    return of


def saved(student, teacher, folder, sampler=None):
    return save_pipeline(
        student, teacher, folder, (sampler or Consistency()).scheduler(student, teacher)
    )


def opened(folder):
    pipeline = AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(teacher, student, *, steps, seed=SEED, prompt=PROMPT):
    """Pixels of the consistency sampler as diffusers gives them: [S, S, 3] in [0, 1]."""
    with torch.no_grad():
        x0 = Consistency()(
            student,
            teacher.embed([prompt]),
            seeded([seed]),
            shape=teacher.latent_shape,
            steps=steps,
        )
        return (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)


def eight_bit(pixels):
    return (pixels * 255).round()


def test_a_student_from_scratch_has_the_teacher_s_shape_and_none_of_its_weights(teacher):
    torch.manual_seed(0)
    student, names = full(teacher, init="random"), dict(teacher.network.named_parameters())
    assert {k: p.shape for k, p in student.named_parameters()} == {
        k: p.shape for k, p in names.items()
    }
    assert all(p.requires_grad for p in student.parameters())
    matrices = [(p, names[k]) for k, p in student.named_parameters() if p.ndim > 1 and p.any()]
    assert matrices
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in matrices)
    with pytest.raises(ValueError, match="student.init=copy: must be teacher, random, or"):
        full(teacher, init="copy")


# -- the exported folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mmdit", "unet", "sdxl"])
def test_one_step_of_the_exported_pipeline_is_our_sampler(family, teachers, exported):
    teacher, (student, folder) = teachers(family), exported(family)
    picture = opened(folder)(
        PROMPT,
        num_inference_steps=1,
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images[0]
    expected, found = ours(teacher, student, steps=1), torch.from_numpy(picture)
    assert found.shape == (tiny.SIDE, tiny.SIDE, 3)
    assert found.std() > 0.02  # not one flat colour
    # The UNet's LCMScheduler mixes in c_skip x_t, 2.5e-9 of it at step 999: both families agree to
    # rounding.
    assert (eight_bit(found) - eight_bit(expected)).abs().max() <= 1
    assert (found - expected).abs().max() < 2e-4
    of_teacher = ours(teacher, teacher, steps=1)
    assert (
        eight_bit(of_teacher) - eight_bit(expected)
    ).abs().max() > 8  # the test can tell student and teacher apart


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["mmdit", "unet"])
def test_the_card_s_code_is_our_sampler(family, steps, teachers, exported, tmp_path):
    """Run as it stands: a generator, and no word of ours."""
    student, folder = exported(family)
    folder = shutil.copytree(folder, tmp_path / "student")
    write_card(folder, tmp_path)
    found = cards.drawn(folder, PROMPT, steps=steps, seed=SEED)
    expected = ours(teachers(family), student, steps=steps)
    assert (eight_bit(found) - eight_bit(expected)).abs().max() <= 1
    assert torch.equal(cards.drawn(folder, PROMPT, steps=steps, seed=SEED), found)


def test_what_the_card_says_of_a_call_without_its_line_is_so(exported, tmp_path):
    """SD3's pipeline hands its scheduler no generator; were it to, the line and this test could
    go.
    """
    folder = exported("mmdit")[1]
    pipeline, options = opened(folder), {"guidance_scale": 0.0, "output_type": "np"}
    for steps, same in ((1, True), (2, False)):
        first, second = (
            pipeline(
                PROMPT,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(SEED),
                **options,
            ).images[0]
            for _ in range(2)
        )
        assert (first == second).all() == same


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_plain_generator_is_enough_for_euler_steps(steps, teachers, exported, tmp_path):
    """No word of ours, no line of the card: what a user types who has read nothing but the
    levels.
    """
    teacher, (student, _), sampler = teachers("mmdit"), exported("mmdit"), Euler()
    scheduler = sampler.scheduler(student, teacher)
    folder = save_pipeline(student, teacher, tmp_path / "student", scheduler, sampler)
    found = opened(folder)(
        PROMPT,
        num_inference_steps=steps,
        sigmas=[1 - i / steps for i in range(steps)],
        guidance_scale=0.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    with torch.no_grad():
        how = {"shape": teacher.latent_shape, "steps": steps}
        expected = sampler(student, teacher.embed([PROMPT]), seeded([SEED]), **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    write_card(folder, tmp_path)
    assert "partial" not in cards.code(folder)
    picture = cards.drawn(folder, PROMPT, steps=steps, seed=SEED)
    mine = (teacher.decode(expected) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).detach()
    assert (eight_bit(picture) - eight_bit(mine)).abs().max() <= 1
    model = student_of(str(folder))
    assert of_run(str(folder), model) == sampler
    assert distilled(model.pipeline)
    with pytest.raises(ValueError, match="sampler=euler: is for teachers that predict a flow"):
        sampler.check(teachers("unet").network)


@pytest.mark.parametrize("family", ["mmdit", "unet"])
def test_a_sampler_s_own_levels_are_in_the_card_and_the_folder(family, teachers, tmp_path):
    teacher, sampler = teachers(family), Consistency(levels=[1.0, 0.9, 0.6])
    student = tiny.shake(full(teacher), 21, std=0.03).eval()
    scheduler = sampler.scheduler(student, teacher)
    folder = save_pipeline(student, teacher, tmp_path / "student", scheduler, sampler)
    write_card(folder, tmp_path)
    model = student_of(str(folder))
    found = of_run(str(folder), model)
    assert found == sampler
    assert "steps = 3\n" in cards.code(folder)
    with torch.no_grad():
        cond, shape = teacher.embed([PROMPT]), teacher.latent_shape
        x0 = sampler(student, cond, seeded([SEED]), shape=shape, steps=2)
        expected = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    found = cards.drawn(folder, PROMPT, steps=2, seed=SEED)
    assert (eight_bit(found) - eight_bit(expected)).abs().max() <= 1


@pytest.mark.parametrize(
    ("steps", "levels"),
    [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])],
    ids=["1", "2", "4"],
)
def test_levels_of_the_exported_unet(steps, levels, exported):
    scheduler = opened(exported("unet")[1]).scheduler
    assert type(scheduler).__name__ == "LCMScheduler"
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == levels


def test_the_exported_flow_scheduler_keeps_the_levels_as_they_are(exported):
    scheduler = opened(exported("mmdit")[1]).scheduler
    assert type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert scheduler.config.stochastic_sampling
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]


def test_all_but_network_and_scheduler_are_the_teacher_s_files(family, pipelines, exported):
    source, (_, folder) = pipelines(family), exported(family)
    network = {"mmdit": "transformer", "unet": "unet"}[family]
    parts = {p.relative_to(source) for p in source.rglob("*") if p.is_file()}
    assert {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} == parts
    kept = [p for p in parts if p.parts[0] not in (network, "scheduler", "model_index.json")]
    assert {p.parts[0] for p in kept} >= {"vae", "text_encoder", "tokenizer"}
    for path in kept:
        assert filecmp.cmp(source / path, folder / path, shallow=False), path
    before, after = (
        json.loads((place / "model_index.json").read_text(encoding="utf-8"))
        for place in (source, folder)
    )
    assert after.pop("_distill").keys() == {"options", "call"}
    assert {**before, "scheduler": None} == {**after, "scheduler": None}
    assert list(folder.parent.iterdir()) == [folder]  # nothing half-written beside it


def test_exporting_again_replaces_the_folder(teachers, tmp_path):
    teacher = teachers("unet")
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "old.txt").touch()
    student = full(teacher)
    assert saved(student, teacher, folder) == folder
    assert not (folder / "old.txt").exists()
    loaded = student_of(str(folder))
    for name, value in student.model.state_dict().items():
        assert torch.equal(loaded.network.model.state_dict()[name], value), name


def test_our_own_adapter_opens_what_was_exported(family, teacher, exported):
    student, folder = exported(family)
    loaded = student_of(str(folder))
    assert (
        eight_bit(ours(loaded, loaded, steps=1)) - eight_bit(ours(teacher, student, steps=1))
    ).abs().max() == 0


# -- samplers --------------------------------------------------------------------------------------


def times_of(monkeypatch, teacher, run) -> list[float]:
    """The t at which `run()` asks the teacher."""
    asked, estimate = [], type(teacher).x0

    def spy(x_t, t, cond):
        assert len(set(t.tolist())) == 1
        asked.append(t[0].item())
        return estimate(teacher, x_t, t, cond)

    monkeypatch.setattr(teacher, "x0", spy)
    run()
    return asked


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_both_samplers_start_from_pure_noise(steps, family, teacher, monkeypatch):
    cond, shape = teacher.embed([PROMPT]), teacher.latent_shape

    def by_teacher():
        guided(teacher, cond, seeded([0]), shape=shape, steps=steps, guidance=3.0)

    def by_student():
        Consistency()(teacher, cond, seeded([0]), shape=shape, steps=steps)

    for run in (by_teacher, by_student):
        grid = [1 - i / steps for i in range(steps)]
        if (family, steps, run) == ("unet", 5, by_student):
            with pytest.raises(ValueError, match="steps=5: this student's scheduler has at most 4"):
                run()
            return
        assert times_of(monkeypatch, teacher, run) == pytest.approx(grid, abs=1e-6)


def test_a_shift_of_the_teacher_s_scheduler_bends_its_grid(teachers, monkeypatch):
    teacher = teachers("mmdit")
    monkeypatch.setitem(teacher.pipeline.scheduler._internal_dict, "shift", 3.0)
    times = times_of(
        monkeypatch,
        teacher,
        lambda: guided(
            teacher,
            teacher.embed([PROMPT]),
            seeded([0]),
            shape=teacher.latent_shape,
            steps=4,
            guidance=1.0,
        ),
    )
    assert times == pytest.approx([3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)], abs=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_guided_sampler_is_the_sd3_pipeline(guidance, teachers, pipelines):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipelines("mmdit"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    teacher = teachers("mmdit")
    expected = pipeline(
        [PROMPT],
        num_inference_steps=4,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    found = guided(
        teacher,
        teacher.embed([PROMPT]),
        seeded([SEED]),
        shape=teacher.latent_shape,
        steps=4,
        guidance=guidance,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_guided_sampler_is_the_sd_pipeline(guidance, teachers, pipelines):
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines("unet"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    teacher = teachers("unet")
    expected = pipeline(
        [PROMPT],
        num_inference_steps=4,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    found = guided(
        teacher,
        teacher.embed([PROMPT]),
        seeded([SEED]),
        shape=teacher.latent_shape,
        steps=4,
        guidance=guidance,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_guidance_one_is_no_guidance(teacher):
    cond, x_t = (
        teacher.embed(tiny.CAPTIONS[:2]),
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    )
    t = torch.tensor([1.0, 0.5])
    with torch.no_grad():
        plain = teacher.x0(x_t, t, cond)
        by = {
            scale: guided_x0(teacher, x_t, t, cond, torch.tensor(scale))
            for scale in (0.0, 1.0, 3.0)
        }
        assert torch.equal(by[1.0], plain)
        empty = teacher.x0(x_t, t, cond.unconditional())
        scale = float(plain.abs().max())
        torch.testing.assert_close(by[0.0], empty, rtol=0, atol=1e-5 * scale)
        expected = empty + 3 * (plain - empty)
        torch.testing.assert_close(by[3.0], expected, rtol=0, atol=1e-4 * scale)
    assert (plain - empty).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["consistency", "guided"])
def test_a_seed_is_the_same_picture_in_any_batch(sampler, teacher):
    shape = teacher.latent_shape

    def draw(numbers):
        cond = teacher.embed([tiny.CAPTIONS[i] for i in numbers])
        if sampler == "consistency":
            return Consistency()(teacher, cond, seeded(numbers), shape=shape, steps=2)
        return guided(teacher, cond, seeded(numbers), shape=shape, steps=2, guidance=3.0)

    together, backwards, alone = draw([0, 1, 2]), draw([2, 1, 0]), draw([1])
    atol = 1e-5 * float(together.abs().max())
    torch.testing.assert_close(backwards.flip(0), together, rtol=0, atol=atol)
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=atol)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_noise_is_drawn_as_a_pipeline_draws_it():
    generators = seeded([3, 4])
    first = draw_noise((4, 16, 16), generators)
    expected = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first[1:], expected)
    assert not torch.equal(draw_noise((4, 16, 16), generators), first)


# -- Euler-ancestral -------------------------------------------------------------------------------


def test_a_timestep_shift_is_not_lost_under_ancestral_steps(teachers):
    student = teachers("unet").network.trainable_copy()
    student.shift = 250
    with pytest.raises(ValueError, match=r"student\.shift=250: .*use sampler=consistency"):
        EulerAncestral().check(student)


@pytest.mark.parametrize(("family", "steps"), [("unet", 1), ("unet", 2), ("unet", 4), ("sdxl", 4)])
def test_ancestral_steps_of_the_exported_unet_are_our_sampler(
    family, steps, teachers, exported, tmp_path
):
    teacher, (student, _) = teachers(family), exported(family)
    pipeline = opened(saved(student, teacher, tmp_path / "student", EulerAncestral()))
    assert type(pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert isinstance(sampler_of(pipeline), EulerAncestral)
    options = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "np"}
    found = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **options).images[0]
    with torch.no_grad():
        cond, shape = teacher.embed([PROMPT]), teacher.latent_shape
        x0 = EulerAncestral()(student, cond, seeded([SEED]), shape=shape, steps=steps)
        expected = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert (eight_bit(torch.from_numpy(found)) - eight_bit(expected)).abs().max() <= 1


@pytest.mark.parametrize("strength", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_an_image_is_gone_on_from_by_a_flow_as_diffusers_does(strength, teachers, exported):
    """Whose pipelines round the number of steps up, where those of SD and SDXL round it down."""
    teacher, (student, folder) = teachers("mmdit"), exported("mmdit")
    pipeline = AutoPipelineForImage2Image.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(2))
    cond = teacher.embed([PROMPT])
    for steps in (2, 4):
        generator = torch.Generator().manual_seed(SEED)
        pipeline.scheduler.step = partial(pipeline.scheduler.step, generator=generator)
        found = pipeline(
            PROMPT,
            image=image,
            num_inference_steps=steps,
            strength=strength,
            sigmas=[1 - i / steps for i in range(steps)],
            guidance_scale=0.0,
            generator=generator,
            output_type="latent",
        ).images
        how = {"shape": teacher.latent_shape, "steps": steps, "image": image}
        expected = Consistency()(student, cond, seeded([SEED]), **how, strength=strength)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("sampler", "strength"), [(EulerAncestral(), 0.5), (Consistency(), 0.5), (Consistency(), 1.0)]
)
def test_an_image_is_gone_on_from_as_diffusers_does(
    sampler, strength, teachers, exported, tmp_path
):
    teacher, (student, _) = teachers("unet"), exported("unet")
    folder = saved(student, teacher, tmp_path / "student", sampler)
    pipeline = AutoPipelineForImage2Image.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pixels = torch.rand(1, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        image, cond = teacher.encode(pixels * 2 - 1), teacher.embed([PROMPT])
        # It draws the autoencoder's posterior before the noise; handed latents, it takes them as
        # they are.
        options = {
            "num_inference_steps": 2,
            "guidance_scale": 0.0,
            "strength": strength,
            "output_type": "latent",
        }
        generator = torch.Generator().manual_seed(SEED)
        found = pipeline(PROMPT, image=image, generator=generator, **options).images
        how = {"shape": teacher.latent_shape, "steps": 2, "image": image, "strength": strength}
        expected = sampler(student, cond, seeded([SEED]), **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_a_teacher_goes_on_from_an_image_as_diffusers_does(family, teachers, pipelines):
    pipeline = AutoPipelineForImage2Image.from_pretrained(pipelines(family), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5}
    if family == "mmdit":
        options["sigmas"] = [1.0, 0.75, 0.5, 0.25]
    else:
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
        )
    teacher = teachers(family)
    image = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(2))
    expected = pipeline(
        PROMPT,
        image=image,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **options,
    ).images
    how = {"shape": teacher.latent_shape, "steps": 4, "guidance": 3.0, "strength": 0.5}
    with torch.no_grad():
        found = guided(teacher, teacher.embed([PROMPT]), seeded([SEED]), image=image, **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_trained_levels_are_taken_from_the_front():
    sampler = Consistency(levels=[1.0, 0.9, 0.8, 0.7])
    assert [sampler.grid(n) for n in (1, 2, 4)] == [[1.0], [1.0, 0.9], [1.0, 0.9, 0.8, 0.7]]
    assert Consistency().grid(4, 0.5) == [0.5, 0.25]
    flow = SimpleNamespace(prediction="flow", rounds_up=True)
    assert Consistency().grid(4, 0.3, flow) == [0.5, 0.25]
    assert Consistency().grid(2, 0.3, flow) == [0.5]
    with pytest.raises(ValueError, match="steps=5: this sampler has 4 levels"):
        sampler.grid(5)
    for wrong in ([0.5, 0.9], [1.2, 0.5], [1.0, 0.0]):
        with pytest.raises(ValueError, match="must fall from at most 1"):
            Consistency(levels=wrong)


def test_a_level_may_be_typed_as_a_whole_number(teachers):
    model = teachers("mmdit")
    cond, shape = model.embed(tiny.CAPTIONS[:1]), model.latent_shape
    whole, plain = (
        Consistency(levels=[one, 0.5])(model, cond, seeded([0]), shape=shape, steps=2)
        for one in (1, 1.0)
    )
    assert torch.equal(whole, plain)


def test_what_leaves_no_step_or_cannot_begin_is_refused(teachers):
    with pytest.raises(
        ValueError, match=r"steps=1 strength=0.5: their product must be at least 1; use steps=2"
    ):
        Consistency().grid(1, 0.5)
    with pytest.raises(ValueError, match="strength=1.5"):
        Consistency().grid(1, 1.5)
    with pytest.raises(ValueError, match="use sampler=consistency"):
        EulerAncestral().check(teachers("mmdit").network)
    EulerAncestral().check(teachers("unet").network)
