"""Pretraining in miniature: every stage, its resumption, and what each part promises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from torch import nn
from transformers import Dinov2Model

from distill.config.compose import shipped
from distill.data.datasets import LatentShards
from distill.pretrain import pretrain
from distill.worlds.shapes.pretraining import inpainting, labelled_vit, text, vae, vit
from distill.worlds.shapes.pretraining.asked import ON_REQUEST, check_data, chosen, teaching_stage
from distill.worlds.shapes.pretraining.assemble import silent_t5
from distill.worlds.shapes.pretraining.diffusion import Captions, build_mmdit, build_unet
from distill.worlds.shapes.pretraining.fit import Fit
from distill.worlds.shapes.pretraining.stages import STAGES
from distill.worlds.shapes.pretraining.work import Work
from distill.worlds.shapes.world import Placed, Scene, draw_prompt

CONF = str(Path(__file__).parents[1] / "conf")
SIZES = ("mmdit", "mmdit_small", "mmdit_tiny", "mmdit_large")
TRAINED = ("clip", "vae", "reader", "vit", "vit_labels", *SIZES, "unet", "unet_inpaint")
TINY = [
    "data.count=256", "reader_scenes.shared=8", "reader_scenes.fresh=8", "labelled_scenes=8",
    "shards.count=6",
    "shards.steps=2",
    "scoring.prompts=4", "scoring.steps=2", "scoring.guidance=[3.0]",
    *(f"{stage}.{what}" for stage in TRAINED for what in ("steps=2", "batch_size=4")),
]  # fmt: skip


def compose_with(*overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=CONF, version_base="1.3"):
        return compose("pretrain", overrides=[*TINY, *overrides])


def run(*overrides: str) -> Path:
    return pretrain(compose_with(*overrides))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return run(f"out={tmp_path_factory.mktemp('made')}")


@pytest.mark.slow
def test_every_stage_leaves_its_models_and_a_card(made):
    scores = json.loads((made.parent / "pretraining.json").read_text(encoding="utf-8"))["stages"]
    assert list(scores) == [name for name in STAGES if name not in ON_REQUEST]
    assert all(values["finished"] and values["seconds"] >= 0 for values in scores.values())
    assert set(scores["mmdit"]["prompt_accuracy"]) == {"2 steps, guidance 3", "1 steps, guidance 4"}
    assert all(
        set(v) == {"training", "held_out"} for v in scores["unet"]["prompt_accuracy"].values()
    )
    assert {p.name for p in made.iterdir()} == {
        "mmdit", "mmdit_small", "unet", "latents", "vit", "vit_labels", "clip_vision", "reader",
        "curves", "README.md",
    }  # fmt: skip
    assert (
        (made / "curves" / "vae.csv")
        .read_text(encoding="utf-8")
        .startswith("step,seconds,l1,l2,kl\n0,")
    )
    card = (made / "README.md").read_text(encoding="utf-8")
    assert "python -m distill.pretrain" in card
    assert "pictures 256" in card
    assert "| vae |" in card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmdit", "mmdit_small", "unet"])
def test_a_pipeline_opens_in_diffusers_and_draws(made, name):
    from diffusers import AutoPipelineForText2Image

    pipeline = AutoPipelineForText2Image.from_pretrained(made / name)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red star", num_inference_steps=2, guidance_scale=2.0).images[0]
    assert picture.size == (64, 64)


@pytest.mark.slow
def test_feature_networks_and_latents_open(made):
    from transformers import CLIPVisionModelWithProjection

    x = torch.rand(2, 3, 64, 64) * 2 - 1
    clip = CLIPVisionModelWithProjection.from_pretrained(made / "clip_vision")
    assert clip.dtype == torch.float32
    for name in ("vit", "vit_labels"):
        net = Dinov2Model.from_pretrained(made / name)
        assert net.dtype == torch.float32
        assert net(x).last_hidden_state.shape == (2, 65, 128)
    assert clip(x).image_embeds.shape == (2, 128)
    latents = LatentShards(str(made / "latents"))
    assert len(latents) == 6
    assert latents.shape == (4, 16, 16)
    assert latents[3]["caption"] == draw_prompt(np.random.default_rng([3, 3])).caption


@pytest.mark.slow
def test_a_second_run_skips_what_is_finished(made, capsys):
    files = {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file()}
    run(f"out={made.parent}")
    assert capsys.readouterr().out.count("done before") == len(STAGES) - len(ON_REQUEST)
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*") if p.is_file()} == files


@pytest.mark.slow
def test_a_stage_begun_with_other_settings_is_refused(made):
    with pytest.raises(ValueError, match=r"stage vae .* vae\.lr=0\.1 \(was 0\.002\)"):
        run(f"out={made.parent}", "stages=[vae]", "vae.lr=0.1")


@pytest.mark.slow
def test_ones_own_pictures_need_no_shapes(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(256):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        (tmp_path / f"{i}.txt").write_text(f"noise number {i}", encoding="utf-8")
    models = run(
        f"out={tmp_path / 'out'}",
        f"data.path={tmp_path}",
        "data.size=40",
        "stages=[data,clip,vae,latents,reader,vit_labels,mmdit,shards]",
    )
    assert not (models / "reader").exists()
    assert not (models / "vit_labels").exists()
    numbers = [
        int(caption.split()[-1])
        for caption in json.loads((tmp_path / "out" / "captions.json").read_text(encoding="utf-8"))
    ]
    assert sorted(numbers) == list(range(256))
    assert max(numbers[-20:]) - min(numbers[-20:]) > 100, (
        "what is held out is not drawn from everywhere"
    )
    assert LatentShards(str(models / "latents")).shape == (4, 10, 10)


def test_a_stage_without_what_it_needs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="latents needs data, vae first"):
        run(f"out={tmp_path}", "stages=[latents]")


def test_a_taught_stage_needs_the_stage_or_the_folder_that_teaches_it(tmp_path):
    settings = compose_with("stages=[mmdit_small]")
    assert teaching_stage(settings, "mmdit_small") == ("mmdit",)
    with pytest.raises(ValueError, match="mmdit_small needs data, clip, vae, latents, mmdit first"):
        run(f"out={tmp_path}", "stages=[mmdit_small]")
    named = ("stages=[mmdit_small]", "networks.mmdit_small.taught_by=shapes:mmdit")
    assert teaching_stage(compose_with(*named), "mmdit_small") == ()
    with pytest.raises(ValueError, match="mmdit_small needs data, clip, vae, latents first"):
        run(f"out={tmp_path}", *named)
    with pytest.raises(FileNotFoundError, match="networks.mmdit_small.taught_by=nowhere"):
        run(f"out={tmp_path}", "stages=[mmdit_small]", "networks.mmdit_small.taught_by=nowhere")


def test_sizes_on_request_are_no_part_of_all_stages():
    assert chosen(None) == [name for name in STAGES if name not in ON_REQUEST]
    assert chosen(["mmdit_large", "data"]) == ["data", "mmdit_large"]


def test_mmdits_have_the_sizes_that_are_documented():
    networks, millions = compose_with().networks, []
    for name in ("mmdit_tiny", "mmdit_small", "mmdit", "mmdit_large"):
        shape = {key: networks[name][key] for key in ("layers", "heads", "head_dim")}
        net = build_mmdit(16, 128, **shape)
        millions.append(round(sum(p.numel() for p in net.parameters()) / 1e6, 1))
    assert millions == [1.4, 2.2, 3.7, 7.8]


@pytest.mark.slow
def test_other_sizes_go_on_from_the_parts_of_a_finished_folder(made):
    """`made` has the parts and `mmdit_small`, which teaches `mmdit_tiny`."""
    out = shutil.copytree(made.parent, made.parent.with_name("sizes"))
    models = run(f"out={out}", "stages=[mmdit_tiny,mmdit_large]")
    for name, blocks in (("mmdit_tiny", 2), ("mmdit_large", 6)):
        config = json.loads(
            (models / name / "transformer" / "config.json").read_text(encoding="utf-8")
        )
        assert config["num_layers"] == blocks
        assert (models / "curves" / f"{name}.csv").is_file()


def test_an_inpainting_unet_starts_as_the_one_of_whole_pictures():
    torch.manual_seed(0)
    source = build_unet(16, 32).eval()
    net = inpainting.widened(source, 5).eval()
    x, beside, tokens = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16, 16), torch.randn(2, 7, 32)
    t = torch.tensor([10, 900])
    with torch.no_grad():
        expected = source(x, t, encoder_hidden_states=tokens).sample
        found = net(torch.cat([x, beside], 1), t, encoder_hidden_states=tokens).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (net.config.in_channels, net.config.out_channels) == (9, 4)


@pytest.mark.slow
def test_an_inpainting_unet_goes_on_from_the_parts_of_a_finished_folder(made):
    from diffusers import AutoPipelineForInpainting

    out = shutil.copytree(made.parent, made.parent.with_name("inpainting"))
    models = run(f"out={out}", "stages=[unet_inpaint]")
    pipeline = AutoPipelineForInpainting.from_pretrained(models / "unet_inpaint")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionInpaintPipeline"
    assert pipeline.unet.conv_in.weight[:, 4:].abs().max() > 0
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)
    how = {"num_inference_steps": 2, "height": 64, "width": 64}
    found = pipeline("a red star", image=picture, mask_image=mask, **how).images[0]
    assert found.size == (64, 64)
    scores = json.loads((out / "pretraining.json").read_text(encoding="utf-8"))["stages"]
    assert set(scores["unet_inpaint"]["prompt_accuracy"]) == {
        "2 steps, guidance 3", "1 steps, guidance 4",
    }  # fmt: skip


def test_an_unknown_stage_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"no stage 'mmditt' \(did you mean mmdit"):
        run(f"out={tmp_path}", "stages=[mmditt]")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"size": 256}, "32 to 128"),
        ({"size": 44}, "multiples of 8"),
        ({"path": None, "size": 32}, "shapes have 64 pixels"),
        ({"count": 100}, "at least 256"),
    ],
)
def test_data_that_cannot_work_are_refused(wrong, expected):
    values: dict[str, Any] = {"path": "x", "size": 64, "count": 1000}
    with pytest.raises(ValueError, match=expected):
        check_data(**values | wrong)


def test_notes_add_up(tmp_path):
    first, second = (Work({"out": str(tmp_path), "data": {"path": None}}) for _ in range(2))
    first.note("vae", "a command", psnr_db=30.0)
    second.note("vae", "a command", finished=True)
    first.note("clip", seconds=1)
    assert second.stage("vae") == {"psnr_db": 30.0, "finished": True}
    assert second.known()["stages"]["clip"] == {"seconds": 1}
    assert second.known()["commands"] == ["a command"]


class Killed(Exception):
    pass


def little(out: Path, stop: int | None = None, **kind: Any) -> nn.Module:
    """A net trained on a moving goal; with `stop`, killed at the beginning of that step."""
    torch.manual_seed(0)
    net, data = (
        nn.ModuleDict({"blocks": nn.Linear(6, 6), "last": nn.Linear(6, 2)}),
        torch.randn(50, 6),
    )

    def objective(
        step: int, index: torch.Tensor, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        if step == stop:
            raise Killed
        x = data[index] + 0.1 * torch.randn(8, 6, generator=generator)
        return {"mse": (net["last"](net["blocks"](x).tanh()) - x[:, :2]).square().mean()}

    fit = Fit(
        name="little",
        out=out,
        seed=3,
        steps=12,
        batch_size=8,
        lr=1e-2,
        warmup=3,
        save_every=4,
        **kind,
    )
    return fit(net, objective, samples=len(data))


@pytest.mark.parametrize("kind", [{}, {"ema": 0.9}, {"muon_lr": 1e-2}, {"precision": "32-true"}])
def test_a_killed_stage_ends_as_an_uninterrupted_one(tmp_path, kind):
    whole = little(tmp_path / "whole", **kind)
    for stop in (2, 6, 11):  # before the first saving, between two, after the last
        with pytest.raises(Killed):
            little(tmp_path / "killed", stop, **kind)
    resumed, again = (little(tmp_path / "killed", **kind) for _ in range(2))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
        assert torch.equal(value, again.state_dict()[key])


@pytest.fixture(scope="module")
def tokenizer():
    captions = [draw_prompt(np.random.default_rng([0, i])).caption for i in range(500)]
    return text.train_tokenizer(captions, length=25)


@pytest.mark.parametrize(
    "caption", ["a zebra in Zürich", "日本 ~|\t§", "x" * 500, "a red " * 40, "", "🦓"]
)
def test_the_tokenizer_has_a_word_for_everything(tokenizer, caption):
    (ids,) = text.tokenize(tokenizer, [caption]).tolist()
    assert len(ids) == 25
    assert max(ids) < len(tokenizer)
    end = ids.index(
        tokenizer.eos_token_id
    )  # the end is met once, after all that was said: nothing unknown maps to it
    assert ids[0] == tokenizer.bos_token_id
    assert set(ids[end:]) <= {tokenizer.eos_token_id, tokenizer.pad_token_id}
    pieces = tokenizer.tokenize(caption)
    assert end == min(24, len(pieces) + 1)
    assert not {tokenizer.unk_token, tokenizer.eos_token} & set(pieces)
    if caption and len(pieces) < 24:
        assert tokenizer.decode(ids, skip_special_tokens=True).split() == caption.lower().split()


def test_captions_of_shapes_fit(tokenizer):
    captions = [draw_prompt(np.random.default_rng([1, i])).caption for i in range(500)]
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= 25
    assert len({tuple(ids) for ids in text.tokenize(tokenizer, captions).tolist()}) == len(
        set(captions)
    )


def test_standardising_leaves_pictures_alone():
    torch.manual_seed(0)
    model = vae.build(32).eval()
    with torch.no_grad():
        model.quant_conv.weight[:4] *= torch.tensor([0.2, 1.0, 3.0, 9.0]).view(4, 1, 1, 1)
        model.quant_conv.bias[:4] += torch.tensor([1.0, -2.0, 0.0, 5.0])
        pictures = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8)
        x = pictures.float() / 127.5 - 1
        before = model.encode(x).latent_dist
        drawn = model.decode(before.sample(generator=torch.Generator().manual_seed(0))).sample
        vae.standardise(model, vae.encode(model, pictures))
        after = model.encode(x).latent_dist
        redrawn = model.decode(after.sample(generator=torch.Generator().manual_seed(0))).sample
    latents = vae.encode(model, pictures)
    assert not torch.allclose(before.mean, after.mean, atol=0.1)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.ones(4), atol=1e-4)
    assert torch.allclose(drawn, redrawn, atol=1e-4)


def test_the_silent_encoder_says_exactly_nothing():
    encoder, tokenizer = silent_t5(32)
    ids = tokenizer(
        ["a red star", ""], padding="max_length", max_length=8, return_tensors="pt"
    ).input_ids
    output = encoder(ids).last_hidden_state
    assert output.shape == (2, 8, 32)
    assert not output.any()


def test_a_probe_finds_what_a_line_divides():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    x = torch.randn(90, 8, generator=generator) + 6 * F.one_hot(labels, 8)
    assert vit.probe_accuracy(x, labels, known=45) == 1
    assert vit.probe_accuracy(x, torch.cat([labels[:45], (labels[45:] + 1) % 3]), known=45) == 0
    noise = torch.randn(3000, 8, generator=generator)
    assert 0.28 < vit.probe_accuracy(noise, torch.arange(3000) % 3, known=1500) < 0.39


def one_thing(**values: Any) -> Scene:
    placed = {"kind": "star", "colour": "red", "fill": "dotted", "size": "large", "x": 20.0}
    placed |= {"y": 44.0, "radius": 12.0, "angle": 0.0, "pattern_angle": 0.0, "phase": (0.0, 0.0)}
    thing = Placed(**placed | {"shade": (0.0, 0.0, 0.0)} | values)
    return Scene((thing,), None, "pink")


def test_patches_are_labelled_by_the_thing_that_covers_them():
    """A square from 9 to 31 across and 33 to 55 down, of patches of eight pixels."""
    square = one_thing(kind="square", radius=11 / 0.86)
    labels = {k: v.view(8, 8) for k, v in labelled_vit.label_patches([square]).items()}
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[4:7, 1:4] = True
    for name, word in (("kind", 1), ("colour", 0), ("fill", 2)):
        assert labels[name][inside].eq(word).all()
        assert labels[name][~inside].eq(-1).all()
    assert labels["background"].eq(3).all()
    small = labelled_vit.label_patches([one_thing(kind="square", radius=1.0)])
    assert (small["kind"] == -1).all()  # covers less than a quarter of any patch


def test_of_two_things_a_patch_shows_the_larger_part():
    """The third patch of a row, 16 to 24, has 4 columns of the red one and 3 of the blue one."""
    squares = [
        one_thing(kind="square", x=x, radius=8 / 0.86, colour=colour).things[0]
        for x, colour in ((12.0, "red"), (29.0, "blue"))
    ]
    (colours,) = labelled_vit.label_patches([Scene(tuple(squares), "horizontal", "white")])[
        "colour"
    ]
    assert colours.view(8, 8)[5].tolist() == [0, 0, 0, 2, 2, -1, -1, -1]


def test_a_picture_shows_the_words_of_its_patches():
    (shown,) = labelled_vit.present(labelled_vit.label_patches([one_thing()]))
    words = [word for words in labelled_vit.WORDS.values() for word in words]
    assert {w for w, p in zip(words, shown, strict=True) if p} == {"star", "red", "dotted", "pink"}


def test_losses_of_labels_by_hand():
    torch.manual_seed(0)
    net, scene = labelled_vit.Labelled().eval(), one_thing()
    truth, x = labelled_vit.label_patches([scene]), torch.rand(1, 3, 64, 64) * 2 - 1
    losses, tokens = net.losses(x, truth), net.vit(x).last_hidden_state[0]
    logits, start, expected = net.of_patch(tokens[1:]), 0, 0.0
    for name, words in labelled_vit.WORDS.items():
        own = logits[:, start : start + len(words)].log_softmax(1)
        known = [(i, k) for i, k in enumerate(truth[name][0].tolist()) if k >= 0]
        expected -= sum(own[i, k] for i, k in known) / len(known)
        start += len(words)
    torch.testing.assert_close(losses["patches"], expected)
    odds, shown = net.of_whole(tokens[0]).sigmoid(), labelled_vit.present(truth)[0]
    entropy = -(shown * odds.log() + (1 - shown) * (1 - odds).log()).mean()
    torch.testing.assert_close(losses["whole"], entropy)


def test_the_shipped_labelled_vit_knows_kinds_fills_and_colours():
    """On scenes that nothing was trained on; the ViT without labels has about .3 for kinds."""
    model = Dinov2Model.from_pretrained(shipped("shapes:vit_labels"))
    scores = labelled_vit.probe_patches(model.eval(), seed=77, count=300)
    assert set(scores) == {"kind", "colour", "fill"}
    assert min(scores.values()) >= 0.9


def test_masks_hide_a_tenth_to_four_fifths():
    share = vit.mask(200, torch.Generator().manual_seed(0)).float().mean(1)
    assert share.min() >= 0.1
    assert share.max() <= 0.8 + 1 / 64
    assert 0.4 < share.mean() < 0.5


@pytest.mark.parametrize("side", [32, 40, 64, 128])
def test_guesses_of_hidden_patches_by_hand(side):
    """Patch by patch, cut out of the picture; what is hidden is not seen."""
    torch.manual_seed(0)
    net = vit.Masked(side).eval()
    x, masked = torch.rand(2, 3, side, side) * 2 - 1, vit.mask(2, torch.Generator().manual_seed(1))
    losses = net.losses(x, masked)
    tokens, p = net.vit(x, bool_masked_pos=masked).last_hidden_state, side // 8
    off = [
        (
            net.of_patch(tokens[i, 1 + k]).view(3, p, p)
            - x[i, :, k // 8 * p : (k // 8 + 1) * p, k % 8 * p : (k % 8 + 1) * p]
        )
        for i, k in masked.nonzero().tolist()
    ]
    torch.testing.assert_close(losses["patches"], torch.stack(off).abs().mean())
    small = F.interpolate(x, scale_factor=0.25, mode="area")
    torch.testing.assert_close(
        losses["whole"], (net.of_whole(tokens[:, 0]).view_as(small) - small).abs().mean()
    )
    hidden = masked.view(2, 1, 8, 8).repeat_interleave(p, 2).repeat_interleave(p, 3)
    other = torch.where(hidden, torch.rand_like(x), x)
    assert torch.equal(net.vit(other, bool_masked_pos=masked).last_hidden_state, tokens)


def test_shared_captions_are_looked_up():
    tokens = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 3)  # row 0 is the empty caption
    captions = Captions(tokens, tokens[:, 0], torch.tensor([2, 0, 2, 1]))
    drawn, pooled = captions.draw(torch.tensor([0, 1, 2, 3] * 50), torch.Generator().manual_seed(0))
    expected = torch.tensor([3.0, 1.0, 3.0, 2.0] * 50)
    kept = drawn[:, 0, 0] != 0
    assert 0.8 < kept.float().mean() < 1
    assert torch.equal(drawn[kept, 1, 2], expected[kept])
    assert torch.equal(pooled[kept, 0], expected[kept])


def test_a_text_encoder_that_goes_on_keeps_its_tokenizer(tmp_path):
    """Trained again it may number its words otherwise, and the weights would be of other words."""
    captions = [draw_prompt(np.random.default_rng(i)).caption for i in range(256)]
    (tmp_path / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    asked = {"out": str(tmp_path), "text_length": 32, "data": {"path": None}}
    first, ids = text._tokenized(Work(asked))
    kept = sorted((p.name, p.read_bytes()) for p in (tmp_path / "train" / "tokenizer").iterdir())
    for _ in range(4):
        again, others = text._tokenized(Work(asked))
        assert again.get_vocab() == first.get_vocab()
        assert torch.equal(others, ids)
    found = sorted((p.name, p.read_bytes()) for p in (tmp_path / "train" / "tokenizer").iterdir())
    assert found == kept
