"""Trained parts -> ordinary diffusers pipeline folders in half precision, and teacher-made latents as shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from rich.progress import track
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from distill.data.write import write_latents
from distill.pretraining.diffusion import SCHEDULE
from distill.sampling import guided, seeded
from distill.teachers.network import PipelineTeacher

PER_SHARD = 1024


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A third encoder that says nothing: diffusers wants one in the folder; its last norm scales by zero."""
    config = T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return encoder, T5Tokenizer(vocab=vocab, extra_ids=0)


def save_sd3(
    transformer: nn.Module, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """`StableDiffusion3Pipeline` layout; the one text encoder stands in both CLIP places."""
    t5, t5_tokenizer = silent_t5(transformer.config.joint_attention_dim)
    encoders = [with_projection(clip) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=t5,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=t5_tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    _save_half(pipeline, folder)


def save_sd(unet: nn.Module, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`StableDiffusionPipeline` layout."""
    encoder = _half_of(clip, CLIPTextModel(clip.config.text_config), "text_model.")
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    _save_half(pipeline, folder)


def with_projection(clip: CLIPModel) -> CLIPTextModelWithProjection:
    return _half_of(clip, CLIPTextModelWithProjection(clip.config.text_config), "text_model.")


def vision(clip: CLIPModel) -> CLIPVisionModelWithProjection:
    return _half_of(clip, CLIPVisionModelWithProjection(clip.config.vision_config), "vision_model.")


def _half_of(clip: CLIPModel, encoder: Any, prefix: str) -> Any:
    """`encoder` with the weights of one half of `clip`, which may name them with `prefix` or without."""
    source = clip.state_dict()
    encoder.load_state_dict({name: source[name if name in source else prefix + name] for name in encoder.state_dict()})
    return encoder


def _save_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """fp16 files that load as fp32."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for part in parts:
        nn.Module.to(part, torch.float16)  # diffusers' own `to` warns about layers to keep, of which there are none
    pipeline.save_pretrained(folder)
    for config in folder.glob("*/config.json"):
        _tidy(config)
    for part in parts:
        nn.Module.to(part, torch.float32)


def save_half(model: nn.Module, folder: Path) -> None:
    """fp16 files of one transformers model, which load as fp32."""
    model.half().save_pretrained(folder)
    model.float()
    _tidy(folder / "config.json")


def _tidy(config: Path) -> None:
    """No path of the machine that trained it; and the precision that transformers takes over that of the weights."""
    facts = json.loads(config.read_text())
    facts.pop("_name_or_path", None)
    if "dtype" in facts:
        facts["dtype"] = "float32"
    config.write_text(json.dumps(facts, indent=2) + "\n")


def write_teacher_latents(
    teacher: PipelineTeacher, captions: list[str], folder: Path, *, guidance: float, steps: int, batch: int = 128
) -> None:
    """One latent a caption, seed = its number, as WebDataset shards of 1,024; what is there already stays."""

    def samples(numbers: range) -> Iterator[tuple[str, np.ndarray, str]]:
        for start in track(numbers[::batch], description=f"latents of {numbers[0]} to {numbers[-1]}"):
            seeds = range(start, min(start + batch, numbers.stop))
            part = [captions[i] for i in seeds]
            with torch.autocast(teacher.device.type, torch.bfloat16):
                cond, shape = teacher.embed(part), teacher.latent_shape
                latents = guided(teacher, cond, seeded(seeds), shape=shape, steps=steps, guidance=guidance)
            for i, latent, caption in zip(seeds, latents, part, strict=True):
                yield f"{i:06d}", latent.half().cpu().numpy(), caption

    for number, start in enumerate(range(0, len(captions), PER_SHARD)):
        if not (folder / f"latents-{number:06d}.tar").exists():
            numbers = range(start, min(start + PER_SHARD, len(captions)))
            (part,) = write_latents(str(folder / "part" / "%06d.tar"), samples(numbers), PER_SHARD)
            Path(part).replace(folder / f"latents-{number:06d}.tar")
    shutil.rmtree(folder / "part", ignore_errors=True)
