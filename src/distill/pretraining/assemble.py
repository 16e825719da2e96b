"""Trained parts -> ordinary diffusers pipeline folders in half precision, and teacher-made latents as shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from distill.data.write import write_latents
from distill.pretraining.diffusion import SCHEDULE
from distill.sampling import guided, seeded
from distill.teachers.network import PipelineTeacher


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A third encoder that says nothing: diffusers wants one in the folder; its last norm scales by zero."""
    config = T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return encoder, T5Tokenizer(vocab=vocab, extra_ids=0)


def save_sd3(transformer: nn.Module, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
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
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(_text_weights(clip, encoder))
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
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.load_state_dict(_text_weights(clip, encoder))
    return encoder


def _text_weights(clip: CLIPModel, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """The text half of `clip` under the names of `encoder`, which may or may not prefix them with `text_model.`."""
    source = clip.state_dict()
    found = {}
    for name in encoder.state_dict():
        place = name if name in source else f"text_model.{name}"
        found[name] = source[place]
    return found


def _save_half(pipeline: object, folder: Path) -> None:
    """fp16 files that load as fp32: transformers takes the precision of `config.json` over that of the weights."""
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(folder)
    for config in folder.glob("text_encoder*/config.json"):
        facts = json.loads(config.read_text())
        facts["dtype"] = "float32"
        config.write_text(json.dumps(facts, indent=2) + "\n")
    pipeline.to(dtype=torch.float32)


def write_teacher_latents(
    teacher: PipelineTeacher, captions: list[str], folder: Path, *, guidance: float, steps: int, batch: int = 128
) -> None:
    """One latent a caption, seed = its number, as WebDataset shards of 1,024."""

    def samples() -> Iterator[tuple[str, np.ndarray, str]]:
        for start in range(0, len(captions), batch):
            part = captions[start : start + batch]
            with torch.autocast("cpu", torch.bfloat16):
                latents = guided(
                    teacher,
                    teacher.embed(part),
                    seeded(range(start, start + len(part))),
                    shape=teacher.latent_shape,
                    steps=steps,
                    guidance=guidance,
                )
            for i, (latent, caption) in enumerate(zip(latents, part, strict=True)):
                yield f"{start + i:06d}", latent.half().numpy(), caption

    folder.mkdir(parents=True, exist_ok=True)
    write_latents(str(folder / "latents-%06d.tar"), samples(), 1024)
