"""The newer families, each against its own pipeline in diffusers."""

from __future__ import annotations

import json
import math
import re
import shutil
import string
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import cards
import families
import tiny
from distill.config.fitting import check_data_fits, warn_size
from distill.config.models import student_of
from distill.core.score_distillation import guided_x0
from distill.exporting.card import write_card
from distill.sampling import Consistency, seeded
from distill.sampling import guided as sampling_guided
from distill.sampling.guided import Guided, guided
from distill.students import full, save_pipeline
from distill.students.lora import lora
from distill.teachers.families import teacher_class
from distill.teachers.flux import Flux
from distill.teachers.flux2 import Flux2, Flux2Klein
from distill.teachers.loading.settings import in_folder, sides_of
from distill.teachers.pixart import PixArtSigma
from distill.teachers.sana import INSTRUCTION, Sana
from distill.teachers.sd import SD
from families import FAMILIES, opened, type_of

PROMPTS, SEED = tiny.CAPTIONS[:2], 5
FEED_FORWARD = ("ff.", "feed_forward.", "img_mlp.", "conv")  # its layers' names in the families
CALL = {family: row.call for family, row in FAMILIES.items()}
KINDS = {family: type_of(row.named[0]) for family, row in FAMILIES.items()}


def those(which, quick=False):
    """Parametrised by the families of which this holds; with `quick` none of them is slow."""
    found = [f for f, row in FAMILIES.items() if which(f, row)]
    return pytest.mark.parametrize(
        "family", [pytest.param(f, marks=() if quick else families.marks(f)) for f in found]
    )


each = those(lambda family, row: True)


@pytest.fixture
def folders(family_folders):
    return family_folders


@pytest.fixture
def teachers(family_teachers):
    return family_teachers


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(teacher):
    return noise(2, 4, 16, 16), torch.tensor([0.9, 0.4]), teacher.embed(PROMPTS)


# -- against diffusers -----------------------------------------------------------------------------


@those(lambda family, row: KINDS[family].flow and row.guided is not None, quick=True)
@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_a_guided_estimate_is_one_step_of_the_pipeline(family, sigma, teachers, folders):
    pipeline, x_t = opened(folders(family)), noise(2, 4, 16, 16)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()  # a step to 0 of it is the estimate
    row = FAMILIES[family]
    options = {
        "num_inference_steps": 1,
        "sigmas": [sigma],
        "output_type": "latent",
        **row.guided,
        **CALL[family],
    }
    expected = pipeline(prompt=list(PROMPTS), latents=row.given(x_t.clone()), **options).images
    expected = row.returned(expected, pipeline.vae)
    teacher, t = teachers(family), torch.full((2,), sigma)
    with torch.no_grad():
        found = guided_x0(teacher, x_t, t, teacher.embed(PROMPTS), torch.tensor(row.scale))
        unguided = teacher.x0(x_t, t, teacher.embed(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert row.scale == 1 or (unguided - expected).abs().max() > 1e-2


@those(lambda family, _: not KINDS[family].flow, quick=True)
def test_a_guided_estimate_is_that_of_a_pipeline_of_eps(family, teachers, folders):
    pipeline, teacher, x_t = opened(folders(family)), teachers(family), noise(2, 4, 16, 16)
    seen, step = [], pipeline.scheduler.step
    pipeline.scheduler.step = lambda output, index, x, **o: (
        seen.append((int(index), output)) or step(output, index, x, **o)
    )
    options = {"num_inference_steps": 2, "output_type": "latent"}
    options |= {**FAMILIES[family].guided, **CALL[family]}
    pipeline(prompt=list(PROMPTS), latents=x_t.clone(), **options)
    index, eps = seen[0]
    t = teacher.process.time(torch.tensor([index] * 2))
    with torch.no_grad():
        found = guided_x0(teacher, x_t, t, teacher.embed(PROMPTS), torch.tensor(5.0))
    expected = teacher.process.to_x0(eps, x_t, t, "eps")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_sd21_s_v_is_read_as_v(pipelines, tmp_path):
    """The same UNet under a scheduler that says so, as SD 2.1 has it beside its base."""
    folder = shutil.copytree(pipelines("unet"), tmp_path / "v")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text(encoding="utf-8")) | {"prediction_type": "v_prediction"}
        ),
        encoding="utf-8",
    )
    pipeline, teacher, x_t = opened(folder), SD(str(folder)), noise(2, 4, 16, 16)
    seen, step = [], pipeline.scheduler.step

    def spy(output, index, x, **options):
        seen.append((int(index), step(output, index, x).pred_original_sample))
        return step(output, index, x, **options)

    pipeline.scheduler.step = spy
    pipeline(
        PROMPTS,
        latents=x_t.clone(),
        num_inference_steps=1,
        guidance_scale=5.0,
        output_type="latent",
    )
    ((index, expected),) = seen
    with torch.no_grad():
        t = teacher.process.time(torch.tensor([index] * 2))
        found = guided_x0(teacher, x_t, t, teacher.embed(PROMPTS), torch.tensor(5.0))
    assert teacher.prediction == "v"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_flux_shifts_its_grid_with_the_size_as_its_pipeline_does(family, teachers, folders):
    """FLUX.2 by the number of steps as well."""
    pipeline, teacher = opened(folders(family)), teachers(family)
    options = {
        "num_inference_steps": 4,
        "output_type": "latent",
        "guidance_scale": teacher.guidance,
        **CALL[family],
    }
    options |= {"prompt": PROMPTS[0], "generator": torch.Generator().manual_seed(SEED)}
    expected = FAMILIES[family].returned(pipeline(**options).images, pipeline.vae)
    cond, shape = teacher.embed(PROMPTS[:1]), teacher.latent_shape
    found = guided(teacher, cond, seeded([SEED]), shape=shape, steps=4, guidance=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def test_flux2_dev_is_told_its_guidance(teachers):
    teacher, (x_t, t, cond) = teachers("flux2"), inputs(teachers("flux2"))
    with torch.no_grad():
        found = teacher.network.predict(x_t, t, cond)
        other = Flux2(str(teacher.folder), guidance=1.0, **FAMILIES["flux2"].options)
        assert (other.network.predict(x_t, t, cond) - found).abs().max() > 1e-2


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f == "chroma" else families.training(f)) for f in FAMILIES],
)
def test_a_block_that_is_computed_again_has_all_its_inputs(family, teachers):
    """diffusers forgets the mask of Chroma's single-stream blocks."""
    teacher = teachers(family)
    x_t, t, _ = inputs(teacher)
    cond = teacher.embed(["a star", PROMPTS[1]])  # of unequal lengths

    def gradient(**options):
        student = tiny.shake(full(teacher, **options), 21, std=0.03)
        student.x0(x_t, t, cond).square().mean().backward()
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    expected, found = gradient(), gradient(checkpointing=True)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_a_klein_of_few_steps_takes_no_guidance(folders, teachers, caplog, tmp_path):
    """As its pipeline, which ignores any, of the same network."""
    folder = shutil.copytree(folders("flux2_klein"), tmp_path / "klein")
    index = folder / "model_index.json"
    said = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps(said | {"is_distilled": True}), encoding="utf-8")
    few, base = Flux2Klein(str(folder), **FAMILIES["flux2_klein"].options), teachers("flux2_klein")
    pipeline, cond = opened(folder), few.embed(PROMPTS[:1])
    options = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 5.0}
    options |= {**CALL["flux2_klein"], "generator": torch.Generator().manual_seed(SEED)}
    expected = pipeline(prompt=PROMPTS[:1], **options).images
    expected = families.standardised(expected, pipeline.vae)
    how = {"shape": few.latent_shape, "steps": 2}
    found = guided(few, cond, seeded([SEED]), guidance=1.0, **how)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    caplog.clear()
    for teacher in (base, few):
        assert not caplog.messages
        guided(teacher, cond, seeded([SEED]), guidance=5.0, **how)
    assert caplog.messages == [
        "guidance=5 guides a teacher that was distilled to few steps without guidance; use "
        "guidance=1"
    ]
    schnell = Flux(str(folders("flux_schnell")), few_steps=True, size=tiny.SIDE, length=64)
    guided(schnell, schnell.embed(["x"]), seeded([0]), guidance=4.0, **how)
    assert caplog.messages[1:] == [caplog.messages[0].replace("=5", "=4")]
    student = full(few).eval()
    saved = save_pipeline(student, few, tmp_path / "x", Consistency().scheduler(student, few))
    assert opened(saved).config.is_distilled


def test_a_flux2_of_the_other_class_is_refused(folders):
    folder = folders("flux2_klein")
    with pytest.raises(
        ValueError, match=r"^teacher.path=.* Flux2KleinPipeline.*Flux2Pipeline[^\n]*$"
    ):
        Flux2(str(folder))


def test_flux_is_said_to_be_guided_twice(teachers, caplog):
    """Which a model that is told nothing is not."""
    teacher = teachers("flux")
    how = {"shape": teacher.latent_shape, "steps": 1}
    for guidance, told in ((1.0, True), (4.0, False), (4.0, True)):
        assert not caplog.messages
        teacher.network.model.register_to_config(guidance_embeds=told)
        with suppress(TypeError):  # a dev that is told nothing has layers for it all the same
            guided(teacher, teacher.embed(["x"]), seeded([0]), guidance=guidance, **how)
    assert caplog.messages[0].startswith(
        "guidance=4 guides a teacher that is conditioned on guidance 3.5 (teacher.guidance)"
    )


def test_zimage_reads_captions_and_pictures_of_any_length(teachers, folders):
    """Image tokens and captions are padded to multiples of 32, and a batch to its longest one."""
    pipeline, teacher, x_t = opened(folders("zimage")), teachers("zimage"), noise(3, 4, 12, 10)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    prompts = ["a", "a rather longer caption of many more letters", ""]
    options = {**FAMILIES["zimage"].guided, "max_sequence_length": 96, "sigmas": [0.7]}
    options |= {"height": 48, "width": 40, "num_inference_steps": 1, "output_type": "latent"}
    expected = pipeline(list(prompts), latents=x_t.clone(), **options).images
    cond, t = teacher.embed(prompts), torch.full((3,), 0.7)
    with torch.no_grad():
        found = guided_x0(teacher, x_t, t, cond, torch.tensor(5.0))
        maps = teacher.features(x_t, t, cond, ["block0", "block2"])
        alone = teacher.features(x_t[1:2], t[1:2], cond.index(slice(1, 2)), ["block0", "block2"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert all(found.shape == (3, 16, 6, 5) for found in maps)
    for one, both in zip(alone, maps, strict=True):
        torch.testing.assert_close(one, both[1:2], rtol=0, atol=1e-4)


def test_a_few_step_teacher_is_said_to_take_no_guidance(folders, caplog):
    options = FAMILIES["zimage"].options
    sampling_guided._warn_of_a_few_step_teacher.cache_clear()  # it is said once in a process
    for few_steps, guidance, told in ((False, 4.0, False), (True, 1.0, False), (True, 4.0, True)):
        teacher = families.teacher_at(folders("zimage"), few_steps=few_steps, **options)
        how = {"shape": teacher.latent_shape, "steps": 1, "guidance": guidance}
        guided(teacher, teacher.embed(["x"]), seeded([0]), **how)
        assert bool(caplog.messages) == told
    assert caplog.messages[0].startswith("guidance=4 guides a teacher that was distilled to few")


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("sd35", {"guidance_scale": 5.0}),
        ("zimage", {"guidance_scale": 4.0}),
        ("qwenimage", {"true_cfg_scale": 5.0, "negative_prompt": ""}),
    ],
)
def test_a_tuned_student_s_folder_has_its_pipeline_s_own_scale(family, call, teachers, tmp_path):
    teacher, sampler = teachers(family), Guided(guidance=5.0)
    student = full(teacher)
    scheduler = sampler.scheduler(student, teacher)
    folder = save_pipeline(student, teacher, tmp_path / "student", scheduler, sampler)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_distill"]["call"] == call


def test_sana_s_shift_is_found_under_its_other_name(teachers, monkeypatch):
    teacher, asked = teachers("sana"), []
    monkeypatch.setattr(teacher, "x0", lambda x_t, t, cond: asked.append(t[0].item()) or x_t)
    guided(
        teacher,
        teacher.embed(PROMPTS[:1]),
        seeded([0]),
        shape=teacher.latent_shape,
        steps=2,
        guidance=1.0,
    )
    assert asked == pytest.approx([1.0, 0.75])  # 3 t / (1 + 2 t) at a half


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        pytest.param(family, steps, marks=families.marks(family) if steps > 1 else ())
        for family, row in FAMILIES.items()
        for steps in ((1, 2, 4) if row.slow else (1, 3))
    ],
)
def test_the_card_s_code_is_our_sampler(family, steps, teachers, tmp_path):
    """Sizes, lengths and guidance that no file of diffusers tells are in it, and in the folder for
    our adapter.
    """
    teacher = teachers(family)
    student = tiny.shake(full(teacher), 21, std=0.03).eval()
    scheduler = Consistency().scheduler(student, teacher)
    folder = save_pipeline(student, teacher, tmp_path / "student", scheduler)
    write_card(folder, tmp_path)
    found = cards.drawn(folder, PROMPTS[0], steps=steps, seed=SEED)
    loaded = student_of(str(folder))
    assert loaded.family_options() == teacher.family_options()
    assert loaded.latent_shape == teacher.latent_shape
    with torch.no_grad():
        for model, ours in ((teacher, student), (loaded, loaded)):
            cond, shape = model.embed(PROMPTS[:1]), model.latent_shape
            x0 = Consistency()(ours, cond, seeded([SEED]), shape=shape, steps=steps)
            expected = (model.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
            assert (255 * (found - expected)).abs().max() <= 1.01
        of_teacher = Consistency()(teacher, cond, seeded([SEED]), shape=shape, steps=1)
        assert not torch.allclose(of_teacher, x0, atol=0.01)


@each
def test_shapes_and_sizes_are_those_of_the_files(family, teachers):
    teacher = teachers(family)
    assert teacher.latent_shape == (4, 16, 16)
    row = FAMILIES[family]
    assert (teacher.patch, teacher.unit) == (row.patch, row.unit)
    assert tuple(teacher.blocks) == row.taps
    if row.grid:
        assert tuple(teacher.channels) == row.taps
        assert tuple(teacher.encoder) == row.taps[:2]
    pixels = noise(1, 3, tiny.SIDE, tiny.SIDE).clamp(-1, 1)
    config, of_videos = teacher.vae.config, "temperal_downsample" in teacher.vae.config
    with torch.no_grad():
        latents = teacher.encode(pixels)
        kept = teacher.vae.encode(pixels[:, :, None] if of_videos else pixels)
        raw = kept.latent if hasattr(kept, "latent") else kept.latent_dist.mean
        expected = teacher.vae.decode(raw).sample
        if of_videos:
            expected, raw = expected[:, :, 0], raw[:, :, 0]
            mean, std = (torch.tensor(config[f"latents_{x}"]) for x in ("mean", "std"))
            scaled = (raw - mean[:, None, None]) / std[:, None, None]
        else:
            scaled = row.latents(raw, teacher.vae)
        torch.testing.assert_close(latents, scaled, rtol=0, atol=1e-5)
        torch.testing.assert_close(teacher.decode(latents), expected, rtol=0, atol=1e-4)


@those(lambda _, row: row.grid)
def test_maps_are_the_outputs_of_the_blocks(family, teachers):
    teacher, taps = teachers(family), FAMILIES[family].taps
    x_t, t, cond = inputs(teacher)
    heard = families.heard(teacher, x_t, t, cond)
    with torch.no_grad():
        maps = teacher.features(x_t, t, cond, taps)
    side, row = 16 // teacher.patch, FAMILIES[family]
    starts = cond.mask.sum(1).tolist() if row.after_caption else [0, 0]
    for name, found in zip(taps, maps, strict=True):
        tokens = heard[name][1] if isinstance(heard[name], tuple) else heard[name]
        if not (row.after_caption or row.image_first):
            tokens = tokens[:, -side * side :]  # text may come before
        assert found.shape == (2, teacher.channels[name], side, side)
        for i, start in enumerate(starts):
            assert torch.equal(found[i, :, 3, 5], tokens[i, start + 3 * side + 5])
        assert found.is_contiguous()


@each
def test_gradient_reaches_the_input_and_no_weight(family, teachers):
    teacher = teachers(family)
    x_t, t, cond = inputs(teacher)
    x_t.requires_grad_()
    for found in teacher.features(x_t, t, cond, FAMILIES[family].taps):
        (gradient,) = torch.autograd.grad(found.square().mean(), x_t, retain_graph=True)
        assert gradient.abs().max() > 0
    (gradient,) = torch.autograd.grad(teacher.x0(x_t, t, cond).sum(), x_t)
    assert gradient.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    teacher.train()
    assert not any(m.training for m in teacher.modules())


@each
def test_a_teacher_in_bfloat16_works_beside_float32(family, teachers, folders):
    exact, half = (
        teachers(family),
        families.teacher_at(folders(family), dtype="bfloat16", **FAMILIES[family].options),
    )
    x_t, t, cond = inputs(half)
    with torch.no_grad():
        x0, maps = half.x0(x_t, t, cond), half.features(x_t, t, cond, FAMILIES[family].taps)
        pixels = half.decode(half.encode(noise(2, 3, tiny.SIDE, tiny.SIDE)))
        expected = exact.x0(x_t, t, exact.embed(PROMPTS))
    assert {x.dtype for x in (cond.tokens, x0, pixels, *maps)} == {torch.float32}
    assert (x0 - expected).norm() < 0.1 * expected.norm()
    assert {p.dtype for p in half.network.trainable_copy().parameters()} == {torch.float32}


@each
def test_embeddings_of_its_own_are_not_refused(family, teachers):
    """The width of the tokens has another name in each family."""
    teacher = teachers(family)
    null = {"tokens": teacher.embed([""]).tokens}
    data = SimpleNamespace(null=null, buckets=[], made={"teacher": "x", "without": []})
    cfg = OmegaConf.create({"data": {"path": "cached"}, "teacher": {"path": "x"}})
    check_data_fits(cfg, data, teacher)
    null["tokens"] = null["tokens"][..., :-1]
    with pytest.raises(ValueError, match=r"its embeddings are \d+ wide and this teacher reads \d+"):
        check_data_fits(cfg, data, teacher)


@each
def test_captions_know_the_empty_one(family, teachers):
    teacher = teachers(family)
    cond, mixed = teacher.embed(PROMPTS), teacher.embed([PROMPTS[1], ""])
    empty = cond.unconditional()
    torch.testing.assert_close(mixed.tokens[1], empty.tokens[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.tokens[0], cond.tokens[1], rtol=0, atol=1e-5)
    assert (empty.tokens - cond.tokens).abs().max() > 1e-2
    assert (cond.pooled is not None) == FAMILIES[family].pooled


@those(lambda _, row: row.letters)
def test_what_is_said_to_be_cut_is_all_that_is_not_read(family, teachers):
    teacher = teachers(family)
    long = "".join(
        string.ascii_lowercase[i * i % 23] for i in range(400)
    )  # a letter is a token here
    kept = long.removesuffix(teacher.unread([long]))
    assert 0 < len(kept) < 400
    whole, same, other = (
        teacher.embed([caption]).tokens for caption in (long, kept + "zzz", kept[:-1] + "zzz")
    )
    torch.testing.assert_close(same, whole, rtol=0, atol=1e-5)
    assert (other - whole).abs().max() > 1e-2
    assert teacher.unread([kept]) is None


def test_sana_reads_captions_behind_the_instruction_or_alone(teachers, folders):
    pipeline, alone = opened(folders("sana")), Sana(str(folders("sana")), instruction=False)
    for teacher, instruction in ((teachers("sana"), INSTRUCTION), (alone, None)):
        tokens, mask, *_ = pipeline.encode_prompt(
            PROMPTS, False, complex_human_instruction=instruction
        )
        cond = teacher.embed(PROMPTS)
        torch.testing.assert_close(cond.tokens, tokens, rtol=0, atol=1e-5)
        assert torch.equal(cond.mask.bool(), mask.bool())


@each
def test_a_pipeline_of_another_class_is_refused(family, folders):
    other = "sd15" if family != "sd15" else "sdxl"
    kind, found = KINDS[family].kind_name(), KINDS[other].kind_name()
    said = rf"holds a {found}, but this teacher reads a {kind}; choose another teacher="
    with pytest.raises(ValueError, match=said):
        teacher_class(kind)(str(folders(other)), **FAMILIES[family].options)


def test_the_first_block_of_sd35_attends_twice(teachers):
    network = teachers("sd35").network
    blocks = network.model.transformer_blocks
    assert [getattr(b, "attn2", None) is not None for b in blocks] == [True, False, False]
    assert {type(b.attn.processor).__name__ for b in blocks} == {"SilentTokenAttention"}
    assert type(blocks[0].attn2.processor).__name__ == "SilentTokenAttention"


def test_a_student_of_pixart_under_a_timestep_shift_is_read_under_it(teachers, tmp_path):
    teacher = teachers("pixart")
    student = full(teacher, shift=250).eval()
    folder = save_pipeline(
        student, teacher, tmp_path / "student", Consistency().scheduler(student, teacher)
    )
    again, x_t, t = student_of(str(folder)), noise(2, 4, 16, 16), torch.ones(2)
    with torch.no_grad():
        expected = student.x0(x_t, t, teacher.embed(PROMPTS))
        torch.testing.assert_close(again.x0(x_t, t, again.embed(PROMPTS)), expected)
        assert not torch.allclose(teacher.x0(x_t, t, teacher.embed(PROMPTS)), expected)


def test_a_lora_on_a_pipeline_that_takes_none_is_refused(folders, tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file(
        {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 16)}, file
    )
    with pytest.raises(
        ValueError,
        match="lora.safetensors is a LoRA, and diffusers puts none on a PixArtSigmaPipeline",
    ):
        PixArtSigma(str(folders("pixart")), weights=str(file))


@each
def test_a_lora_of_its_targets_is_a_student(family, folders, tmp_path):
    """Every layer that the family names is there, and what it learns is in the folder."""
    teacher = families.teacher_at(folders(family), **FAMILIES[family].options)
    x_t, t, cond = inputs(teacher)
    with torch.no_grad():
        before = teacher.x0(x_t, t, cond)
        student = lora(teacher, rank=2)
        adapted = sorted(name for name, _ in teacher.network.model.named_modules())
        adapted = [f".{name}" for name in adapted if name.endswith("lora_A")]
        taken = {end for end in teacher.network.targets if any(f".{end}." in n for n in adapted)}
        torch.testing.assert_close(student.x0(x_t, t, cond), before, rtol=0, atol=1e-5)
        tiny.shake(student, 3, std=0.1)
        expected = student.x0(x_t, t, cond)
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= taken
    assert taken == set(teacher.network.targets)
    assert any(end.startswith(FEED_FORWARD) for end in taken)
    assert (expected - before).abs().max() > 1e-3
    scheduler = Consistency().scheduler(student, teacher)
    again = student_of(str(save_pipeline(student, teacher, tmp_path / "student", scheduler)))
    with torch.no_grad():
        found = again.x0(x_t, t, again.embed(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(pytest.param(family, "ladd", marks=families.marks(family)) for family in FAMILIES),
        ("pixart", "nitrofusion"),
    ],
)
def test_a_smoke_run_leaves_a_student(family, method, command, folders, shards, tmp_path):
    row = FAMILIES[family]
    run = [f"method={method}", f"teacher={row.named[-1]}", "teacher.dtype=float32", *row.words]
    paths = [
        f"teacher.path={folders(family)}",
        f"data.path={shards}",
        f"run_dir={tmp_path / 'run'}",
    ]
    code, _, err = command("run", "debug=smoke", "~metrics", *run, *paths)
    assert code == 0, err
    folder = tmp_path / "run" / "student"
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == KINDS[family].kind_name()
    student = student_of(str(tmp_path / "run"))  # with the run's own options
    assert type(student) is teacher_class(index["_class_name"])
    assert student.latent_shape == (4, 16, 16)
    assert getattr(student, "instruction", None) is None


@each
def test_the_sides_of_pictures_are_known_from_the_files_alone(family, teachers, folders):
    said, teacher = KINDS[family], teachers(family)
    most = teacher.unit * (teacher.network.positions or math.inf)
    assert sides_of(said, in_folder(folders(family)), "x") == (teacher.unit, most)
    assert sides_of(said, lambda part: {}, "x") is None


@pytest.mark.parametrize("sides", ["data.size=60", "data.buckets=[[64,64],[64,60]]"])
@pytest.mark.parametrize("name", ["check", "cache", "run"])
def test_sides_that_a_family_cannot_read_are_refused_before_its_weights(
    name, sides, folders, command, tmp_path
):
    folder = shutil.copytree(folders("flux"), tmp_path / "flux")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a star", encoding="utf-8")
    words = ["teacher=flux", f"teacher.path={folder}", "data=images", f"data.path={tmp_path}"]
    words += {"run": ["run_dir=run"], "cache": ["out=made"], "check": []}[name]
    code, _, err = command(name, *words, sides)
    assert code == 1
    assert "60" in err
    assert "of 8 for this teacher; use " in err


@pytest.mark.parametrize(
    ("family", "side", "said"),
    [
        ("flux", 16, None),
        (
            "flux",
            8,
            (
                "the data are of 32 x 32 pixels and this teacher is of 64 x 64, .*: "
                r"\+\+teacher.size=32"
            ),
        ),
        (
            "sana",
            8,
            "the data are of 32 x 32 pixels and this teacher is of 64 x 64, .*: make data of",
        ),
    ],
)
def test_data_of_another_size_than_the_teacher_are_said(family, side, said, teachers, caplog):
    """FLUX's files name no size: pictures on the way are of teacher.size, 1024 unless it is
    given.
    """
    teacher = teachers(family)
    data = SimpleNamespace(shape=(4, side, side), buckets=[])
    warn_size(data, teacher)
    warn_size(SimpleNamespace(size=side * 4, buckets=[]), teacher)
    warn_size(SimpleNamespace(shape=(4, 8, 8), buckets=[(8, 8), (16, 16)]), teacher)
    warn_size(SimpleNamespace(size=None, buckets=[]), teacher)
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == (2 if said else 0)
    assert all(re.match(said, text) for text in found)


def test_flux_refuses_a_size_that_its_patches_do_not_divide(folders):
    with pytest.raises(
        ValueError, match=r"^teacher.size=60: must be a multiple of 8 for this teacher$"
    ):
        Flux(str(folders("flux")), size=60)
