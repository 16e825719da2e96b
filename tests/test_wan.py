"""Videos: Wan's adapter against its own pipeline in diffusers, and all that reads its latents
[B, C, T, H, W].
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import ExifTags, Image
from safetensors.torch import load_file

import cards
import families
import tiny
from distill.config.models import student_of
from distill.core.limits import at_once
from distill.core.score_distillation import guided_x0
from distill.core.tensors import strips
from distill.core.types import Logits
from distill.data.datasets import LatentShards
from distill.discriminators.fake_score import Classifiers
from distill.discriminators.heads import ConvHeads
from distill.discriminators.pool import Pool
from distill.exporting.card import write_card
from distill.machine.memory import peak
from distill.sampling import Consistency, seeded, to_bytes
from distill.sampling.guided import guided
from distill.students import full, save_pipeline
from distill.students.lora import lora
from distill.teachers.loading import sizes
from families import opened

PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "video.md"
PROMPTS, SEED = tiny.CAPTIONS[:2], 5
OPTIONS = families.OF_WAN
WORDS = [f"teacher.{key}={value}" for key, value in OPTIONS.items()]
SHAPE, TAPS = (4, 3, 4, 6), ("block0", "block1", "block2")
CALL = {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 24}


@pytest.fixture(scope="module")
def folder(family_folders):
    return family_folders("wan")


@pytest.fixture(scope="module")
def teacher(family_teachers):
    return family_teachers("wan")


@pytest.fixture(scope="module")
def exported(teacher, tmp_path_factory):
    """The folder of a student that differs from its teacher, with its card."""
    student = tiny.shake(full(teacher), 21, std=0.03).eval()
    place = tmp_path_factory.mktemp("exported") / "student"
    save_pipeline(student, teacher, place, Consistency().scheduler(student, teacher))
    write_card(place, place.parent)
    return place


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(teacher):
    return noise(2, *SHAPE), torch.tensor([0.9, 0.4]), teacher.embed(PROMPTS)


# -- against diffusers -----------------------------------------------------------------------------


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_a_guided_estimate_is_one_step_of_the_pipeline(expanded, sigma, teacher, folder):
    """Also of a pipeline that tells each token its own time, as Wan 2.2 TI2V does."""
    pipeline, x_t = opened(folder), noise(2, *SHAPE)
    pipeline.register_to_config(expand_timesteps=expanded)
    scheduler = FlowMatchEulerDiscreteScheduler()  # a step to 0 of it is the estimate
    scheduler.set_timesteps = partial(scheduler.set_timesteps, sigmas=[sigma])
    pipeline.scheduler = scheduler
    expected = pipeline(
        PROMPTS, latents=x_t.clone(), num_inference_steps=1, guidance_scale=5.0,
        output_type="latent", **CALL,
    ).frames  # fmt: skip
    t = torch.full((2,), sigma)
    with torch.no_grad():
        found = guided_x0(teacher, x_t, t, teacher.embed(PROMPTS), torch.tensor(5.0))
        unguided = teacher.x0(x_t, t, teacher.embed(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (unguided - expected).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_card_s_code_is_our_sampler_in_plain_diffusers(steps, teacher, exported):
    found = cards.drawn(exported, PROMPTS[0], steps=steps, seed=SEED)
    assert found.shape == (9, 32, 48, 3)
    model = student_of(str(exported))
    assert model.family_options() == teacher.family_options()
    assert model.latent_shape == SHAPE
    cond = model.embed(PROMPTS[:1])
    x0 = Consistency()(model, cond, seeded([SEED]), shape=SHAPE, steps=steps)
    expected = (model.decoded(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)
    assert (255 * (found - expected)).abs().max() <= 0.01
    of_teacher = Consistency()(teacher, cond, seeded([SEED]), shape=SHAPE, steps=steps)
    assert (of_teacher - x0).abs().max() > 0.01


def test_the_card_is_of_a_video(exported):
    text = (exported / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-video" in text
    assert "from diffusers import WanPipeline" in text
    assert 'export_to_video(video, "video.mp4", fps=16)' in text


def test_shapes_and_statistics_are_those_of_the_files(teacher):
    assert teacher.latent_shape == SHAPE
    assert (teacher.patch, teacher.unit) == (2, 16)
    assert tuple(teacher.blocks) == tuple(teacher.channels) == TAPS
    assert tuple(teacher.encoder) == TAPS[:2]
    assert teacher.shape_of([64, 32]) == (4, 3, 4, 8)
    pixels = noise(1, 3, 9, 32, 48).clamp(-1, 1)
    config = teacher.vae.config
    mean, std = (torch.tensor(config[f"latents_{x}"]).view(1, 4, 1, 1, 1) for x in ("mean", "std"))
    with torch.no_grad():
        latents, raw = teacher.encode(pixels), teacher.vae.encode(pixels).latent_dist.mean
        torch.testing.assert_close(latents, (raw - mean) / std, rtol=0, atol=1e-6)
        decoded = teacher.vae.decode(raw).sample
        torch.testing.assert_close(teacher.decode(latents), decoded, rtol=0, atol=1e-5)
        assert torch.equal(teacher.decoded(latents), teacher.decode(latents))
    assert latents.shape == (1, *SHAPE)


def test_maps_are_the_outputs_of_the_blocks(teacher):
    x_t, t, cond = inputs(teacher)
    heard = families.heard(teacher, x_t, t, cond)
    with torch.no_grad():
        maps = teacher.features(x_t, t, cond, TAPS)
    for name, found in zip(TAPS, maps, strict=True):
        assert found.shape == (2, teacher.channels[name], 3, 2, 3)
        assert torch.equal(found[:, :, 2, 1, 2], heard[name][:, 2 * 6 + 1 * 3 + 2])
        assert found.is_contiguous()


def test_gradient_reaches_the_input_and_no_weight(teacher):
    x_t, t, cond = inputs(teacher)
    x_t.requires_grad_()
    for found in teacher.features(x_t, t, cond, TAPS):
        (gradient,) = torch.autograd.grad(found.square().mean(), x_t, retain_graph=True)
        assert gradient.abs().max() > 0
    (gradient,) = torch.autograd.grad(teacher.decode(teacher.x0(x_t, t, cond)).sum(), x_t)
    assert gradient.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_a_teacher_in_bfloat16_works_beside_float32(teacher, folder):
    """Though diffusers keeps some of its weights in float32, and its autoencoder is kept so."""
    half = families.teacher_at(folder, dtype="bfloat16", **OPTIONS)
    x_t, t, cond = inputs(half)
    with torch.no_grad():
        x0, maps = half.x0(x_t, t, cond), half.features(x_t, t, cond, TAPS)
        expected = teacher.x0(x_t, t, teacher.embed(PROMPTS))
    assert {x.dtype for x in (cond.tokens, x0, *maps)} == {torch.float32}
    assert half.vae.dtype == torch.float32
    assert (x0 - expected).norm() < 0.1 * expected.norm()
    assert {p.dtype for p in half.network.trainable_copy().parameters()} == {torch.float32}


def test_captions_are_cleaned_padded_and_cut_as_in_the_pipeline(teacher, folder):
    texts = ["  a &amp;amp; b\n c ", "a star" * 9]
    expected, _ = opened(folder).encode_prompt(texts, None, False, max_sequence_length=24)
    cond, clean = teacher.embed(texts), teacher.embed(["a & b c", ""])
    torch.testing.assert_close(cond.tokens, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(clean.tokens[0], cond.tokens[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(clean.tokens[1], cond.unconditional().tokens[0], rtol=0, atol=1e-5)
    assert not clean.tokens[1, 1:].count_nonzero()  # padding, which attention reads
    assert cond.pooled is None
    assert cond.mask is None
    assert teacher.unread(texts) == texts[1][22:]


def test_its_scheduler_s_shift_moves_the_guided_levels(teacher, monkeypatch):
    asked = []
    monkeypatch.setattr(teacher, "x0", lambda x_t, t, cond: asked.append(t[0].item()) or x_t)
    cond = teacher.embed(PROMPTS[:1])
    guided(teacher, cond, seeded([0]), shape=SHAPE, steps=2, guidance=1.0)
    assert asked == pytest.approx([1.0, 0.75])  # 3 t / (1 + 2 t) at a half


def test_a_lora_of_its_targets_is_a_student(folder, tmp_path):
    """Attention and feed-forward, of every block."""
    teacher = families.teacher_at(folder, **OPTIONS)
    x_t, t, cond = inputs(teacher)
    with torch.no_grad():
        before, student = teacher.x0(x_t, t, cond), lora(teacher, rank=2)
        names = [name for name, _ in teacher.network.model.named_modules()]
        adapted = {n.removesuffix(".lora_A") for n in names if n.endswith("lora_A")}
        torch.testing.assert_close(student.x0(x_t, t, cond), before, rtol=0, atol=1e-5)
        tiny.shake(student, 3, std=0.1)
        expected = student.x0(x_t, t, cond)
    attention = [
        f"{a}.{x}" for a in ("attn1", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    layers = [*attention, "ffn.net.0.proj", "ffn.net.2"]
    assert adapted == {f"blocks.{i}.{layer}" for i in range(3) for layer in layers}
    assert (expected - before).abs().max() > 1e-3
    scheduler = Consistency().scheduler(student, teacher)
    again = student_of(str(save_pipeline(student, teacher, tmp_path / "student", scheduler)))
    with torch.no_grad():
        found = again.x0(x_t, t, again.embed(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# -- what reads videos -----------------------------------------------------------------------------


def of_frames(critic, maps, t, cond):
    """The logits of each frame by itself, as of a picture: [T, B, K]."""
    frames = range(maps[0].shape[2])
    return [Logits.of(critic([m[:, :, i] for m in maps], t, cond)).by_head() for i in frames]


def test_convolutional_heads_read_frame_by_frame(teacher):
    x_t, t, cond = inputs(teacher)
    with torch.no_grad():
        maps = teacher.features(x_t, t, cond, TAPS)
        heads = ConvHeads(teacher.channels, pooled=0, spectral=False).eval()
        found = heads(maps, t, cond)
        frames = of_frames(heads, maps, t, cond)
    assert found.sizes == (18, 18, 18)  # 3 frames of 2 x 3 tokens
    for k, logits in enumerate(found.by_head()):
        torch.testing.assert_close(logits, torch.cat([each[k] for each in frames], dim=1))


def test_a_pool_reads_frame_by_frame_and_judges_the_whole_by_their_mean(teacher):
    x_t, t, cond = inputs(teacher)
    channels = {f"{task}.{tap}": 24 for task in ("global", "local") for tap in TAPS}
    pool = Pool(channels, size=24, width=16, levels=[0.5])
    critic = pool.draw(torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = [*teacher.features(x_t, t, cond, TAPS)] * 2
        found, frames = critic(maps, t, cond), of_frames(critic, maps, t, cond)
    for k, logits in enumerate(found.by_head()):
        expected = torch.cat([each[k] for each in frames], dim=1)
        expected = expected.mean(1, keepdim=True) if k < 3 else expected
        torch.testing.assert_close(logits, expected)


def test_a_classifier_gives_one_logit_for_a_video(teacher):
    x_t, t, cond = inputs(teacher)
    with torch.no_grad():
        maps = teacher.features(x_t, t, cond, TAPS[:1])
        heads = Classifiers({"block0": 24}, width=16, layers=1)
        found, frames = heads(maps, t, cond), of_frames(heads, maps, t, cond)
    expected = torch.stack([each[0] for each in frames]).mean(0)
    torch.testing.assert_close(found.values, expected)


@pytest.mark.parametrize("method", ["ladd", "nitrofusion", "dmd2", "regression", "consistency"])
def test_every_method_of_latents_trains_three_steps(method, teacher, tmp_path):
    made = tiny.METHODS[method](teacher)
    before = tiny.weights(made.student)
    data = [{"x0": noise(2, *SHAPE, seed=i), "caption": PROMPTS} for i in range(4)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    tiny.trainer(tmp_path, 3).fit(made, loader)
    assert made.step == 3
    after = tiny.weights(made.student)
    assert all(x.isfinite().all() for x in after.values())
    assert not tiny.same(before, after)


def test_a_strip_has_frames_from_the_first_to_the_last():
    video = torch.arange(17.0).view(1, 1, 17, 1, 1).expand(2, 3, 17, 4, 6)
    found = strips(video)
    assert found.shape == (2, 3, 4, 48)
    assert found[0, 0, 0, ::6].tolist() == [0, 2, 5, 7, 9, 11, 14, 16]
    assert strips(video[:, :, :5]).shape == (2, 3, 4, 30)
    picture = noise(2, 3, 4, 4)
    assert strips(picture) is picture


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(folder, tmp_path_factory):
    """Shards that `distill.synthesize` made of the teacher's own videos."""
    place = tmp_path_factory.mktemp("synthetic")
    (place / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:4]) + "\n", encoding="utf-8")
    words = ["teacher=wan", "teacher.dtype=float32", f"teacher.path={folder}", *WORDS]
    words += [f"prompts={place / 'prompts.txt'}", f"out={place / 'made'}", "guidance=2", "steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["distill.synthesize", *words, "precision=32-true"])
        importlib.import_module("distill.synthesize").main()
    return place / "made"


def test_synthesised_latents_are_the_teacher_s_videos(videos, teacher):
    data = LatentShards(str(videos), seeded=True)
    assert data.shape == SHAPE
    item = data[2]
    cond = teacher.embed([item["caption"]])
    options = {"shape": SHAPE, "steps": 2, "guidance": 2.0}
    expected = guided(teacher, cond, seeded([2]), **options)[0]
    torch.testing.assert_close(item["x0"], expected, rtol=0, atol=2e-3)
    assert torch.equal(item["noise"], noise(*SHAPE, seed=2))
    made = json.loads((videos / "manifest.json").read_text(encoding="utf-8"))
    assert made["size"] == [48, 32]


def run_words(folder, out, *more):
    words = ["teacher=wan", "teacher.dtype=float32", f"teacher.path={folder}", *WORDS]
    return [*words, "debug=smoke", "data.batch_size=2", f"run_dir={out}", *more]


def weights_of(run):
    return load_file(run / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(folder, videos, command, tmp_path):
    """Also of a pool, whose tasks read patches; those of LADD are in `test_contracts`."""
    more = ["data=synthetic", f"data.path={videos}", "method=nitrofusion"]
    more += ["callbacks.checkpoint.every=1"]
    more += ["discriminator.heads.size=24", "discriminator.heads.width=16"]
    for name, steps in (("whole", 3), ("halves", 2)):
        words = run_words(folder, tmp_path / name, *more, f"trainer.max_steps={steps}")
        code, _, err = command("run", *words)
        assert code == 0, err
    code, _, err = command("run", f"resume={tmp_path / 'halves'}", "trainer.max_steps=3")
    assert code == 0, err
    whole, halves = weights_of(tmp_path / "whole"), weights_of(tmp_path / "halves")
    assert tiny.same(whole, halves)
    assert not tiny.same(whole, weights_of_teacher(folder))
    code, _, err = command("inspect", f"run={tmp_path / 'whole'}")
    assert code == 1
    assert "its teacher makes videos, and this command shows heads on pictures" in err
    picture = Image.open(tmp_path / "whole" / "samples" / "step_000003.png")
    assert picture.size[0] > 8 * 48  # strips of frames


def weights_of_teacher(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_a_smoke_run_of_a_lora_needs_no_data(folder, command, tmp_path):
    """Renders of `shapes`, which stand still."""
    words = run_words(folder, tmp_path / "run", "student=lora", "student.rank=2")
    code, _, err = command("run", *words)
    assert code == 0, err
    assert "metrics=coco5k" not in err
    assert student_of(str(tmp_path / "run")).latent_shape == SHAPE
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    assert command("export", f"run={tmp_path / 'run'}", "to=lora", "dtype=float16")[0] == 0
    pipeline = opened(folder)
    pipeline.load_lora_weights(str(tmp_path / "run" / "lora_float16.safetensors"))
    assert pipeline.get_active_adapters()
    again = [f"run={tmp_path / 'run'}", f"lora={tmp_path / 'run'}", "prompt=x", "out=out"]
    code, _, err = command("sample", *again)
    assert code == 0, err


@pytest.mark.slow
def test_prompts_alone_suffice(folder, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:4]) + "\n", encoding="utf-8")
    real = "{_target_:distill.core.score_distillation.TeacherSamples,levels:[1.0,0.5],guidance:2}"
    more = ["data=prompts", f"data.path={tmp_path / 'prompts.txt'}", f"method.real={real}"]
    code, _, err = command("run", *run_words(folder, tmp_path / "run", *more))
    assert code == 0, err


@pytest.mark.slow
def test_the_doctor_counts_the_decoding_of_a_sample(folder, command):
    """In float32, as its autoencoder stays, and in tiles if asked; of the teacher's frames."""
    code, out, err = command("doctor", *run_words(folder, "run", "teacher.dtype=bfloat16"))
    assert code == 0, err
    (line,) = (x for x in out.splitlines() if "decoding" in x)
    assert re.search(r"decoding a video of 9 frames of 48x32 \d+\.\d\d GB", line)
    vae = opened(folder).vae.eval()
    x = torch.zeros(at_once(32, 9 * 48), *SHAPE)  # as many small ones as are decoded together
    with torch.no_grad():
        found = peak(lambda: vae.decode(x).sample)
    assert sizes.decoding(folder, 32, 48, "float32", frames=9) == pytest.approx(found, rel=0.01)
    many = [sizes.decoding(folder, 320, 480, "float32", frames=9, tiling=x) for x in (True, False)]
    assert many[0] < many[1]
    assert sizes.decoding(folder, 320, 480, "float32", frames=5) < many[1]


def test_sample_writes_a_video_with_its_settings(exported, command, tmp_path):
    words = [f"run={exported}", "precision=32-true", "prompts=[a star,a ring]", "seed=3", "out=out"]
    words += ["slicing=true", "tiling=true"]  # its videos are smaller than a tile
    code, out, err = command("sample", *words)
    assert code == 0, err
    paths = [tmp_path / line for line in out.split()]
    assert [path.suffix for path in paths] == [".webp", ".webp", ".png"]
    video = Image.open(paths[1])
    assert (video.n_frames, video.size) == (9, (48, 32))
    about = json.loads(video.getexif()[ExifTags.Base.ImageDescription])
    assert (about["prompt"], about["seed"], about["fps"]) == ("a ring", "3", "16")
    model = student_of(str(exported))
    cond = model.embed(["a star", "a ring"])
    x0 = Consistency()(model, cond, seeded([3, 3]), shape=SHAPE, steps=1)
    expected = to_bytes(model.decoded(x0))[1]
    video.seek(8)
    last = np.asarray(video.convert("RGB"), dtype=float)
    assert video.info["duration"] == 62  # milliseconds of a frame, of 16 a second
    errors = [abs(last - expected[:, i].permute(1, 2, 0).numpy()).mean() for i in (8, 4, 0)]
    assert errors[0] < min(12, *errors[1:])  # lossy, of what is nearly noise
    assert Image.open(paths[2]).size == (8 * 48 + 4, 2 * 32 + 6)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(folder, command, tmp_path):
    """Its first commands in their order, and its Python; only sizes and counts are changed."""
    text = PAGE.read_text(encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:4]) + "\n", encoding="utf-8")
    small = [f"teacher.path={folder}", "teacher.dtype=float32", *WORDS]
    own = {"synthesize": [*small, "steps=2"], "run": [*small, "debug=smoke", "student.rank=2"]}
    for line in re.findall(r"^python -m distill\.(.*)$", text.split("```")[1], re.M):
        name, *words = shlex.split(line)
        code, _, err = command(name, *words, *own.get(name, []))
        assert code == 0, err
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    block = block.replace('"height": 480, "width": 832, "num_frames": 81', str(CALL)[1:-1])
    block, written = block.partition("export_to_video(video")[::2]
    assert written
    exec(compile(block, str(PAGE), "exec"), found := {})
    assert found["video"].shape == (9, 32, 48, 3)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (80, "teacher.frames=80: must be 1 more than a multiple of 4; use 81 or 85"),
        (0, "teacher.frames=0: must be 1 more than a multiple of 4; use 1 or 5"),
    ],
)
def test_frames_that_the_autoencoder_cannot_encode_are_refused(frames, said, folder):
    with pytest.raises(ValueError, match=f"^{said}$"):
        families.teacher_at(folder, **{**OPTIONS, "frames": frames})


def test_a_size_that_its_pipeline_refuses_is_refused(folder):
    said = r"^teacher.width and height=\[40, 32\]: must be a side, .* multiples of 16 up to 512$"
    with pytest.raises(ValueError, match=said):
        families.teacher_at(folder, **{**OPTIONS, "width": 40})


def test_pictures_are_not_encoded(teacher):
    with pytest.raises(ValueError, match="this teacher makes videos, and reads no pictures"):
        teacher.encode(noise(1, 3, 32, 48))


def test_a_model_of_two_transformers_is_refused_before_its_weights(folder, command, tmp_path):
    place = shutil.copytree(folder, tmp_path / "two")
    shutil.copytree(place / "transformer", place / "transformer_2")
    for file in place.rglob("*.safetensors"):
        file.unlink()
    code, _, err = command("run", *run_words(place, tmp_path / "run"))
    assert code == 1
    assert "has two transformers, one for high noise and one for low (transformer_2/)" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["method=add"], "method._target_=distill.methods.add.ADD: judges pictures, and this"),
        (["data=images", "data.path=."], "data: these are pictures, and this teacher makes videos"),
        (["metrics=prompts", "metrics.path=prompts.txt"], "metrics: they score pictures, and this"),
        pytest.param(
            ["metrics=shapes"],
            "metrics: the reader of shapes reads pictures, and this teacher makes",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_for_pictures_is_refused(more, said, folder, command, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a star", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a star\n", encoding="utf-8")
    code, _, err = command("run", *run_words(folder, tmp_path / "run", *more))
    assert code == 1
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("evaluate", ["metrics=shapes"], "makes videos, and this evaluation is for pictures"),
        ("sample", ["prompt=x", "image=a.png"], "makes videos from text alone; leave it out"),
    ],
)
def test_commands_for_pictures_refuse_a_student_of_videos(
    name, more, said, exported, command, tmp_path
):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    code, _, err = command(name, f"run={exported}", *more)
    assert code == 1
    assert said in err


@pytest.mark.slow
def test_latents_of_other_frames_are_refused(folder, videos, shards, command, tmp_path):
    words = [*run_words(folder, tmp_path / "run"), "data=synthetic"]
    other = [f"data.path={videos}", "teacher.frames=13"]
    code, _, err = command("run", *words, *other)
    assert code == 1
    assert "its latents have 3 frames and this teacher's have 4; make them by" in err
    code, _, err = command("run", *words, f"data.path={shards}")
    assert code == 1
    assert "its latents have no frames and this teacher's have 3; make them by" in err
