"""What one family alone does, against its own pipeline in diffusers: PixArt-alpha's size of the
picture, Kolors' schedule, Sana-Sprint's angles.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import cards
import families
import tiny
from distill.core.score_distillation import guided_x0
from distill.exporting import low_rank
from distill.exporting.card import write_card
from distill.sampling import Consistency, Euler, distilled, seeded
from distill.sampling.guided import Guided, guided
from distill.students import full, save_pipeline
from distill.students.lora import factors, lora
from families import opened

PROMPTS = tiny.CAPTIONS[:2]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def first_prediction(pipeline, latents, **options):
    """The training step and the guided prediction of a pipeline's first step."""
    seen, step = [], pipeline.scheduler.step
    pipeline.scheduler.step = lambda output, index, x, **o: (
        seen.append((int(index), output)) or step(output, index, x, **o)
    )
    pipeline(PROMPTS, latents=latents, num_inference_steps=2, output_type="latent", **options)
    return seen[0]


# -- PixArt-alpha ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alpha(tmp_path_factory):
    return families.write("pixart_alpha_1024", tmp_path_factory.mktemp("alpha") / "alpha")


def test_pixart_alpha_is_told_the_size_of_the_picture(alpha):
    pipeline, teacher, x_t = opened(alpha), families.teacher_at(alpha), noise(2, 4, 16, 12)
    sides = {"height": 64, "width": 48, "use_resolution_binning": False}
    index, eps = first_prediction(pipeline, x_t.clone(), guidance_scale=5.0, **sides)
    t = teacher.process.time(torch.tensor([index] * 2))
    cond = teacher.embed(PROMPTS)
    with torch.no_grad():
        found = guided_x0(teacher, x_t, t, cond, torch.tensor(5.0))
        inside = teacher.x0(x_t, t, teacher.of_patch(cond, (32, 32), (4, 4)))
        alone = teacher.x0(x_t, t, cond)
    expected = teacher.process.to_x0(eps, x_t, t, "eps")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # as a patch of a larger picture it is told that one's size
    assert (inside - alone).abs().max() > 1e-3


def as_published(folder):
    """The layout of PixArt-alpha on the hub: by diffusers' class of its time, with a tensor that
    diffusers does not read.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"_class_name": "Transformer2DModel"}
    file.write_text(json.dumps(config), encoding="utf-8")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    state = load_file(weights) | {"caption_projection.y_embedding": torch.zeros(120, 48)}
    save_file(state, weights, {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_pixart_alpha_as_it_was_published_has_students(kind, tmp_path):
    folder = as_published(families.write("pixart_alpha", tmp_path / "alpha"))
    teacher = families.teacher_at(folder)
    student = tiny.shake({"full": full, "lora": lora}[kind](teacher), 21, std=0.03).eval()
    scheduler = Consistency().scheduler(student, teacher)
    written = save_pipeline(student, teacher, tmp_path / "student", scheduler)
    write_card(written, tmp_path)
    found = cards.drawn(written, PROMPTS[0], steps=2, seed=5)
    with torch.no_grad():
        cond, shape = teacher.embed(PROMPTS[:1]), teacher.latent_shape
        x0 = Consistency()(student, cond, seeded([5]), shape=shape, steps=2)
        expected = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert (255 * (found - expected)).abs().max() <= 1.01
    if kind == "full":
        again = full(teacher, init=str(written))
        assert all(map(torch.equal, again.parameters(), student.parameters()))


# -- Kolors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kolors(tmp_path_factory):
    return families.write("kolors", tmp_path_factory.mktemp("kolors") / "kolors")


@pytest.mark.slow
def test_kolors_steps_at_levels_of_its_own_schedule(kolors, tmp_path):
    """Of 1,100 training steps: the card names the timesteps of the levels by that."""
    teacher, sampler = families.teacher_at(kolors), Consistency(levels=[1.0, 0.6])
    assert len(teacher.process._alpha) == 1101
    scheduler = sampler.scheduler(teacher.network, teacher)
    written = save_pipeline(teacher.network, teacher, tmp_path / "student", scheduler, sampler)
    write_card(written, tmp_path)
    assert "timesteps=[1099, 659][:steps]" in cards.code(written)
    found = cards.drawn(written, PROMPTS[0], steps=2, seed=5)
    with torch.no_grad():
        cond, shape = teacher.embed(PROMPTS[:1]), teacher.latent_shape
        x0 = sampler(teacher, cond, seeded([5]), shape=shape, steps=2)
        expected = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert (255 * (found - expected)).abs().max() <= 1.01


def test_a_part_of_another_pipeline_s_package_is_refused(kolors, tmp_path):
    """Only that of the pipeline itself is read, as Kolors' text encoder is in it."""
    folder = shutil.copytree(kolors, tmp_path / "kolors")
    file = folder / "model_index.json"
    text = file.read_text(encoding="utf-8")
    assert text.count('"kolors"') == 2
    file.write_text(text.replace('"kolors"', '"deepfloyd_if"'), encoding="utf-8")
    what = "is code of 'deepfloyd_if', which this teacher does not read"
    with pytest.raises(ValueError, match=what):
        families.teacher_at(folder)


# -- Sana-Sprint -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sprint(tmp_path_factory):
    folder = families.write("sana_sprint", tmp_path_factory.mktemp("sprint") / "sprint")
    return folder, families.teacher_at(folder)


@pytest.mark.parametrize("angle", [math.pi / 2, 1.3, 0.6])
def test_an_estimate_of_sana_sprint_is_one_step_of_its_pipeline(angle, sprint):
    """Its pipeline reads cos(a) x0 + sin(a) eps, which is the flow's x_t but for a factor."""
    folder, teacher = sprint
    x = noise(2, 4, 16, 16)
    options = {"num_inference_steps": 1, "output_type": "latent", "intermediate_timesteps": None}
    options |= {"max_timesteps": angle, **families.FAMILIES["sana_sprint"].call}
    expected = {}
    for guidance in (4.5, 1.0):
        call = {**options, "guidance_scale": guidance}
        expected[guidance] = opened(folder)(PROMPTS, latents=x.clone(), **call).images
    whole = math.cos(angle) + math.sin(angle)
    t = torch.full((2,), math.sin(angle) / whole)
    with torch.no_grad():
        found = teacher.x0(x / whole, t, teacher.embed(PROMPTS))
    torch.testing.assert_close(found, expected[4.5], rtol=0, atol=1e-4)
    assert (found - expected[1.0]).abs().max() > 1e-3  # the guidance is an input of the network


def pixels(teacher, latents):
    return (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)


def test_a_student_of_sana_sprint_steps_at_levels_of_its_own(sprint, tmp_path):
    teacher, sampler = sprint[1], Consistency(levels=[1.0, 0.7, 0.2])
    scheduler = sampler.scheduler(teacher.network, teacher)
    written = save_pipeline(teacher.network, teacher, tmp_path / "student", scheduler, sampler)
    write_card(written, tmp_path)
    found = cards.drawn(written, PROMPTS[0], steps=3, seed=5)
    with torch.no_grad():
        cond, shape = teacher.embed(PROMPTS[:1]), teacher.latent_shape
        how = {"shape": shape, "steps": 3}
        ours = sampler(teacher, cond, seeded([5]), **how)
        # the teacher samples in such steps too, and by default at the levels of its pipeline
        usual = guided(teacher, cond, seeded([5]), **how, guidance=1.0)
        expected = Consistency()(teacher, cond, seeded([5]), **how)
    assert (255 * (found - pixels(teacher, ours))).abs().max() <= 1.01
    assert torch.equal(usual, expected)
    assert not torch.allclose(usual, ours, atol=1e-2)
    assert distilled(teacher.pipeline)


def test_other_samplers_of_sana_sprint_are_refused(sprint, command, tmp_path):
    folder, teacher = sprint
    for sampler, name in ((Euler(), "euler"), (Guided(), "guided")):
        with pytest.raises(ValueError, match=rf"^sampler={name}: Sana-Sprint's pipeline .*; use"):
            sampler.check(teacher.network)
    words = [f"run={folder}", "to=diffusers", f"out={tmp_path / 'out'}", "scheduler=euler"]
    code, _, err = command("export", *words)
    assert code == 1
    assert "scheduler=euler: a SanaSprintPipeline adds fresh noise between steps, and has no" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sana_sprint_samples_as_a_model_of_few_steps(sprint, command, tmp_path):
    """With a start image too; guidance by the empty caption is refused."""
    words = [f"run={sprint[0]}", "prompt=a red star", "steps=2", f"out={tmp_path / 'drawn'}"]
    code, _, err = command("sample", *words, "guidance=4")
    assert code == 1
    assert "was distilled to work without; leave it out" in err
    code, out, err = command("sample", *words)
    assert code == 0, err
    (picture,) = [line for line in out.splitlines() if line.endswith(".png")]
    words[-1] = f"out={tmp_path / 'again'}"
    code, _, err = command("sample", *words, f"image={picture}", "strength=0.5")
    assert code == 0, err


@pytest.mark.slow
def test_a_lora_of_sana_s_feed_forward_layers_is_a_file_of_diffusers(sprint, tmp_path):
    """Which are convolutions; our own reading of such files knows them too."""
    folder, file = sprint[0], tmp_path / "lora.safetensors"
    teacher = families.teacher_at(folder)
    student = lora(teacher, rank=2)
    tiny.shake(student.adapters, 3, std=0.1)
    found = factors(student)
    assert sum(".ff.conv_" in name for name in found) == 3 * 2 * 2
    about = low_rank.lora_metadata(folder)
    low_rank.save_lora(
        found, file, part="transformer", naming="diffusers", dtype=None, metadata=about
    )
    plain = opened(folder)
    plain.load_lora_weights(str(tmp_path), weight_name=file.name)
    again = families.teacher_at(folder, weights=str(file))
    x_t, t, cond = noise(1, 4, 16, 16), torch.tensor([0.7]), teacher.embed(PROMPTS[:1])
    with torch.no_grad():
        expected = student.x0(x_t, t, cond)
        for network in (again.network, again.network.with_model(plain.transformer)):
            torch.testing.assert_close(network.x0(x_t, t, cond), expected, rtol=0, atol=1e-4)
        assert (teacher.x0(x_t, t, cond) - expected).abs().max() > 1e-2


# -- pipelines of another class --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "given"),
    [("pixart_alpha", "pixart"), ("kolors", "sdxl"), ("sana_sprint", "sana")],
)
def test_a_pipeline_of_another_class_is_refused(teacher, given, command, tmp_path):
    folder = families.write(given, tmp_path / "given")
    words = [f"teacher={teacher}", f"teacher.path={folder}", f"run_dir={tmp_path / 'run'}"]
    code, out, err = command("run", "debug=smoke", *words)
    kinds = [families.type_of(families.FAMILIES[f].named[0]).kind_name() for f in (given, teacher)]
    assert code == 1
    assert f"holds a {kinds[0]}, but this teacher reads a {kinds[1]}; choose another" in out + err
    assert not (tmp_path / "run").exists()
