"""Tiny random networks of the classes that judge pictures, in the file layouts of the real ones,
and a tiny COCO.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
import transformers
from PIL import Image

import tiny

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP of transformers with its tokenizer and processor, for pictures of 32 pixels."""
    from distill.worlds.shapes.pretraining import text

    tokenizer = text.train_tokenizer(tiny.CAPTIONS, length=24, vocab_size=600)
    words = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_dim": 16}
    words |= {
        key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    torch.manual_seed(seed)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**TOWER, **words},
            vision_config={**TOWER, "image_size": 32, "patch_size": 8, "projection_dim": 16},
            projection_dim=16,
        )
    )
    tiny.shake(model, seed, std=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def write_open_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP as open_clip reads it from a folder, for pictures of 32 pixels."""
    towers = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 64,
            "patch_size": 8,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
    }
    torch.manual_seed(seed)
    model = tiny.shake(open_clip.CLIP(**towers), seed, std=0.1)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": towers, "preprocess_cfg": {}}), encoding="utf-8"
    )
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def write_pictures(
    folder: Path, count: int, size: tuple[int, int] = (40, 56), seed: int = 0
) -> list[Path]:
    """JPEGs of coarse noise, named as COCO's."""
    folder.mkdir(parents=True, exist_ok=True)
    random, paths = np.random.default_rng(seed), []
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8))
        paths.append(folder / f"{100 + i:012d}.jpg")
        coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(paths[-1], quality=95)
    return paths


def write_coco(folder: Path, count: int = 8) -> Path:
    """Pictures and two captions of each, the later annotated first; ids in the file run
    backwards.
    """
    paths = write_pictures(folder / "val2017", count)
    images = [{"id": int(path.stem), "file_name": path.name} for path in reversed(paths)]
    said = [
        {"id": 900 - i, "image_id": 100 + i % count, "caption": f" {tiny.CAPTIONS[i]}\n"}
        for i in range(2 * count)
    ]
    (folder / "annotations").mkdir()
    whole = {"images": images, "annotations": said}
    (folder / "annotations" / "captions_val2017.json").write_text(
        json.dumps(whole), encoding="utf-8"
    )
    return folder


def write_all(folder: Path) -> dict[str, Path]:
    return {
        "coco": write_coco(folder / "coco"),
        "clip": write_clip(folder / "clip"),
        "open_clip": write_open_clip(folder / "open_clip"),
        "dinov2": tiny.vit(),
    }


def small(places: dict[str, Path]) -> list[str]:
    """What makes coco5k small, in a command: its networks are played by tiny ones, Inception by a
    CLIP.
    """
    networks = {"dinov2": tiny.vit()} | dict.fromkeys(
        ("inception", "clip_l", "pick"), places["clip"]
    )
    networks |= dict.fromkeys(("clip_g", "clip_b32", "hps"), f"local-dir:{places['open_clip']}")
    words = [f"metrics.networks.{name}.path={path}" for name, path in networks.items()]
    words += ["metrics.networks.inception._target_=distill.evaluation.networks.Clip"]
    words += [
        "metrics.networks.pick.processor=null",
        "metrics.networks.dinov2.size=64",
        "metrics.workers=0",
    ]
    return [*words, "metrics.scores.manifolds.k=2", "metrics.variety=[2,3]", "metrics.batch_size=3"]


MED = {  # of med_config.json, small
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "layer_norm_eps": 1e-12, "max_position_embeddings": 40,
    "model_type": "bert", "num_attention_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0,
    "type_vocab_size": 2, "vocab_size": 40, "encoder_width": 768, "add_cross_attention": True,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "star", "two", "blue"]
WORDS += ["circles", "on", "white", "the", "of", "and"]
MLP = {0: (1024, None), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def write_bert(folder: Path) -> Path:
    """A tokenizer as that of bert-base-uncased."""
    folder.mkdir(parents=True)
    words = [*WORDS, *(f"[unused{i}]" for i in range(MED["vocab_size"] - 2 - len(WORDS)))]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def mlp_shapes(width: int, prefix: str = "layers.") -> dict[str, tuple[int, ...]]:
    """Of the MLP of the aesthetic predictor, which ImageReward has too."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place, (fan_out, fan_in) in MLP.items():
        shapes[f"{prefix}{place}.weight"] = (fan_out, fan_in or width)
        shapes[f"{prefix}{place}.bias"] = (fan_out,)
    return shapes


def reward_shapes(width: int = 128, side: int = 32) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ImageReward.pt, with a vision transformer of `width`."""
    text, hidden = MED["hidden_size"], MED["intermediate_size"]
    vision, encoder = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}cls_token": (1, 1, width),
        f"{vision}pos_embed": (1, (side // 16) ** 2 + 1, width),
        f"{vision}patch_embed.proj.weight": (width, 3, 16, 16),
        f"{vision}patch_embed.proj.bias": (width,),
        f"{encoder}embeddings.word_embeddings.weight": (MED["vocab_size"], text),
        f"{encoder}embeddings.position_embeddings.weight": (MED["max_position_embeddings"], text),
    }

    def linear(name: str, fan_in: int, fan_out: int) -> None:
        shapes.update({f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    for i in range(2):
        block = f"{vision}blocks.{i}."
        norm(f"{block}norm1", width)
        linear(f"{block}attn.qkv", width, 3 * width)
        linear(f"{block}attn.proj", width, width)
        norm(f"{block}norm2", width)
        linear(f"{block}mlp.fc1", width, 2 * width)
        linear(f"{block}mlp.fc2", 2 * width, width)
    norm(f"{vision}norm", width)
    norm(f"{encoder}embeddings.LayerNorm", text)
    for i in range(MED["num_hidden_layers"]):
        layer = f"{encoder}encoder.layer.{i}."
        for kind, seen in (("attention", text), ("crossattention", width)):
            for name, fan_in in (("query", text), ("key", seen), ("value", seen)):
                linear(f"{layer}{kind}.self.{name}", fan_in, text)
            linear(f"{layer}{kind}.output.dense", text, text)
            norm(f"{layer}{kind}.output.LayerNorm", text)
        linear(f"{layer}intermediate.dense", text, hidden)
        linear(f"{layer}output.dense", hidden, text)
        norm(f"{layer}output.LayerNorm", text)
    linear("blip.vision_proj", width, 256)  # of BLIP's pretraining
    linear("blip.text_proj", text, 256)
    return shapes | mlp_shapes(text, "mlp.layers.")


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 else max(1, shape[-1]) ** -0.5
        found[name] = scale * torch.randn(shape, generator=generator)
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "Norm.weight")):
            found[name] += 1
    return found


def write_image_reward(folder: Path, seed: int = 0) -> Path:
    """ImageReward as its authors publish it, tiny."""
    folder.mkdir(parents=True)
    tensors = random_tensors(reward_shapes(), seed)
    places = torch.arange(MED["max_position_embeddings"])[None]
    tensors["blip.text_encoder.embeddings.position_ids"] = places
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED), encoding="utf-8")
    return folder


def write_aesthetic(file: Path, width: int = 16) -> Path:
    """The predictor's file, for embeddings of `width`."""
    torch.save(random_tensors(mlp_shapes(width)), file)
    return file
