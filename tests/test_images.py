"""ADD's eyes and what its heads are told: taps as independent hooks see them, augmentation pixel by
pixel.
"""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

import tiny
from distill.config.compose import shipped
from distill.core.types import Batch, Cond
from distill.discriminators.images import ImageFeatures, diff_augment
from distill.discriminators.projection import OpenClipText, Projection


def pictures(n=3, side=tiny.SIDE, seed=0):
    return torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_maps_are_patches_plus_class_token_after_the_blocks():
    eyes, x, seen = tiny.eyes(), pictures(), {}
    assert eyes.taps == [
        -1,
        1,
        2,
        3,
        5,
    ]  # six blocks: the embedding, and about a quarter, half, three quarters, all
    layers = [eyes.model.embeddings, *eyes.model.encoder.layer]
    handles = [
        m.register_forward_hook(lambda _m, _i, out, k=k: seen.update({k: out}))
        for k, m in enumerate(layers)
    ]
    eyes.model(pixel_values=x)  # mean and deviation of a half: what it reads is x itself
    for handle in handles:
        handle.remove()
    maps = eyes(x, None, None)
    assert [m.shape for m in maps] == [(3, width, 64) for width in eyes.channels.values()]
    for k, found in zip(eyes.taps, maps, strict=True):
        tokens = seen[k + 1][0] if isinstance(seen[k + 1], tuple) else seen[k + 1]
        torch.testing.assert_close(
            found, (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2), rtol=0, atol=1e-5
        )


def test_gradient_reaches_the_pixels_and_no_weight():
    eyes, x = tiny.eyes().train(), pictures().requires_grad_()
    assert not any(m.training for m in eyes.model.modules())
    sum(m.square().mean() for m in eyes(x, None, None)).backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in eyes.parameters())
    assert not eyes.describe(x).requires_grad


def test_pictures_are_resized_and_normalised():
    eyes = ImageFeatures(str(tiny.vit()), size=32)
    found = eyes.prepare(pictures(side=64))
    expected = torch.nn.functional.interpolate(
        (pictures(side=64) + 1) / 2, size=32, mode="bilinear", antialias=True
    )
    expected = (expected - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    torch.testing.assert_close(found, expected)
    assert eyes(pictures(), None, None)[0].shape == (3, 32, 16)


def test_a_crop_is_a_square_of_the_picture_for_the_whole_batch():
    eyes, x = (
        ImageFeatures(str(tiny.vit()), size=32, mean=[0] * 3, std=[1] * 3, crop=0.5),
        pictures(2),
    )
    windows = (
        x.unfold(2, 32, 1).unfold(3, 32, 1).permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
    )  # every square there is
    cropped = 0
    for seed in range(40):
        found = eyes.prepare(x, torch.Generator().manual_seed(seed)) * 2 - 1
        cropped += bool((windows - found).abs().amax((1, 2, 3, 4)).min() < 1e-5)
    assert 10 < cropped < 30
    assert torch.equal(
        eyes.prepare(x), eyes.prepare(x)
    )  # without a generator, as for a description: never


def test_augmentation_pixel_by_pixel():
    x, side = pictures(4, 20), 20
    found = diff_augment(x, torch.Generator().manual_seed(3))
    draw = torch.rand(7, 4, generator=torch.Generator().manual_seed(3))
    moved = 0
    for n in range(4):
        brightness, saturation, contrast, dy, dx, top, left = draw[:, n].tolist()
        picture = x[n] + brightness - 0.5
        picture = picture.mean(0) + (picture - picture.mean(0)) * 2 * saturation
        picture = picture.mean() + (picture - picture.mean()) * (contrast + 0.5)
        dy, dx = round((2 * dy - 1) * side / 8), round((2 * dx - 1) * side / 8)
        moved += abs(dy) + abs(dx)
        for i in range(side):
            for j in range(side):
                inside = 0 <= i + dy < side and 0 <= j + dx < side
                hole = abs(i - top * side) < side / 10 and abs(j - left * side) < side / 10
                expected = picture[:, i + dy, j + dx] if inside and not hole else torch.zeros(3)
                torch.testing.assert_close(found[n, :, i, j], expected, rtol=0, atol=1e-5)
    assert moved > 0
    twice = x.requires_grad_()
    diff_augment(twice, torch.Generator().manual_seed(3)).sum().backward()
    assert (twice.grad.abs().amax((1, 2, 3)) > 0).all()


def test_augmented_eyes_draw_from_their_generator_alone():
    eyes, x = tiny.eyes(augment=True), pictures()
    first, again, other = (
        eyes(x, None, None, torch.Generator().manual_seed(k))[0] for k in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_random_weights_are_those_of_their_seed_in_the_same_shape():
    trained, x = tiny.eyes(), pictures()
    before = torch.random.get_rng_state()
    first, again, other = (tiny.eyes(random_weights=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.channels == trained.channels
    maps = [eyes(x, None, None)[-1] for eyes in (first, again, other, trained)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2], atol=1e-2)
    assert not torch.allclose(maps[0], maps[3], atol=1e-2)
    assert all(p.grad is None and not p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("name", ["vit_labels", "vit", "clip_vision"])
def test_networks_of_shapes_serve_as_features(name):
    """Heads read each depth once, also of the CLIP-type encoder with three blocks."""
    eyes = ImageFeatures(shipped(f"shapes:{name}"), size=64, mean=[0.5] * 3, std=[0.5] * 3)
    assert eyes.taps == ([-1, 0, 1, 2] if name == "clip_vision" else [-1, 0, 1, 2, 3])
    x = pictures(2, 64).requires_grad_()
    maps = eyes(x, None, None)
    assert [m.shape for m in maps] == [(2, 128, 64)] * len(eyes.taps)
    maps[-1].square().mean().backward()
    assert x.grad.abs().amax((1, 2, 3)).min() > 0
    assert eyes.describe(x).shape == (2, 128)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "patch_size": 8,
}


@pytest.mark.parametrize("family", ["dino", "clip"])
def test_other_eyes_of_table_1a(family, tmp_path):
    """DINO (a plain ViT) and CLIP, at a size that is not their own."""
    if family == "dino":
        model = ViTModel(ViTConfig(**SMALL, image_size=32))
    else:
        text = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 16,
        }
        model = CLIPModel(
            CLIPConfig(
                text_config=text, vision_config={**SMALL, "image_size": 32}, projection_dim=16
            )
        )
    model.save_pretrained(tmp_path / family)
    for size in (32, 64):
        eyes = ImageFeatures(str(tmp_path / family), size=size)
        assert eyes.taps == [-1, 0, 1, 2, 3]
        x = pictures(2, 48).requires_grad_()
        maps = eyes(x, None, None)
        assert all(m.shape == (2, 32, (size // 8) ** 2) for m in maps)
        sum(m.square().mean() for m in maps).backward()
        assert x.grad.abs().max() > 0
        assert eyes.describe(x).shape == (2, eyes.width)


def test_taps_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"features.taps=\[0, 6\]: this network has blocks 0 to 5"):
        tiny.eyes(taps=[0, 6])


# -- what the heads are told -----------------------------------------------------------------------


class NoPool:
    def embed(self, captions):
        return Cond(torch.zeros(len(captions), 1, 1))


def batch(teacher):
    captions = tuple(tiny.CAPTIONS[:3])
    return Batch(x0=torch.zeros(3, 4, 16, 16), captions=captions, cond=teacher.embed(captions))


def test_the_real_image_is_told_only_where_the_student_saw_of_it(teachers):
    teacher, eyes = teachers("mmdit"), tiny.eyes()
    told = Projection(teacher, eyes)(batch(teacher), pictures(), torch.tensor([True, False, False]))
    assert not told.extra[0].any()
    torch.testing.assert_close(
        told.extra[1:], eyes.model(pictures()[1:]).last_hidden_state[:, 0], rtol=0, atol=1e-5
    )
    pooled = batch(teacher).cond.pooled
    torch.testing.assert_close(told.pooled, pooled / pooled.norm(dim=1, keepdim=True))


def test_a_caption_s_embedding_is_of_length_one_unless_told_otherwise(teachers):
    """As StyleGAN-T has it."""
    teacher, s = teachers("mmdit"), torch.zeros(3, dtype=torch.bool)
    lengths = Projection(teacher, tiny.eyes())(batch(teacher), pictures(), s).pooled.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(3))
    raw = Projection(teacher, tiny.eyes(), normalize_text=False)(batch(teacher), pictures(), s)
    assert torch.equal(raw.pooled, batch(teacher).cond.pooled)


@pytest.mark.parametrize(("text", "image"), [(None, None), ("teacher", None), (None, "features")])
def test_what_is_left_out_is_not_told(text, image, teachers):
    teacher, eyes = teachers("mmdit"), tiny.eyes()
    condition = Projection(teacher, eyes, text=text, image=image)
    told = condition(batch(teacher), pictures(), torch.zeros(3, dtype=torch.bool))
    for given, value, width in (
        (text, told.pooled, condition.pooled_width),
        (image, told.extra, condition.image_width),
    ):
        assert (value is None) == (given is None)
        assert width == (0 if given is None else value.shape[1])


def test_words_that_mean_nothing_are_refused(teachers):
    with pytest.raises(
        ValueError, match="condition.image=dino: must be features, null or a network"
    ):
        Projection(teachers("mmdit"), tiny.eyes(), image="dino")
    with pytest.raises(ValueError, match="no pooled embedding; use null"):
        Projection(NoPool(), tiny.eyes(), text="teacher")


def test_captions_as_open_clip_embeds_them(tmp_path):
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 16,
            "layers": 1,
            "width": 32,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "layers": 1,
            "width": 32,
            "heads": 2,
        },
    }
    (tmp_path / "tiny-text.json").write_text(json.dumps(config), encoding="utf-8")
    open_clip.factory.add_model_config(tmp_path / "tiny-text.json")
    torch.manual_seed(0)
    reference = open_clip.create_model("tiny-text")
    torch.save(reference.state_dict(), tmp_path / "weights.pt")
    text = OpenClipText("tiny-text", str(tmp_path / "weights.pt")).train()
    assert text.width == 24
    assert not any(m.training for m in text.model.modules())
    captions = ["a red square", "two circles"]
    expected = reference.eval().encode_text(open_clip.get_tokenizer("tiny-text")(captions))
    torch.testing.assert_close(text(captions), expected.detach(), rtol=0, atol=1e-5)
