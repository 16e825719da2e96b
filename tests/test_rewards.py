"""ImageReward and LAION's aesthetic predictor, in the files of their authors, against the same
arithmetic written with torch's functions alone.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import eyes
from distill.evaluation import rewards

SAID = ["a red star", "two blue circles on the white and a red star of " * 8]
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 70 + i, 3), np.uint8))
    for i in range(2)
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    return {
        "reward": eyes.write_image_reward(folder / "reward"),
        "bert": eyes.write_bert(folder / "bert"),
        "clip": eyes.write_clip(folder / "clip"),
        "aesthetic": eyes.write_aesthetic(folder / "sac+logos+ava1-l14-linearMSE.pth"),
    }


def attention(q, k, v, heads, mask=None):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class ByHand:
    """ImageReward from its file; a layer is named by its tensors."""

    def __init__(self, folder):
        self.tensors = torch.load(folder / "ImageReward.pt", weights_only=True)

    def linear(self, name, x):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def norm(self, name, x, eps):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def vision(self, pixels):
        name = "blip.visual_encoder"
        weight, bias = (self.tensors[f"{name}.patch_embed.proj.{x}"] for x in ("weight", "bias"))
        x = F.conv2d(pixels, weight, bias, stride=16).flatten(2).transpose(1, 2)
        x = torch.cat([self.tensors[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1)
        x = x + self.tensors[f"{name}.pos_embed"]
        for i in range(2):
            block = f"{name}.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            x = x + self.linear(f"{block}.attn.proj", attention(*qkv.chunk(3, -1), heads=2))
            hidden = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", F.gelu(hidden))
        return self.norm(f"{name}.norm", x, 1e-6)

    def attended(self, name, x, seen, mask=None):
        q, k, v = (
            self.linear(f"{name}.self.{part}", y)
            for part, y in (("query", x), ("key", seen), ("value", seen))
        )
        out = self.linear(f"{name}.output.dense", attention(q, k, v, 2, mask))
        return self.norm(f"{name}.output.LayerNorm", out + x, 1e-12)

    def reward(self, pixels, ids, mask):
        seen, name = self.vision(pixels), "blip.text_encoder"
        x = self.tensors[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = x + self.tensors[f"{name}.embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, 1e-12)
        for i in range(2):
            layer = f"{name}.encoder.layer.{i}"
            x = self.attended(f"{layer}.attention", x, x, mask[:, None, None].bool())
            x = self.attended(f"{layer}.crossattention", x, seen)
            hidden = F.gelu(self.linear(f"{layer}.intermediate.dense", x))
            out = self.linear(f"{layer}.output.dense", hidden)
            x = self.norm(f"{layer}.output.LayerNorm", out + x, 1e-12)
        x = x[:, 0]
        for place in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{place}", x)
        return (x - 0.16717362830052426) / 1.0333394966054072


def pixels_of(picture, side):
    """Bicubic to the shorter side by Pillow, the centred square, CLIP's mean and deviation."""
    scale = side / min(picture.size)
    size = [int(scale * length) for length in picture.size]
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    square = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((square - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


def test_image_reward_is_that_of_its_arithmetic(places):
    network = rewards.ImageReward(str(places["reward"]), processor=str(places["bert"]))
    network.load()
    tokens = transformers.BertTokenizer.from_pretrained(places["bert"])(
        SAID, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens.attention_mask.sum(1).tolist() == [5, 35]  # one is padded, one cut off
    pixels = torch.stack([pixels_of(picture, 32) for picture in PICTURES])
    shown = torch.stack([network.prepare(picture) for picture in PICTURES])
    torch.testing.assert_close(shown, pixels, rtol=1e-5, atol=1e-5)
    expected = ByHand(places["reward"]).reward(pixels, tokens.input_ids, tokens.attention_mask)
    with torch.no_grad():
        found = network.images(shown, SAID)
    assert found.shape == (2, 1)
    assert expected.std() > 1e-3  # or it would tell nothing
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "ImageReward" not in str(network) or "weights" in str(network)


def test_the_aesthetic_score_is_linear_in_clips_unit_vector(places):
    network = rewards.Aesthetic(str(places["clip"]), pretrained=str(places["aesthetic"]))
    network.load()
    clip = transformers.CLIPModel.from_pretrained(places["clip"]).eval()
    pixels = torch.stack([pixels_of(picture, 32) for picture in PICTURES])
    with torch.no_grad():
        x = clip.visual_projection(clip.vision_model(pixels).pooler_output)
        found = network.images(torch.stack([network.prepare(p) for p in PICTURES]))
    x = x / x.norm(dim=1, keepdim=True)
    layers = torch.load(places["aesthetic"], weights_only=True)
    for place in (0, 2, 4, 6, 7):
        x = x @ layers[f"layers.{place}.weight"].T + layers[f"layers.{place}.bias"]
    assert found.shape == (2, 1)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


def test_files_that_are_not_theirs_are_one_sentence(places, tmp_path):
    broken = eyes.write_image_reward(tmp_path / "reward")
    tensors = torch.load(broken / "ImageReward.pt", weights_only=True)
    del tensors["blip.visual_encoder.blocks.1.attn.qkv.weight"]
    torch.save(tensors, broken / "ImageReward.pt")
    torch.save({"x": print}, tmp_path / "code.pth")
    (tmp_path / "empty").mkdir()
    other = eyes.write_image_reward(tmp_path / "other")
    torch.save({"weight": torch.ones(2)}, other / "ImageReward.pt")
    unsized = eyes.write_image_reward(tmp_path / "unsized")
    (unsized / "med_config.json").write_text('{"hidden_size": 8}', encoding="utf-8")
    bert, clip = str(places["bert"]), str(places["clip"])
    for network, said in (
        (rewards.ImageReward(str(broken), processor=bert), "lacks vision.encoder.layers.1"),
        (rewards.ImageReward(str(other), processor=bert), "is no checkpoint of ImageReward"),
        (rewards.ImageReward(str(unsized), processor=bert), "it lacks vocab_size"),
        (rewards.ImageReward(str(tmp_path / "empty"), processor=bert), "No such file"),
        (rewards.ImageReward("nobody/nothing"), "cannot be read"),
        (rewards.Aesthetic(clip, pretrained=str(tmp_path / "code.pth")), "Weights only load"),
        (rewards.Aesthetic(clip, pretrained=str(broken / "ImageReward.pt")), "lacks"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            network.load()
        assert str(error.value).startswith("metrics.networks: the weights of ")
        assert "\n" not in str(error.value)


def test_prompts_are_scored_by_both(places, command, pipelines, tmp_path):
    """Of a folder of pictures and of a model's, by the outcomes of every prompt."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, picture in enumerate(PICTURES):
        picture.save(pictures / f"{i:06d}.png")
    table = f"Prompt\tCategory\tChallenge\n{SAID[0]}\tStars\tBasic\n{SAID[1]}\tMany\tBasic\n"
    (tmp_path / "prompts.tsv").write_text(table, encoding="utf-8")
    networks = {
        "image_reward.path": places["reward"],
        "image_reward.processor": places["bert"],
        "aesthetic.path": places["clip"],
        "aesthetic.pretrained": places["aesthetic"],
    }
    words = [f"metrics.networks.{key}={place}" for key, place in networks.items()]
    words += ["metrics.workers=0"]
    words += ["metrics=prompts", f"metrics.path={tmp_path / 'prompts.tsv'}"]
    words += ["metrics.measures=[image_reward,aesthetic]", f"out={tmp_path / 'out'}"]
    code, _, err = command("evaluate", f"run={pictures}", *words)
    assert code == 0, err
    written = (tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")
    (row,) = json.loads(written)["rows"]
    outcomes = {key: list(map(float, text.split())) for key, text in row["outcomes"].items()}
    network = rewards.ImageReward(str(places["reward"]), processor=str(places["bert"]))
    network.load()
    squares = [p.crop((n := (p.width - 50) // 2, 0, n + 50, 50)) for p in PICTURES]
    with torch.no_grad():
        shown = torch.stack([network.prepare(picture) for picture in squares])
        expected = network.images(shown, SAID)[:, 0].tolist()
    assert outcomes["image_reward"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert row["image_reward"] == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-4)
    stars = row["by_category"]["Stars"]
    assert (stars["prompts"], stars["few"]) == (1, True)
    assert stars["image_reward"]["value"] == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
    assert list(row["by_category"]) == ["Stars", "Many"]
    assert row["aesthetic"] == pytest.approx(np.mean(outcomes["aesthetic"]), rel=1e-5)


def test_a_predictor_that_is_not_there_is_said_first(command, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star", encoding="utf-8")
    words = ["metrics=prompts", f"metrics.path={tmp_path / 'prompts.txt'}"]
    for measure, key in (("aesthetic", "aesthetic"), ("hps", "hps")):
        words_now = [*words, f"metrics.measures=[{measure}]", "run=shapes:unet", "steps=1"]
        code, _, err = command("evaluate", *words_now)
        assert code == 1
        assert f"metrics.networks.{key}.pretrained=" in err
        assert "no such file; download it" in err
