"""What one asks of a teacher besides its files: another autoencoder, layers of CLIP left out, a
negative prompt.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image, DDIMScheduler, StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image

import cards
import families
import tiny
from distill import students
from distill.config.fitting import check_data_fits
from distill.config.models import sampler_of, student_of
from distill.data.shard_job import of_teacher
from distill.exporting.card import write_card
from distill.sampling import Consistency, seeded, to_bytes
from distill.sampling.guided import guided
from distill.teachers.sana import Sana
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3
from distill.teachers.sdxl import SDXL

PROMPT, SEED = tiny.CAPTIONS[0], 5


@pytest.fixture
def own(pipelines, tmp_path):
    """An autoencoder of one's own, as repositories of one have it: with other files beside it."""
    vae = tiny.shake(SD(str(pipelines("unet"))).vae.float(), 9, std=0.02)
    vae.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "sdxl_vae.safetensors").write_bytes(b"the same once more")
    return vae, tmp_path / "own"


def made(teacher, folder):
    student = tiny.shake(students.full(teacher), 21, std=0.03).eval()
    scheduler = Consistency().scheduler(student, teacher)
    return student, students.save_pipeline(student, teacher, folder, scheduler)


# -- teacher.vae -----------------------------------------------------------------------------------


@pytest.mark.parametrize("deferred", [[], ["vae"]])
def test_an_autoencoder_of_one_s_own_is_used_and_goes_with_the_student(
    deferred, own, pipelines, tmp_path
):
    vae, folder = own
    teacher = SD(str(pipelines("unet")), vae=str(folder), deferred=deferred)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample
        assert torch.allclose(teacher.decode(latents), expected, atol=1e-5)
        plain = SD(str(pipelines("unet"))).decode(latents)
    assert not torch.allclose(plain, expected, atol=0.01)
    _, saved = made(teacher, tmp_path / "student")
    there = {p.name for p in (saved / "vae").iterdir()}
    assert there == {"config.json", "diffusion_pytorch_model.safetensors"}
    opened = AutoPipelineForText2Image.from_pretrained(saved, dtype=torch.float32)
    assert tiny.same(tiny.weights(opened.vae), tiny.weights(vae))


def test_a_pipeline_s_own_can_be_lent_and_one_of_the_hub_brings_no_more_than_itself(
    own, pipelines, monkeypatch
):
    lent = SD(str(pipelines("unet")), vae=str(pipelines("sdxl")))
    there = SDXL(str(pipelines("sdxl")))
    assert tiny.same(tiny.weights(lent.vae), tiny.weights(there.vae))
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(own[1])

    monkeypatch.setattr("distill.teachers.loading.autoencoder.snapshot_download", download)
    assert SD(str(pipelines("unet")), vae="someone/vae").own_parts["vae"] == own[1]
    assert "config.json" in asked["someone/vae"]
    assert not any(pattern.startswith("*") for pattern in asked["someone/vae"])


def test_an_autoencoder_that_does_not_fit_is_refused(own, pipelines, command, tmp_path):
    file = own[1] / "config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    for change, what in (
        (
            {"_class_name": "AutoencoderDC"},
            "is a AutoencoderDC, and a StableDiffusionPipeline wants",
        ),
        ({"latent_channels": 16}, "its latents have 16 channels and this teacher's have 4"),
    ):
        file.write_text(json.dumps(said | change), encoding="utf-8")
        with pytest.raises(ValueError, match=r"teacher\.vae=.*" + what):
            SD(str(pipelines("unet")), vae=str(own[1]), deferred=["vae"])
    where = [f"teacher.path={pipelines('unet')}", "teacher=sd15", f"data.path={tmp_path}"]
    code, _, err = command("run", *where, f"teacher.vae={tmp_path / 'nothing'}")
    assert code == 1
    assert err.startswith(f"distill: teacher.vae={tmp_path / 'nothing'}: no such folder; give a ")


def test_data_made_otherwise_is_refused(teachers):
    """Latents of another autoencoder and embeddings of another layer are of the right shape, and
    wrong.
    """

    def teacher(**more):
        node = {"_target_": "distill.teachers.sd.SD", "path": "x", **more}
        return OmegaConf.create({"teacher": node, "data": {"path": "d", "size": 64}})

    null = {"tokens": torch.zeros(1, 1, 1)}
    width = teachers("unet").network.model.config.cross_attention_dim
    null["tokens"] = torch.zeros(1, 1, width)
    cases = ({"vae": "a"}, {"clip_skip": 1})
    for more in cases:
        for mine, theirs in ((more, {}), ({}, more)):
            about = of_teacher(teacher(**theirs))
            data = type("Data", (), {"null": null, "buckets": [], "made": about})()
            check_data_fits(teacher(**theirs), data, teachers("unet"))
            with pytest.raises(ValueError, match=r"were made with .* give both the same"):
                check_data_fits(teacher(**mine), data, teachers("unet"))


# -- clip_skip -------------------------------------------------------------------------------------


def test_clip_skip_is_a_clip_with_fewer_layers(pipelines, tmp_path):
    """By hand: with transformers 5.6 diffusers' own pipeline of SD has no final norm to apply, as
    the card says.
    """
    teacher, plain = (SD(str(pipelines("unet")), clip_skip=n) for n in (1, None))
    found = teacher.embed([PROMPT]).tokens
    shallow = plain.pipeline.text_encoder
    del getattr(shallow, "text_model", shallow).encoder.layers[-1]
    expected = plain.embed([PROMPT]).tokens
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, SD(str(pipelines("unet"))).embed([PROMPT]).tokens, atol=0.01)
    _, folder = made(teacher, tmp_path / "student")
    write_card(folder, tmp_path)
    assert "    clip_skip=1,\n" in cards.code(folder)
    assert torch.equal(student_of(str(folder)).embed([PROMPT]).tokens, found)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if hasattr(pipeline.text_encoder, "text_model"):
        return
    with pytest.raises(AttributeError, match="text_model"):
        pipeline(PROMPT, num_inference_steps=1, clip_skip=1)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "With transformers 5.6 and later" in card


def test_clip_skip_is_diffusers_and_a_student_keeps_it(pipelines, tmp_path):
    kind, adapter = "sdxl", SDXL
    teacher, plain = adapter(str(pipelines(kind)), clip_skip=1), adapter(str(pipelines(kind)))
    student, folder = made(teacher, tmp_path / "student")
    write_card(folder, tmp_path)
    assert "    clip_skip=1,\n" in cards.code(folder)
    assert student_of(str(folder)).clip_skip == 1
    found = cards.drawn(folder, PROMPT, steps=2, seed=SEED)
    with torch.no_grad():
        how = {"shape": teacher.latent_shape, "steps": 2}
        ours, other = (
            to_bytes(
                teacher.decode(Consistency()(student, t.embed([PROMPT]), seeded([SEED]), **how))
            )
            for t in (teacher, plain)
        )
    assert (found.permute(2, 0, 1) * 255 - ours[0]).abs().max() <= 1
    assert not torch.equal(ours, other)


@pytest.mark.parametrize("skip", [0, -1, 99])
def test_more_layers_than_there_are_cannot_be_left_out(skip, pipelines):
    with pytest.raises(ValueError, match=rf"teacher\.clip_skip={skip}: must be null, or from 1 to"):
        SD(str(pipelines("unet")), clip_skip=skip)


def test_a_part_that_is_not_there_cannot_be_left_out(command, pipelines, monkeypatch):
    """Said before any part is read."""
    monkeypatch.setattr("distill.teachers.pipeline.read_pipeline", None)
    data = ["data=shapes", f"teacher.path={pipelines('mmdit')}"]
    code, _, said = command("run", *data, "+teacher.without=[text_encoder_3,tokenizer3]")
    asked = "teacher.without=[text_encoder_3,tokenizer3]"
    assert said.splitlines()[-1].startswith(
        f"distill: {asked}: a StableDiffusion3Pipeline has no tokenizer3; must be a list of "
    )
    assert said.endswith("text_encoder_3, tokenizer, tokenizer_2, tokenizer_3, transformer, vae\n")
    assert code == 1


# -- sample ----------------------------------------------------------------------------------------


def pixels(path):
    return torch.tensor(list(Image.open(path).tobytes())).view(tiny.SIDE, tiny.SIDE, 3)


def test_a_negative_prompt_is_diffusers(pipelines, command, tmp_path):
    folder, negative = pipelines("unet"), tiny.CAPTIONS[3]
    asked = [f"run={folder}", f"prompt='{PROMPT}'", "steps=3", "guidance=4", f"seed={SEED}"]
    asked += ["precision=32-true"]
    assert command("sample", *asked, f"negative='{negative}'", "out=with")[0] == 0
    assert command("sample", *asked, "out=without")[0] == 0
    ((path,), (without,)) = ((tmp_path / name).iterdir() for name in ("with", "without"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    picture = pipeline(
        PROMPT,
        negative_prompt=negative,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(SEED),
    ).images[0]
    picture.save(tmp_path / "theirs.png")
    assert (pixels(path) - pixels(tmp_path / "theirs.png")).abs().max() <= 1
    assert (pixels(path) - pixels(without)).abs().max() > 8
    assert Image.open(path).text["negative"] == negative
    assert "negative" not in Image.open(without).text


def test_a_negative_prompt_of_sana_stands_without_its_instruction(tmp_path):
    teacher = Sana(str(families.write("sana", tmp_path / "sana")))
    how = {"device": torch.device("cpu"), "max_sequence_length": 300}
    _, _, tokens, mask = teacher.pipeline.encode_prompt(
        ["x"], negative_prompt="a drawing", do_classifier_free_guidance=True, **how
    )
    found = teacher.embed_negative("a drawing")
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.mask, mask)


def test_a_negative_prompt_without_guidance_is_refused(command):
    code, _, err = command("sample", "run=shapes:mmdit", "prompt=x", "negative=y")
    assert code == 1
    assert err.endswith("negative=y: has no effect without guidance; add guidance=\n")


def test_slicing_and_tiling_are_diffusers(pipelines):
    """Slices are the same pictures; tiles of a small one are itself, and of a large one nearly
    so.
    """
    teacher = SD3(str(pipelines("mmdit")))
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = teacher.decode(latents)
        teacher.save_memory(slicing=True, tiling=True)
        assert teacher.vae.use_slicing
        assert teacher.vae.use_tiling
        assert torch.allclose(teacher.decode(latents), plain, atol=1e-5)


def test_guided_by_a_negative_prompt_goes_elsewhere(teachers):
    teacher = teachers("mmdit")
    cond, how = (
        teacher.embed([PROMPT]),
        {"shape": teacher.latent_shape, "steps": 2, "guidance": 4.0},
    )
    from dataclasses import replace

    away = replace(cond, null=teacher.embed_negative(PROMPT))
    alone = guided(teacher, cond, seeded([SEED]), **{**how, "guidance": 1.0})
    assert torch.allclose(guided(teacher, away, seeded([SEED]), **how), alone, atol=1e-4)


def test_shards_of_before_are_taken_as_they_are(teachers):
    """Manifests that say nothing of options were made without any."""
    teacher, before = teachers("unet"), {"teacher": "x", "without": []}
    null = {"tokens": torch.zeros(1, 1, teacher.network.caption_width)}
    data = type("Data", (), {"null": null, "buckets": [], "made": before})()
    sd = {"_target_": "distill.teachers.sd.SD", "path": "x"}
    cfg = OmegaConf.create({"teacher": sd, "data": {"path": "d", "size": 64}})
    check_data_fits(cfg, data, teacher)
    data.made = {**before, "told": {"clip_skip": 1}}
    with pytest.raises(ValueError, match=r"made with teacher options .*clip_skip"):
        check_data_fits(cfg, data, teacher)


def test_no_file_but_the_index_tells_of_options(pipelines, tmp_path):
    """A stranger's index can give no option that its family does not have, and nothing that is not
    one.
    """
    folder = Path(shutil.copytree(pipelines("unet"), tmp_path / "student"))
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    options = {"path": "/etc", "use_safetensors": False, "weights": "/x", "vae": "/y"}
    options |= {"clip_skip": "all", "size": [3]}
    wrong = {"options": options, "sampler": {"name": "Consistency", "levels": "abc"}}
    file.write_text(json.dumps(index | {"_distill": wrong}), encoding="utf-8")
    model = student_of(str(folder))
    assert (model.own_parts, model.clip_skip) == ({}, None)
    assert sampler_of(str(folder), model) == Consistency()
    file.write_text(json.dumps(index | {"_distill": 3}), encoding="utf-8")
    assert student_of(str(folder)).latent_shape == model.latent_shape
