"""Trained parts -> ordinary diffusers pipeline folders in half precision."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from distill.storage.atomic import atomic_folder, write_atomic
from distill.students import denoiser_part
from distill.teachers.loading.locate import BASE, home_of

SCHEDULE = {  # Stable Diffusion's
    **{
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    },
    **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
}


def silent_t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    """A third text encoder whose output is zero: diffusers needs one in the folder.

    Its last norm scales by zero.
    """
    config = transformers.T5Config(
        vocab_size=8, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1
    )
    encoder = T5EncoderModel(config)
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return encoder, T5Tokenizer(vocab=vocab, extra_ids=0)


def save_sd3(
    net: nn.Module, vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """`StableDiffusion3Pipeline` layout; the one text encoder serves as both CLIPs."""
    t5, t5_tokenizer = silent_t5(net.config.joint_attention_dim)
    texts = {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": t5_tokenizer,
        "text_encoder_3": t5,
    }
    for place in ("text_encoder", "text_encoder_2"):
        texts[place] = half_of(clip, transformers.CLIPTextModelWithProjection, "text")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    save_half(
        diffusers.StableDiffusion3Pipeline(transformer=net, vae=vae, scheduler=scheduler, **texts),
        folder,
    )


def save_sd(
    net: nn.Module,
    vae: AutoencoderKL,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    folder: Path,
    kind: Any = diffusers.StableDiffusionPipeline,
) -> None:
    """`StableDiffusionPipeline` layout, or that of another pipeline of the same parts."""
    texts = {
        "text_encoder": half_of(clip, transformers.CLIPTextModel, "text"),
        "tokenizer": tokenizer,
    }
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = diffusers.DDIMScheduler(**SCHEDULE)
    save_half(kind(unet=net, vae=vae, scheduler=scheduler, **texts, **absent), folder)


save_sd_inpaint = partial(save_sd, kind=diffusers.StableDiffusionInpaintPipeline)


def save_beside(student: Path, base: Path, name: str) -> Path:
    """Save a student's denoiser in half precision and its scheduler beside `base`, which has all
    other parts.

    Raises ValueError unless those are the same files as the student's.
    """
    part, folder = denoiser_part(student), base.parent / name
    for file in student.rglob("*"):
        own = file.relative_to(student)
        if not file.is_file() or own.parts[0] in (part, "scheduler") or len(own.parts) == 1:
            continue
        shared = Path(home_of(base, own.parts[0])) / own
        if not shared.is_file() or shared.read_bytes() != file.read_bytes():
            raise ValueError(f"{base}: its {own} differs from that of {student}")
    index = json.loads((student / "model_index.json").read_text(encoding="utf-8"))
    network = getattr(diffusers, index[part][1]).from_pretrained(student / part)
    save_half(network, folder / part)
    shutil.copytree(student / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    text = json.dumps(index | {BASE: base.name}, indent=2) + "\n"
    write_atomic(folder / "model_index.json", text.encode())  # last: it makes the folder a pipeline
    return folder


def half_of(clip: CLIPModel, kind: type, half: str) -> Any:
    """An encoder of this class with the weights of one half, `text` or `vision`, of `clip`."""
    source, encoder = clip.state_dict(), kind(getattr(clip.config, f"{half}_config"))
    named = {
        name: name if name in source else f"{half}_model.{name}" for name in encoder.state_dict()
    }
    encoder.load_state_dict({name: source[theirs] for name, theirs in named.items()})
    return encoder


def save_half(model: Any, folder: Path) -> None:
    """Save fp16 files of a pipeline or model, which load as fp32 and contain no local path."""
    parts = [
        part
        for part in getattr(model, "components", {"": model}).values()
        if isinstance(part, nn.Module)
    ]
    for part in parts:
        # diffusers' own `to` would warn of layers to keep in float32; there are none
        nn.Module.to(part, torch.float16)
    with atomic_folder(folder) as target:
        model.save_pretrained(target)
        for config in target.rglob("config.json"):
            facts = {
                k: v
                for k, v in json.loads(config.read_text(encoding="utf-8")).items()
                if k != "_name_or_path"
            }
            if "dtype" in facts:
                facts["dtype"] = "float32"  # transformers prefers it to the dtype of the weights
            config.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for part in parts:
        nn.Module.to(part, torch.float32)
