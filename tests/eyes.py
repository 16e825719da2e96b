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
