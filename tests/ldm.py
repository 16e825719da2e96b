"""Pipelines written as one file under the names of their makers' code: what diffusers'
`from_single_file` reads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
VAE = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.": "attn.",
}
MMDIT = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.",
    "norm1_context.linear.": "context_block.adaLN_modulation.1.",
    "norm1.linear.": "x_block.adaLN_modulation.1.",
    "ff_context.net.0.proj.": "context_block.mlp.fc1.",
    "ff_context.net.2.": "context_block.mlp.fc2.",
    "ff.net.0.proj.": "x_block.mlp.fc1.",
    "ff.net.2.": "x_block.mlp.fc2.",
    "attn.to_add_out.": "context_block.attn.proj.",
    "attn.to_out.0.": "x_block.attn.proj.",
    "attn2.to_out.0.": "x_block.attn2.proj.",
    "attn.norm_added_q.": "context_block.attn.ln_q.",
    "attn.norm_added_k.": "context_block.attn.ln_k.",
    "attn.norm_q.": "x_block.attn.ln_q.",
    "attn.norm_k.": "x_block.attn.ln_k.",
    "attn2.norm_q.": "x_block.attn2.ln_q.",
    "attn2.norm_k.": "x_block.attn2.ln_k.",
}


def write(pipeline: Any, layout: str, file: Path) -> Path:
    """`layout`: sd15, sd21, sdxl or sd3."""
    state = under("first_stage_model.", vae(pipeline.vae))
    if layout == "sd3":
        state |= under("model.diffusion_model.", mmdit(pipeline.transformer))
        state |= under("text_encoders.clip_l.transformer.text_model.", clip(pipeline.text_encoder))
        state |= under("text_encoders.clip_g.transformer.", pipeline.text_encoder_2.state_dict())
        state |= under("text_encoders.t5xxl.transformer.", pipeline.text_encoder_3.state_dict())
    else:
        state |= under("model.diffusion_model.", unet(pipeline.unet))
    if layout == "sd15":
        state |= under("cond_stage_model.transformer.text_model.", clip(pipeline.text_encoder))
    elif layout == "sd21":
        state |= under("cond_stage_model.model.", open_clip(pipeline.text_encoder))
    elif layout == "sdxl":
        state |= under(
            "conditioner.embedders.0.transformer.text_model.", clip(pipeline.text_encoder)
        )
        state |= under("conditioner.embedders.1.model.", open_clip(pipeline.text_encoder_2))
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, file)
    return file


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}", lambda m, theirs=theirs: m[1] + theirs, name)
    return name


def unet(model: Any) -> State:
    each, found = model.config.layers_per_block + 1, {}

    def place(match: re.Match[str]) -> str:
        way, block, part, at = match[1], int(match[2]), match[3], int(match[4])
        if part == "downsamplers":
            return f"input_blocks.{(block + 1) * each}.0.op."
        number = block * each + at
        if part == "upsamplers":
            attends = hasattr(model.up_blocks[block], "attentions")
            return f"output_blocks.{(block + 1) * each - 1}.{2 if attends else 1}.conv."
        side = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
        return f"{side}.{int(part == 'attentions')}."

    for name, tensor in model.state_dict().items():
        inner = renamed(name, RESNET) if ".resnets." in name else name
        inner = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(?:conv\.(?=\w+$))?", place, inner)
        found[renamed(inner, UNET)] = tensor
    return found


def vae(model: Any) -> State:
    last, found = len(model.config.block_out_channels) - 1, {}
    for name, tensor in model.state_dict().items():
        inner = re.sub(r"down_blocks\.(\d+)\.(?:resnets\.)?", lambda m: f"down.{m[1]}.", name)
        inner = re.sub(
            r"up_blocks\.(\d+)\.(?:resnets\.)?", lambda m: f"up.{last - int(m[1])}.", inner
        )
        inner = re.sub(r"((?:down|up)\.\d+)\.(\d+)\.", r"\1.block.\2.", inner)
        linear = ".attentions." in name and tensor.ndim == 2
        found[renamed(inner, VAE)] = tensor[..., None, None] if linear else tensor
    return found


def clip(model: Any) -> State:
    state = {
        name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()
    }
    return {name: tensor for name, tensor in state.items() if name != "text_projection.weight"}


def open_clip(model: Any) -> State:
    state, found = model.state_dict(), {}
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    for name, tensor in clip(model).items():
        if ".q_proj." in name:
            whole = [clip(model)[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            kind = name.rpartition(".")[2]
            found[renamed(name.partition("q_proj")[0], OPEN_CLIP) + f"in_proj_{kind}"] = torch.cat(
                whole
            )
        elif "k_proj" not in name and "v_proj" not in name:
            found[renamed(name, OPEN_CLIP)] = tensor
    return found


def mmdit(model: Any) -> State:
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        if match := re.fullmatch(
            r"transformer_blocks\.(\d+)\.(attn2?)\.(to_|add_)q(_proj)?\.(\w+)", name
        ):
            block, attn, kind, _, end = match.groups()
            side = "x_block" if kind == "to_" else "context_block"
            parts = [state[re.sub(r"_q(?=[_.])", f"_{part}", name)] for part in "qkv"]
            found[f"joint_blocks.{block}.{side}.{attn}.qkv.{end}"] = torch.cat(parts)
        elif not re.search(r"\.(to|add)_[kv][_.]", name):
            found[renamed(name, MMDIT)] = swapped(tensor) if turned(name, model) else tensor
    return found


def turned(name: str, model: Any) -> bool:
    """Where diffusers has scale before shift, and the others shift before scale."""
    last = len(model.transformer_blocks) - 1
    return name.startswith(("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"))


def swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])
