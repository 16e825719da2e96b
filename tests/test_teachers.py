"""Teachers against diffusers itself: the same numbers as plain pipelines, taps as an independent
hook sees them.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import tiny
from distill.core.score_distillation import guided_x0
from distill.teachers.attention import Attention, attend
from distill.teachers.families import Family
from distill.teachers.loading.reading import read_pipeline
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3, SILENT_TOKENS

PROMPTS = tiny.CAPTIONS[:2]
LAST = {"mmdit": "block4", "unet": "up1"}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_mmdit(folder):
    """The transformer as diffusers alone reads it."""
    return SD3Transformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32).eval()


@pytest.mark.parametrize("length", [90, 600])
def test_attention_in_half_precision_is_that_of_float64(length):
    """Short sequences take another way than long ones on a CPU."""
    q, k, v = (noise(2, 3, length, 16, seed=i).bfloat16().requires_grad_() for i in range(3))
    bias = torch.zeros(1, 1, 1, length)
    bias[..., 0], bias[..., -1] = (
        -math.inf,
        math.log(256),
    )  # a hidden key, and one that counts for many
    mixed = attend(q, k, v, bias.bfloat16())
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = (exact[0] @ exact[1].mT / 4 + bias.double()).softmax(-1) @ exact[2]
    torch.testing.assert_close(mixed.double(), expected, rtol=0.02, atol=0.03)
    direction = noise(*mixed.shape, seed=3)
    (mixed * direction).sum().backward()
    (expected * direction).sum().backward()
    for found, wanted in zip((q, k, v), exact, strict=True):
        assert (found.grad - wanted.grad).norm() < 0.02 * wanted.grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_attends_as_diffusers_has_it(teachers, pipelines, dtype):
    """Self-attention and attention to the text, in the kernel's precision and in half of it."""
    network, plain = (
        teachers("unet").network,
        UNet2DConditionModel.from_pretrained(pipelines("unet") / "unet"),
    )
    assert {type(p) for p in network.model.attn_processors.values()} == {Attention}
    cond, t = teachers("unet").embed(PROMPTS), torch.tensor([1.0, 0.3])
    x, plain_x = (noise(2, 4, 16, 16).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = network.predict(x, t, cond)
    expected = plain(plain_x, network.process.index(t), encoder_hidden_states=cond.tokens).sample
    found.float().square().sum().backward()
    expected.square().sum().backward()
    off = 1e-5 if dtype == torch.float32 else 0.03
    assert (found - expected).norm() < off * expected.norm()
    assert (x.grad - plain_x.grad).norm() < off * plain_x.grad.norm()


# -- the network, against diffusers ----------------------------------------------------------------


def test_one_silent_token_of_weight_256_is_256_of_them(teachers, pipelines):
    teacher, plain = teachers("mmdit"), plain_mmdit(pipelines("mmdit"))
    cond = teacher.embed(PROMPTS)
    assert cond.tokens.shape[1] == tiny.LENGTH + 1
    assert not cond.tokens[:, -1].any()
    assert cond.mask.tolist() == [[1.0] * tiny.LENGTH + [float(SILENT_TOKENS)]] * 2
    t = torch.tensor([1.0, 0.3])
    folded_x, plain_x = (noise(2, 4, 16, 16).requires_grad_() for _ in range(2))
    folded = teacher.network.predict(folded_x, t, cond)
    tokens = torch.cat(
        [cond.tokens[:, :-1], torch.zeros(2, SILENT_TOKENS, cond.tokens.shape[2])], dim=1
    )
    expected = plain(
        plain_x, encoder_hidden_states=tokens, pooled_projections=cond.pooled, timestep=1000 * t
    ).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5)
    direction = noise(2, 4, 16, 16, seed=1)
    (folded * direction).sum().backward()
    (expected * direction).sum().backward()
    assert plain_x.grad.abs().max() > 1e-2
    torch.testing.assert_close(folded_x.grad, plain_x.grad, rtol=0, atol=1e-5)
    # The weight matters: without it the one token is one among 97, not 256 among 352.
    unweighted = teacher.network.predict(
        noise(2, 4, 16, 16), t, type(cond)(cond.tokens, cond.pooled)
    )
    assert (unweighted - expected).abs().max() > 1e-3


def test_tokens_and_pooled_are_the_pipeline_s_own(teachers, pipelines):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipelines("mmdit"), dtype=torch.float32)
    tokens, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False
    )
    cond = teachers("mmdit").embed(PROMPTS)
    torch.testing.assert_close(cond.tokens[:, :-1], tokens[:, : tiny.LENGTH], rtol=0, atol=1e-6)
    assert not tokens[:, tiny.LENGTH :].any()
    torch.testing.assert_close(cond.pooled, pooled, rtol=0, atol=1e-6)

    pipeline = StableDiffusionPipeline.from_pretrained(pipelines("unet"), dtype=torch.float32)
    cond = teachers("unet").embed(PROMPTS)
    tokens, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    torch.testing.assert_close(cond.tokens, tokens, rtol=0, atol=1e-6)
    ids = pipeline.tokenizer(
        PROMPTS, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    pooled = pipeline.text_encoder(ids).pooler_output
    torch.testing.assert_close(cond.pooled, pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 0.6])
def test_guided_estimate_is_one_step_of_the_sd3_pipeline(teachers, pipelines, sigma):
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipelines("mmdit"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    x_t = noise(2, 4, 16, 16)
    expected = pipeline(
        PROMPTS,
        latents=x_t.clone(),
        num_inference_steps=1,
        sigmas=[sigma],
        guidance_scale=5.0,
        output_type="latent",
    ).images
    teacher = teachers("mmdit")
    with torch.no_grad():
        x0 = guided_x0(
            teacher, x_t, torch.full((2,), sigma), teacher.embed(PROMPTS), torch.tensor(5.0)
        )
        unguided = teacher.x0(x_t, torch.full((2,), sigma), teacher.embed(PROMPTS))
    torch.testing.assert_close(x0, expected, rtol=0, atol=5e-5)
    assert (unguided - expected).abs().max() > 1e-2


@pytest.mark.parametrize("index", [999, 499, 20])
def test_guided_estimate_is_the_x0_of_ddim(teachers, pipelines, index):
    folder, x_t = pipelines("unet"), noise(2, 4, 16, 16)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32).eval()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    with_caption, without = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(1000)
    teacher = teachers("unet")
    t = teacher.process.time(torch.tensor([index, index]))
    with torch.no_grad():
        one, other = (
            unet(x_t, index, encoder_hidden_states=h).sample for h in (with_caption, without)
        )
        expected = scheduler.step(other + 5.0 * (one - other), index, x_t).pred_original_sample
        x0 = guided_x0(teacher, x_t, t, teacher.embed(PROMPTS), torch.tensor(5.0))
        unguided = teacher.x0(x_t, t, teacher.embed(PROMPTS))
    assert torch.equal(teacher.process.index(t), torch.tensor([index, index]))
    # At the noisy end x0 is a difference divided by alpha = 0.07, so rounding counts against the
    # largest value.
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (unguided - expected).abs().max() > 1e-2 * expected.abs().max()


def test_sdxl_is_its_pipeline_guided_by_its_own_empty_caption(teachers, pipelines):
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipelines("sdxl"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    estimates, step = [], pipeline.scheduler.step

    def spy(output, index, x_t, **options):
        estimates.append(
            (int(index), step(output, index, x_t, return_dict=True).pred_original_sample)
        )
        return step(output, index, x_t, **options)

    pipeline.scheduler.step = spy
    teacher, x_t = teachers("sdxl"), noise(2, 4, 16, 16)
    pipeline(
        PROMPTS,
        latents=x_t.clone(),
        num_inference_steps=1,
        guidance_scale=5.0,
        output_type="latent",
    )
    ((index, expected),) = estimates
    t = teacher.process.time(torch.tensor([index, index]))
    with torch.no_grad():
        x0 = guided_x0(teacher, x_t, t, teacher.embed(PROMPTS), torch.tensor(5.0))
        unguided = teacher.x0(x_t, t, teacher.embed(PROMPTS))
        other_size = teacher.x0(noise(2, 4, 8, 8), t, teacher.embed(PROMPTS))
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (unguided - expected).abs().max() > 1e-2 * expected.abs().max()
    assert other_size.shape == (2, 4, 8, 8)
    assert list(teacher.blocks) == ["down0", "down1", "mid", "up0", "up1"]


def test_encode_and_decode_use_the_scale_and_shift_of_the_file(teacher, family):
    pixels = noise(2, 3, tiny.SIDE, tiny.SIDE).clamp(-1, 1)
    shift = {"mmdit": 0.1, "unet": 0.0}[family]
    with torch.no_grad():
        raw = teacher.vae.encode(pixels).latent_dist.mean
        latents = teacher.encode(pixels)
        torch.testing.assert_close(latents, 0.8 * (raw - shift), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            teacher.decode(latents), teacher.vae.decode(raw).sample, rtol=0, atol=1e-5
        )
    x = latents.clone().requires_grad_()
    teacher.decode(x).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["mmdit", "unet", "sdxl"])
def test_a_teacher_in_bfloat16_works_beside_float32(family, teachers, pipelines):
    """What goes in and comes out has the precision of the caller, and its student has float32."""
    half = type(teachers(family))(str(pipelines(family)), dtype="bfloat16")
    exact, x_t, t = teachers(family), noise(2, 4, 16, 16).requires_grad_(), torch.tensor([0.9, 0.4])
    cond = half.embed(PROMPTS)
    assert next(half.network.parameters()).dtype == torch.bfloat16
    x0, taps = half.x0(x_t, t, cond), list(half.channels)
    pixels = half.decode(half.encode(noise(2, 3, tiny.SIDE, tiny.SIDE)))
    maps = half.features(x_t, t, cond, taps)
    assert {x.dtype for x in (cond.tokens, cond.pooled, x0, pixels, *maps)} == {torch.float32}
    expected = exact.x0(x_t, t, exact.embed(PROMPTS))
    assert (x0 - expected).norm() < 0.1 * expected.norm()
    sum(m.square().mean() for m in maps).backward()
    assert x_t.grad.abs().max() > 0
    assert {p.dtype for p in half.network.trainable_copy().parameters()} == {torch.float32}


def test_a_checkpointed_decoder_has_the_same_gradient(teachers, pipelines):
    plain, saving = teachers("unet"), SD(str(pipelines("unet")), checkpointing=True)
    runs, gradients = [], []
    block = saving.vae.decoder.up_blocks[0]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    for teacher in (plain, saving):
        x = noise(2, 4, 16, 16).requires_grad_()
        teacher.decode(x).square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)
    assert len(runs) == 2  # forward, and again in backward
    with torch.no_grad():
        saving.decode(x)
    assert len(runs) == 3


# -- taps ------------------------------------------------------------------------------------------


def listen(module):
    """An independent hook: calls and last output of a module."""
    heard = {"calls": 0, "output": None}

    def hook(_module, _inputs, output):
        heard["calls"] += 1
        heard["output"] = output

    return heard, module.register_forward_hook(hook)


def test_maps_are_the_outputs_of_the_blocks(teacher, family):
    x_t, t, cond = noise(2, 4, 16, 16), torch.tensor([0.9, 0.4]), teacher.embed(PROMPTS)
    taps = list(teacher.blocks)
    assert (
        taps
        == {
            "mmdit": [f"block{i}" for i in range(5)],
            "unet": ["down0", "down1", "mid", "up0", "up1"],
        }[family]
    )
    listening = {name: listen(module) for name, (module, _) in teacher.network.tappable().items()}
    with torch.no_grad():
        teacher.network.predict(x_t, t, cond)  # whole, without taps
        outputs = {name: heard["output"] for name, (heard, _) in listening.items()}
        for _, handle in listening.values():
            handle.remove()
        maps = dict(zip(taps, teacher.features(x_t, t, cond, taps), strict=True))
    for name, found in maps.items():
        output = outputs[name]
        if family == "mmdit":  # (text, image tokens); token k stands at row k // 8, column k % 8
            tokens = output[1]
            assert found.shape == (2, 144, 8, 8)
            assert torch.equal(found[:, :, 3, 5], tokens[:, 3 * 8 + 5])
            assert torch.equal(found.flatten(2).transpose(1, 2), tokens)
        else:
            assert torch.equal(found, output[0] if isinstance(output, tuple) else output)
        assert found.shape[1] == teacher.channels[name]
        assert found.is_contiguous()
    reversed_maps = teacher.features(x_t, t, cond, taps[::-1])  # order is the caller's
    for name, found in zip(taps[::-1], reversed_maps, strict=True):
        torch.testing.assert_close(found, maps[name], rtol=0, atol=1e-6)


def test_network_stops_after_the_last_tap(teacher, family):
    x_t, t, cond = noise(2, 4, 16, 16), torch.tensor([0.9, 0.4]), teacher.embed(PROMPTS)
    first, last = list(teacher.channels)[0], LAST[family]
    second = list(teacher.channels)[1]
    of_second, handle_of_second = listen(teacher.network.tappable()[second][0])
    of_last, handle_of_last = listen(teacher.network.tappable()[last][0])
    try:
        teacher.features(x_t, t, cond, [first])
        assert (of_second["calls"], of_last["calls"]) == (0, 0)
        teacher.features(x_t, t, cond, [second, first])
        assert (of_second["calls"], of_last["calls"]) == (1, 0)
        teacher.features(x_t, t, cond, [last])
        assert (of_second["calls"], of_last["calls"]) == (2, 1)
    finally:
        handle_of_second.remove()
        handle_of_last.remove()


def hooks(module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_hooks_live_for_one_call(teacher, monkeypatch):
    x_t, t, cond = noise(2, 4, 16, 16), torch.tensor([0.9, 0.4]), teacher.embed(PROMPTS)
    before = hooks(teacher)
    teacher.features(x_t, t, cond, list(teacher.channels)[:2])
    assert hooks(teacher) == before
    with pytest.raises(ValueError, match="no such taps: block99; this network has"):
        teacher.features(x_t, t, cond, ["block99"])
    monkeypatch.setattr(teacher.network, "to_map", lambda name, output, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        teacher.features(x_t, t, cond, list(teacher.channels)[:2])
    assert hooks(teacher) == before


def test_gradient_reaches_the_input_and_no_weight(teacher):
    x_t = noise(2, 4, 16, 16).requires_grad_()
    t, cond = torch.tensor([0.9, 0.4]), teacher.embed(PROMPTS)
    maps = teacher.features(x_t, t, cond, list(teacher.channels))
    for number, found in enumerate(maps):
        (gradient,) = torch.autograd.grad(
            found.square().mean(), x_t, retain_graph=number + 1 < len(maps)
        )
        assert gradient.abs().max() > 0
        assert gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(teacher.x0(x_t, t, cond).sum(), x_t)
    assert gradient.abs().max() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_frozen_whatever_is_called_on_it(teacher):
    names = [type(m).__name__ for m in teacher.modules()]
    assert "AutoencoderKL" in names
    assert any("CLIPText" in name for name in names)
    for call in (
        lambda: teacher.train(),
        lambda: teacher.train(True),
        lambda: torch.nn.Sequential(teacher).train(),
    ):
        call()
        assert not any(m.training for m in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())


def test_twin_is_trainable_whole(teacher, family):
    twin = teacher.network.trainable_copy()
    assert all(p.requires_grad for p in twin.parameters())
    assert all(m.training for m in twin.modules())
    ours = {p.data_ptr() for p in teacher.parameters()}
    assert not ours & {p.data_ptr() for p in twin.parameters()}
    if (
        family == "mmdit"
    ):  # the processor holds state, and is the one that the copy's own blocks use
        assert twin._silent_tokens is not teacher.network._silent_tokens
        assert all(
            block.attn.processor is twin._silent_tokens for block in twin.model.transformer_blocks
        )


# -- captions --------------------------------------------------------------------------------------


def test_captions_know_the_empty_one(teacher):
    cond, empty = teacher.embed(PROMPTS), teacher.embed([""])
    nothing = cond.unconditional()
    assert len(cond) == len(nothing) == 2
    assert len(cond.null) == 1
    for name in ("tokens", "pooled", "mask"):
        if getattr(empty, name) is None:
            assert getattr(nothing, name) is None
            continue
        for row in getattr(nothing, name):
            torch.testing.assert_close(row, getattr(empty, name)[0], rtol=0, atol=1e-6)
    assert (nothing.tokens - cond.tokens).abs().max() > 1e-2
    assert (nothing.pooled - cond.pooled).abs().max() > 1e-2


def test_a_caption_means_the_same_in_any_company(teacher):
    together = teacher.embed(tiny.CAPTIONS[:5])
    alone = teacher.embed(tiny.CAPTIONS[3:4])
    torch.testing.assert_close(together.tokens[3:4], alone.tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.pooled[3:4], alone.pooled, rtol=0, atol=1e-5)


# -- folders that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [SD, SD3], ids=["SD", "SD3"])
def test_a_path_that_is_not_there_is_named(make, tmp_path):
    path = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError) as caught:
        make(path)
    assert (
        str(caught.value)
        == f"teacher.path={path}: no such folder; give a diffusers pipeline folder or a hub id"
    )


@pytest.mark.parametrize("make", [SD, SD3], ids=["SD", "SD3"])
def test_a_folder_that_is_no_pipeline_is_named(make, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        make(str(tmp_path))
    assert (
        str(caught.value)
        == f"teacher.path={tmp_path}: not a diffusers pipeline folder (it has no model_index.json)"
    )


@pytest.mark.parametrize(("family", "make"), [("mmdit", SD), ("unet", SD3)])
def test_a_pipeline_of_another_class_is_named(family, make, pipelines):
    classes = {SD: "StableDiffusionPipeline", SD3: "StableDiffusion3Pipeline"}
    found = json.loads((pipelines(family) / "model_index.json").read_text(encoding="utf-8"))[
        "_class_name"
    ]
    with pytest.raises(ValueError, match="choose another teacher=") as caught:
        make(str(pipelines(family)))
    assert (
        str(caught.value)
        == f"teacher.path={pipelines(family)} holds a {found}, but this teacher reads a"
        f" {classes[make]}; choose another teacher="
    )


def test_a_hub_id_is_left_to_the_hub(tmp_path, monkeypatch):
    asked = []

    class Pipeline:
        @staticmethod
        def download(path, **options):
            asked.append((path, options))
            raise OSError("no such model\nand much more")

    monkeypatch.chdir(tmp_path)
    options = {"dtype": "float32", "use_safetensors": True, "revision": "main", "variant": "fp16"}
    family = Family()
    family.kind = Pipeline
    with pytest.raises(
        ValueError,
        match=r"^teacher.path=someone/some-model: cannot be fetched \(no such model\); check",
    ):
        read_pipeline(family, "someone/some-model", without=("text_encoder_3",), **options)
    expected = {
        "use_safetensors": True,
        "revision": "main",
        "variant": "fp16",
        "text_encoder_3": None,
    }
    assert asked == [("someone/some-model", expected)]
    for path in ("./someone/some-model", "someone", "a/b/c", "/some-model", "~/some-model"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            read_pipeline(family, path, **options)
    assert len(asked) == 1
