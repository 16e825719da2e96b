"""What leaves a run, opened by plain diffusers: pixels and tensors are the student's own."""

from __future__ import annotations

import base64
import importlib
import json
import os
import shutil
import sys
import threading
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

import cards
import tiny
from distill import students
from distill.config.models import student_of
from distill.exporting.card import write_card
from distill.exporting.low_rank import difference
from distill.exporting.single_file import autoencoder, open_clip, save_single_file, unet
from distill.sampling import Consistency, EulerAncestral, sampler_of, seeded
from distill.teachers.sd3 import SD3

PART = {"mmdit": "transformer", "unet": "unet", "sdxl": "unet"}
KIND = {"mmdit": "shapes", "unet": "shapes_unet", "sdxl": "sdxl"}
SEED, PROMPT = 5, tiny.CAPTIONS[0]


@pytest.fixture(scope="module")
def run_of(pipelines, shards, tmp_path_factory):
    """(family, student) -> the folder of a finished run of two steps, long enough to move."""
    made = {}

    def run(family, student):
        if (family, student) not in made:
            folder = tmp_path_factory.mktemp("runs") / f"{family}_{student}"
            options = [f"student={student}", *(["student.rank=4"] if student == "lora" else [])]
            options += [
                "optimizer.student.lr=0.01",
                "loop.warmup_steps=0",
                "loop.ema_decay=0",
                "~metrics",
            ]
            options += ["teacher.dtype=float32"] if family == "sdxl" else []
            where = [
                f"teacher.path={pipelines(family)}",
                f"data.path={shards}",
                f"run_dir={folder}",
            ]
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder.parent)
                patch.setattr(
                    sys,
                    "argv",
                    ["distill.run", "debug=smoke", f"teacher={KIND[family]}", *options, *where],
                )
                importlib.import_module("distill.run").main()
            made[family, student] = folder
        return made[family, student]

    return run


@pytest.fixture(params=["mmdit", "unet"])
def family(request):
    return request.param


@pytest.fixture(params=["lora", "full"])
def run(request, family, run_of):
    return run_of(family, request.param)


def opened(kind, folder, **options):
    pipeline = kind.from_pretrained(folder, dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def close(found, expected):
    """To a rounding step of 255."""
    assert found.shape == expected.shape
    assert found.std() > 0.02
    assert (found * 255 - expected * 255).abs().max() <= 1.01


def pixels(model, x0):
    return (model.decode(x0) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)


def called(pipeline, steps, **options):
    """A call as the card has it, and as a user of plain diffusers types it."""
    generator = torch.Generator().manual_seed(SEED)
    if "Flow" in type(pipeline.scheduler).__name__:
        pipeline.scheduler.step = partial(pipeline.scheduler.step, generator=generator)
        options["sigmas"] = [1 - i / steps for i in range(steps)]
    options |= {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "np"}
    return torch.from_numpy(pipeline(PROMPT, generator=generator, **options).images[0])


# -- to=diffusers ----------------------------------------------------------------------------------


def test_the_exported_folder_draws_what_our_sampler_draws(
    run, family, command, pipelines, tmp_path
):
    code, out, _ = command("export", f"run={run}", "to=diffusers", f"out={tmp_path / 'mine'}")
    assert (code, out.splitlines()[-1]) == (0, f"wrote {tmp_path / 'mine'}")
    model = student_of(str(run))
    sampler = sampler_of(model.pipeline)
    with torch.no_grad():
        cond, shape = model.embed([PROMPT]), model.latent_shape
        for steps in (1, 2, 4):
            x0 = sampler(model, cond, seeded([SEED]), shape=shape, steps=steps)
            close(cards.drawn(tmp_path / "mine", PROMPT, steps=steps, seed=SEED), pixels(model, x0))
        before = student_of(str(pipelines(family)))
        assert not torch.allclose(
            Consistency()(before, cond, seeded([SEED]), shape=shape, steps=4), x0, atol=1e-3
        )
        image = model.encode(
            torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
        )
        options = {"image": image, "strength": 0.5}
        x0 = sampler(model, cond, seeded([SEED]), shape=shape, steps=2, **options)
    again = opened(AutoPipelineForImage2Image, tmp_path / "mine")
    more = {"height": 64, "width": 64} if family == "mmdit" else {}
    close(called(again, 2, **options, **more), pixels(model, x0))


@pytest.mark.parametrize("sampler", [Consistency(), EulerAncestral()])
def test_a_student_of_stable_diffusion_opens_without_a_warning(sampler, teachers, tmp_path):
    """Neither of its scheduler's file, nor of what ours says in its index."""
    teacher = teachers("unet")
    scheduler = sampler.scheduler(teacher.network, teacher)
    folder = students.save_pipeline(teacher.network, teacher, tmp_path / "student", scheduler)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opened(StableDiffusionPipeline, folder, safety_checker=None)
    assert not [str(w.message) for w in said if "scheduler" in str(w.message)]


def test_text_encoders_are_the_teacher_s_very_files(run, family, pipelines):
    for file in (pipelines(family)).glob("text_encoder*/*"):
        assert (
            file.read_bytes()
            == (run / "student" / file.relative_to(pipelines(family))).read_bytes()
        )


def test_out_is_never_overwritten(run_of, command, tmp_path):
    code, _, err = command(
        "export", f"run={run_of('unet', 'lora')}", "to=diffusers", f"out={tmp_path}"
    )
    assert code == 1
    assert err.endswith("is there already; remove it or name another\n")


def test_euler_steps_are_an_export_of_any_flow_student(run_of, command, tmp_path):
    """As it was trained long ago: of the run nothing changes, and what is sampled from the folder
    is what it draws.
    """
    run = run_of("mmdit", "full")
    asked = [f"run={run}", "to=diffusers", "scheduler=euler", f"out={tmp_path / 'mine'}"]
    code, _, err = command("export", *asked)
    assert code == 0, err
    index = json.loads((run / "student" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_distill"]["sampler"]["name"] == "Consistency"
    for word, folder, code in (("own", run, 0), ("euler", tmp_path / "mine", 0)):
        options = [f"run={folder}", f"prompt='{PROMPT}'", "steps=4", f"seed={SEED}", f"out={word}"]
        assert command("sample", *options, "precision=32-true")[0] == code
    (ours,) = (tmp_path / "euler").iterdir()
    (own,) = (tmp_path / "own").iterdir()
    found = torch.from_numpy(np.asarray(Image.open(ours)) / 255)
    close(cards.drawn(tmp_path / "mine", PROMPT, steps=4, seed=SEED), found)
    assert (np.asarray(Image.open(own)).astype(int) != np.asarray(Image.open(ours))).any()
    code, _, err = command("export", f"run={run_of('unet', 'full')}", *asked[1:3], "out=x")
    assert code == 1
    assert err.startswith("distill: scheduler=euler: is for students of flow models, and run=")


# -- the card --------------------------------------------------------------------------------------


def test_the_card_says_what_there_is_to_know(run_of, pipelines, tmp_path):
    shutil.copytree(run_of("unet", "full"), tmp_path / "run")
    shutil.copytree(pipelines("unet"), tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text(
        "---\nlicense: openrail++\n---\n# a model\n", encoding="utf-8"
    )
    rows = [
        {"who": "teacher", "steps": 28, "frechet": 400.0},
        {"who": "student", "steps": 1, "frechet": 500.5},
    ]
    (tmp_path / "run" / "evaluation.json").write_text(
        json.dumps({"protocol": {"prompts": 16}, "rows": rows}), encoding="utf-8"
    )
    (tmp_path / "run" / "samples").mkdir(exist_ok=True)
    (tmp_path / "run" / "samples" / "comparison.png").write_bytes(b"a picture")
    card = write_card(
        tmp_path / "run" / "student", tmp_path / "run", tmp_path / "teacher"
    ).read_text(encoding="utf-8")
    for said in (
        "\nlicense: openrail++\n",
        "by LADD ([2403.12015](https://arxiv.org/abs/2403.12015)), trained for 2 steps on 8 images",
        "Teacher: unet; its licence, openrail++, also applies to the student.",
        "\nsteps = 4\n",
        "    num_inference_steps=steps,\n    guidance_scale=0.0,\n    generator=generator,\n",
        "| student | 1 | 500.500 |",
        "Protocol: prompts 16.",
        "![teacher at 28, student at 1; one prompt and noise a column](comparison.png)",
    ):
        assert said in card, said
    assert str(tmp_path) not in card
    assert (tmp_path / "run" / "student" / "comparison.png").is_file()
    (tmp_path / "teacher" / "README.md").unlink()
    (tmp_path / "teacher" / "LICENSE.md").write_text("# Some Licence 1.0\n", encoding="utf-8")
    (tmp_path / "run" / "student" / "README.md").unlink()
    card = write_card(
        tmp_path / "run" / "student", tmp_path / "run", tmp_path / "teacher"
    ).read_text(encoding="utf-8")
    assert "license: other\nlicense_name: Some Licence 1.0\nlicense_link: LICENSE.md\n" in card


def test_a_card_shows_numbers_that_yaml_takes_for_text(tmp_path):
    rows = [
        {
            "who": "student",
            "steps": 1,
            "recall": float("nan"),
            "diversity": 1e-5,
            "frechet": float("inf"),
        }
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    (tmp_path / "student").mkdir()
    card = write_card(tmp_path / "student", tmp_path).read_text(encoding="utf-8")
    assert "| who | steps | frechet | recall | diversity |" in card
    assert "| student | 1 | inf | nan | 0.000 |" in card


def test_a_finished_run_has_a_card_and_a_lora_its_file(run_of):
    lora, full = run_of("mmdit", "lora"), run_of("mmdit", "full")
    for folder in (lora, full):
        assert "sigmas=[1 - i / steps for i in range(steps)]" in (
            folder / "student" / "README.md"
        ).read_text(encoding="utf-8")
    assert (lora / "lora.safetensors").is_file()
    assert not (full / "lora.safetensors").exists()


def test_without_its_third_text_encoder_it_opens_as_the_card_says(pipelines, tmp_path):
    teacher = SD3(str(pipelines("mmdit")), without=["text_encoder_3", "tokenizer_3"])
    student = tiny.shake(students.full(teacher), 4)
    folder = students.save_pipeline(
        student, teacher, tmp_path / "student", Consistency().scheduler(student, teacher)
    )
    assert not (folder / "text_encoder_3").exists()
    card = write_card(folder, tmp_path).read_text(encoding="utf-8")
    assert 'from_pretrained("<this folder>", text_encoder_3=None, tokenizer_3=None)' in card
    model = student_of(str(folder))
    with torch.no_grad():
        x0 = Consistency()(
            model, model.embed([PROMPT]), seeded([SEED]), shape=model.latent_shape, steps=2
        )
    close(cards.drawn(folder, PROMPT, steps=2, seed=SEED), pixels(model, x0))


# -- to=lora ---------------------------------------------------------------------------------------


def assert_lora_gives(file, family, base, expected, *, rtol=1e-3):
    """The base's pipeline with this file put on by diffusers has the student's weights."""
    pipeline = opened(AutoPipelineForText2Image, base)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    found, before = (m.state_dict() for m in (getattr(pipeline, PART[family]), expected))
    assert found.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=rtol * float(value.abs().max())
        )


@pytest.mark.parametrize(
    ("family", "naming"),
    [
        *(("mmdit", "diffusers"), ("unet", "diffusers"), ("unet", "kohya")),
        pytest.param("sdxl", "kohya", marks=pytest.mark.slow),
    ],
)
def test_a_lora_put_on_the_teacher_is_the_student(
    family, naming, run_of, pipelines, command, tmp_path
):
    folder = run_of(family, "lora")
    file = tmp_path / "lora.safetensors"
    code, *_ = command("export", f"run={folder}", "to=lora", f"naming={naming}", f"out={file}")
    assert code == 0
    expected = student_of(str(folder)).network.model
    teacher = student_of(str(pipelines(family))).network.model.state_dict()
    assert sum(not torch.equal(teacher[k], v) for k, v in expected.state_dict().items()) > 10
    assert_lora_gives(file, family, pipelines(family), expected)
    if naming == "kohya":
        state = load_file(file)
        assert all(name.startswith("lora_unet_") for name in state)
        alphas = [int(v) for k, v in state.items() if k.endswith(".alpha")]
        assert len(alphas) * 3 == len(state)
        assert set(alphas) == {4}


def test_alpha_goes_into_the_file(pipelines, tmp_path, teachers):
    """A run whose alpha is not its rank: the factor is in B, so that no reader need know of it."""
    from distill.exporting.low_rank import save_lora
    from distill.students.lora import factors, lora, merged
    from distill.teachers.sd import SD

    student = tiny.shake(lora(SD(str(pipelines("unet"))), rank=2, alpha=7), 3)
    for naming in ("diffusers", "kohya"):
        file = save_lora(
            factors(student), tmp_path / f"{naming}.safetensors", part="unet", naming=naming
        )
        assert_lora_gives(file, "unet", pipelines("unet"), merged(student))


def test_of_a_full_student_a_rank_keeps_what_it_can(run_of, pipelines, command, family, tmp_path):
    folder = run_of(family, "full")
    student, base = (student_of(str(f)).network.model for f in (folder, pipelines(family)))
    few, whole = difference(student, base, 2)[1], difference(student, base, 1000)[1]
    assert 0 < few < whole <= 1
    code, out, _ = command(
        "export", f"run={folder}", "to=lora", "rank=300", f"out={tmp_path / 'all.safetensors'}"
    )
    assert code == 0
    assert "rank 300 keeps" in out
    adapted = set(load_file(tmp_path / "all.safetensors"))
    merged = {k: v.clone() for k, v in base.state_dict().items()}
    for (
        name,
        value,
    ) in student.state_dict().items():  # of all else, biases and norms, the base's own
        if f"{PART[family]}.{name.removesuffix('.weight')}.lora_A.weight" in adapted:
            merged[name] = value
    base.load_state_dict(merged)
    assert_lora_gives(tmp_path / "all.safetensors", family, pipelines(family), base)


# -- to=single_file --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["unet", "sdxl"])
def test_a_single_file_has_the_student_s_tensors(family, run_of, command, tmp_path):
    folder, file = run_of(family, "lora"), tmp_path / "one.safetensors"
    assert command("export", f"run={folder}", "to=single_file", f"out={file}")[0] == 0
    ours = student_of(str(folder)).pipeline
    student, names = str(folder / "student"), {}
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        names[part] = kind.from_single_file(
            file, config=student, subfolder=part, local_files_only=True
        )
    for part, found in names.items():
        assert tiny.same(tiny.weights(found), tiny.weights(getattr(ours, part))), part
    kind = StableDiffusionPipeline if family == "unet" else StableDiffusionXLPipeline
    whole = kind.from_single_file(file, config=student, local_files_only=True, safety_checker=None)
    assert tiny.same(tiny.weights(whole.text_encoder), tiny.weights(ours.text_encoder))
    if (
        family == "sdxl"
    ):  # its two are of one width here, by which diffusers tells them apart: so its converter alone
        text = ours.text_encoder_2
        found = convert_open_clip_checkpoint(
            text, load_file(file), prefix="conditioner.embedders.1.model."
        )
        assert tiny.same(
            {k: v for k, v in found.items() if k in text.state_dict()}, tiny.weights(text)
        )


def test_stable_diffusion_2_has_an_open_clip():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = CLIPTextModel(CLIPTextConfig(**shape, vocab_size=49408, hidden_act="gelu"))
    state = {f"cond_stage_model.model.{k}": v for k, v in open_clip(text)}
    assert {k.split(".")[2] for k in state} == {
        "positional_embedding",
        "token_embedding",
        "ln_final",
        "transformer",
    }
    found = convert_open_clip_checkpoint(text, state)
    assert tiny.same(
        {k.removeprefix("text_model."): v for k, v in found.items()}, tiny.weights(text)
    )


def test_layouts_of_full_size_name_what_the_original_names(pipelines, tmp_path):
    """Stable Diffusion 1.5's and XL's own architectures, without their weights: names known from
    their files.
    """
    sd15 = {"cross_attention_dim": 768}
    xl = {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    with torch.device("meta"):
        small, large, vae = (
            UNet2DConditionModel(**sd15), UNet2DConditionModel(**xl),
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                          block_out_channels=(128, 256, 512, 512), layers_per_block=2),
        )  # fmt: skip
    names = {k: tuple(v.shape) for k, v in unet(small)}
    assert len(names) == len(small.state_dict()) == 686
    assert names["input_blocks.0.0.weight"] == (320, 4, 3, 3)
    assert names["input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert names["input_blocks.4.0.skip_connection.weight"] == (640, 320, 1, 1)
    assert names["middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == (1280, 768)
    assert names["output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert names["output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    assert names["output_blocks.11.1.proj_out.weight"] == (320, 320, 1, 1)
    assert names["time_embed.2.bias"] == (1280,)
    names = {k: tuple(v.shape) for k, v in unet(large)}
    assert len(names) == len(large.state_dict()) == 1680
    assert names["label_emb.0.0.weight"] == (1280, 2816)
    assert names["input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048)
    assert names["output_blocks.2.2.conv.weight"] == (1280, 1280, 3, 3)
    assert names["output_blocks.8.0.out_layers.3.weight"] == (320, 320, 3, 3)
    names = {k: tuple(v.shape) for k, v in autoencoder(vae)}
    assert len(names) == len(vae.state_dict()) == 248
    assert names["encoder.down.2.downsample.conv.weight"] == (512, 512, 3, 3)
    assert names["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert names["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert names["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert names["decoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert names["encoder.mid.attn_1.norm.weight"] == (512,)


def test_dtype_halves_a_file(run_of, command, tmp_path):
    """And leaves the run's own file as it is."""
    folder = run_of("unet", "lora")
    before = (folder / "lora.safetensors").read_bytes()
    assert command("export", f"run={folder}", "to=lora", "dtype=float16")[1].endswith(
        "lora_float16.safetensors\n"
    )
    assert (folder / "lora.safetensors").read_bytes() == before
    for dtype in ("float16", "float32"):
        out = tmp_path / f"{dtype}.safetensors"
        words = ["export", f"run={folder}", "to=lora", f"dtype={dtype}", f"out={out}"]
        assert command(*words)[0] == 0
        assert {v.dtype for v in load_file(out).values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("family", "student", "options", "said"),
    [
        ("mmdit", "full", ["to=lora", "rank=2", "dtype=int8"], "dtype=int8: must be a dtype"),
        ("mmdit", "lora", ["to=lora", "naming=kohya"], "naming=kohya: is for UNets"),
        ("unet", "lora", ["to=lora", "naming=other"], "naming=other: must be diffusers or kohya"),
        (
            "unet",
            "lora",
            ["to=lora", "dtype=int8"],
            "dtype=int8: must be a dtype of torch: float32, bfloat16, float16",
        ),
        ("unet", "full", ["to=lora"], "rank=null: run="),
        ("unet", "full", ["to=lora", "rank=0"], "rank=0: must be a whole number"),
        ("unet", "full", ["to=gguf"], "run="),
    ],
)
def test_what_cannot_be_exported_is_said(family, student, options, said, run_of, command, tmp_path):
    code, _, err = command(
        "export", f"run={run_of(family, student)}", *options, f"out={tmp_path / 'x'}"
    )
    assert code == 1
    assert err.startswith(f"distill: {said}")
    assert err.count("\n") == 1
    assert not list(Path(tmp_path).glob("x*"))


def test_a_pipeline_of_another_kind_is_no_single_file(run_of, command, tmp_path):
    with pytest.raises(ValueError, match="a SimpleNamespace has no such layout"):
        save_single_file(SimpleNamespace(), tmp_path / "x")
    folder = shutil.copytree(run_of("mmdit", "full") / "student", tmp_path / "student")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "SanaPipeline"}), encoding="utf-8"
    )
    code, _, err = command("export", f"run={folder}", "to=single_file", f"out={tmp_path / 'x'}")
    assert code == 1
    assert err.startswith("distill: to=single_file: is for StableDiffusionPipeline, ")
    assert not (tmp_path / "x").exists()


def test_a_unet_that_predicts_a_flow_is_no_single_file(run_of, command, tmp_path):
    folder = shutil.copytree(run_of("unet", "full") / "student", tmp_path / "student")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["distill.teachers.schedulers", "FlowScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    code, _, err = command("export", f"run={folder}", "to=single_file", f"out={tmp_path / 'x'}")
    assert code == 1
    assert err.startswith("distill: to=single_file: cannot mark a UNet that predicts a flow")
    assert not (tmp_path / "x").exists()


def test_a_single_file_of_a_transformer_has_diffusers_names(run_of, command, tmp_path):
    """Which ComfyUI's own maps know of SD3, FLUX and PixArt."""
    folder, file = run_of("mmdit", "full"), tmp_path / "one.safetensors"
    asked = [f"run={folder}", "to=single_file", "dtype=bfloat16", f"out={file}"]
    assert command("export", *asked)[0] == 0
    expected = tiny.weights(student_of(str(folder)).network.model.bfloat16())
    assert tiny.same(load_file(file), expected)
    assert {"pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"} <= set(expected)


# -- to=hub ----------------------------------------------------------------------------------------


class Stub(BaseHTTPRequestHandler):
    """As much of the hub as a push meets; what it was sent is in the server's `pushed`."""

    def do_POST(self):
        said = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/repos/create":
            self.server.visibility = json.loads(said)["visibility"]
            port = self.server.server_port
            self.answer({"url": f"http://127.0.0.1:{port}/me/mine"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(said)["files"]]
            self.answer({"files": [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths
            ]})  # fmt: skip
        elif "/commit/" not in self.path:  # the card's front matter is looked at first
            self.answer({"errors": [], "warnings": []})
        elif self.server.full:
            self.answer({"error": "no space left"}, 403)
        else:
            lines = [json.loads(line) for line in said.splitlines()]
            files = (line["value"] for line in lines if line["key"] == "file")
            self.server.pushed |= {f["path"]: base64.b64decode(f["content"]) for f in files}
            url = f"http://127.0.0.1:{self.server.server_port}/me/mine/commit/1"
            self.answer({"success": True, "commitUrl": url, "commitOid": "1", "hookOutput": ""})

    def do_GET(self):
        self.answer({"id": "me/mine", "siblings": [], "sha": "1"})

    def answer(self, said, code=200):
        body = json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.pushed, server.full = {}, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def pushed(hub, forks, tmp_path):
    """The command in a process of its own, as it reads the hub's address when it begins -> exit
    code, out, err.
    """

    def pushed(run, out):
        known = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_x"}
        done = forks.command(
            "export",
            [f"run={run}", "to=hub", "repo=me/mine", f"out={out}"],
            environment={**os.environ, **known, "HF_HUB_OFFLINE": "0"},
            out=tmp_path / "said_out.txt",
            err=tmp_path / "said_err.txt",
        )
        return done.wait(timeout=300), done.said("out"), done.said("err")

    return pushed


@pytest.mark.slow
def test_a_student_is_pushed_with_its_card(run_of, hub, pushed, tmp_path):
    code, said, err = pushed(run_of("unet", "full"), tmp_path / "out")
    assert code == 0, err
    assert said.endswith(f"wrote http://127.0.0.1:{hub.server_port}/me/mine\n")
    there = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*")}
    files = {name: path.read_bytes() for name, path in there.items() if path.is_file()}
    assert hub.pushed == files
    assert {"README.md", "model_index.json", "scheduler/scheduler_config.json"} <= set(files)
    assert hub.visibility == "private"


def test_nothing_else_in_the_folder_is_pushed(run_of, hub, pushed, tmp_path):
    """By default the run's own folder is pushed."""
    run = Path(shutil.copytree(run_of("unet", "full"), tmp_path / "run"))
    (tmp_path / "key").write_text("mine", encoding="utf-8")
    (run / "student" / ".env").write_text("mine", encoding="utf-8")
    (run / "student" / "LICENSE").symlink_to(tmp_path / "key")
    (run / "student" / "tokenizer" / "key.json").symlink_to(tmp_path / "key")
    code, _, err = pushed(run, "null")
    assert code == 0, err
    assert {"README.md", "model_index.json", "unet/config.json"} <= set(hub.pushed)
    assert not {".env", "LICENSE", "tokenizer/key.json"} & set(hub.pushed)
    assert not any(b"mine" in content for content in hub.pushed.values())


def test_a_push_that_fails_is_said_and_the_folder_stays(run_of, hub, pushed, tmp_path):
    hub.full = True
    code, _, err = pushed(run_of("unet", "full"), tmp_path / "out")
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("distill: repo=me/mine: cannot be pushed to (")
    assert last.endswith(f"then `hf upload me/mine {tmp_path / 'out'} --private`")
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_nobody_is_advised_to_push_what_else_is_in_the_folder(run_of, hub, pushed, tmp_path):
    hub.full = True
    run = Path(shutil.copytree(run_of("unet", "full"), tmp_path / "run"))
    (run / "student" / ".env").write_text("mine", encoding="utf-8")
    code, _, err = pushed(run, "null")
    assert code == 1
    assert err.splitlines()[-1].endswith("then give the command again")
    hub.full = False
    code, _, err = pushed(run, "null")
    assert code == 0, err
    assert ".env" not in hub.pushed
