"""Stable Diffusion in one file, in the layout of the original code (ldm, sgm), which ComfyUI and
other programs read.

Of SD3, FLUX, PixArt, Z-Image and Qwen-Image only the transformer is written, for "Load
Diffusion Model" of ComfyUI, which reads diffusers' names.

model.diffusion_model.  the UNet: blocks have one running number per residual layer or resampling
first_stage_model.      the autoencoder: the decoder's stages are numbered from its end
cond_stage_model.       the text encoder; SDXL has two: conditioner.embedders.0 and .1
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.teachers.families import family_of_kind
from distill.teachers.loading.weights import write_weights

ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
RESIDUAL = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
AUTOENCODER = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down", "resnets": "block", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token": "token",
    "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def save_single_file(pipeline: Any, file: Path, dtype: str | None = None) -> Path:
    """Write a StableDiffusionPipeline or StableDiffusionXLPipeline completely; of SD3, FLUX,
    PixArt, Z-Image and Qwen-Image only the transformer, as the family says by `single_file`.

    Raises ValueError for any other pipeline.
    """
    kind = type(pipeline).__name__
    how = family_of_kind(kind).single_file
    if how == "transformer":
        return write_weights(pipeline.transformer.state_dict(), file, dtype=dtype)
    if how is None:
        what = f"a {kind} has no such layout; use to=diffusers"
        known = "Stable Diffusion, SD3, FLUX, PixArt, Z-Image and Qwen-Image"
        raise ValueError(f"to=single_file: is for {known}, and {what}")
    state = {f"model.diffusion_model.{k}": v for k, v in unet(pipeline.unet)}
    state |= {f"first_stage_model.{k}": v for k, v in autoencoder(pipeline.vae)}
    if hasattr(pipeline, "text_encoder_2"):
        state |= {
            f"conditioner.embedders.0.transformer.{k}": v for k, v in clip(pipeline.text_encoder)
        }
        state |= {
            f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(pipeline.text_encoder_2)
        }
    elif pipeline.text_encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, of SD 1
        state |= {f"cond_stage_model.transformer.{k}": v for k, v in clip(pipeline.text_encoder)}
    else:
        state |= {f"cond_stage_model.model.{k}": v for k, v in open_clip(pipeline.text_encoder)}
    settings = pipeline.scheduler.config
    if settings.get("prediction_type") == "v_prediction":
        # ComfyUI recognises v-prediction and zero terminal SNR by these tensors.
        flags = ["v_pred", *["ztsnr"] * bool(settings.get("rescale_betas_zero_snr"))]
        state |= {flag: torch.zeros(1) for flag in flags}
    return write_weights(state, file, dtype=dtype)


def unet(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a UNet under its original name."""
    places = _places(model)
    for name, value in model.state_dict().items():
        stem = next(place for place in places if name.startswith(f"{place}."))
        rest = name[len(stem) + 1 :]
        if "resnets" in stem:
            layer, _, end = rest.partition(".")
            rest = f"{RESIDUAL[layer]}.{end}"
        yield f"{places[stem]}.{rest}", value


def _places(model: nn.Module) -> dict[str, str]:
    """Prefix of a UNet's part in diffusers -> its prefix in the original code."""
    places, n = dict(ENDS), 1
    for i, block in enumerate(model.down_blocks):
        for j in range(len(block.resnets)):
            places |= _layer_names(f"down_blocks.{i}", j, f"input_blocks.{n}")
            n += 1
        if block.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    n = 0
    for i, block in enumerate(model.up_blocks):
        for j in range(len(block.resnets)):
            places |= _layer_names(f"up_blocks.{i}", j, f"output_blocks.{n}")
            n += 1
        behind = 2 if getattr(block, "attentions", None) else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{behind}.conv"
    return places


def _layer_names(block: str, j: int, original: str) -> dict[str, str]:
    """New names -> original names of both modules of layer j of a block."""
    lists = ("resnets", "attentions")
    return {f"{block}.{name}.{j}": f"{original}.{k}" for k, name in enumerate(lists)}


def autoencoder(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of an autoencoder under its original name; attention used 1x1 convolutions."""
    last = len(model.decoder.up_blocks) - 1
    for name, value in model.state_dict().items():
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
        key = _renamed(key, AUTOENCODER)
        yield key, value[..., None, None] if ".attn_1." in key and value.ndim == 2 else value


def clip(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of OpenAI's CLIP under its name before transformers 5.6."""
    for name, value in model.state_dict().items():
        yield f"text_model.{name.removeprefix('text_model.')}", value


def open_clip(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a text encoder under its OpenCLIP name; query, key, value are one matrix."""
    state = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    for name, value in state.items():
        if name == "text_projection.weight":
            yield "text_projection", value.T
        elif "q_proj" in name:
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            yield _renamed(name, OPEN_CLIP).replace("q_proj.", "in_proj_"), torch.cat(parts)
        elif not re.search("[kv]_proj", name):
            yield _renamed(name, OPEN_CLIP), value


def _renamed(name: str, names: dict[str, str]) -> str:
    for theirs, original in names.items():
        name = name.replace(theirs, original)
    return name
