"""Transformers under the names of their makers' code, as in the files of their makers and ComfyUI.

Derived from the makers' layouts: fused projections, swapped halves, other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import Tensor

State = dict[str, Tensor]


def renamed(state: State, pairs: list[tuple[str, str]]) -> State:
    """Each name after all replacements of regular expressions, in order."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def fused(state: State, parts: tuple[str, ...], whole: str) -> State:
    """Projections `parts` of each block as one, `whole`, in this order."""
    kept, groups = {}, {}
    for name, tensor in state.items():
        part = next((p for p in parts if f".{p}." in name), None)
        if part is None:
            kept[name] = tensor
        else:
            groups.setdefault(name.replace(f".{part}.", f".{whole}."), {})[part] = tensor
    return kept | {name: torch.cat([of[p] for p in parts]) for name, of in groups.items()}


def z_image(state: State) -> State:
    state = fused(state, ("to_q", "to_k", "to_v"), "qkv")
    pairs = [
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"\.to_out\.0\.", ".out."),
        (r"\.norm_([qk])\.", r".\1_norm."),
    ]
    return renamed(state, pairs) | {"norm_final.weight": torch.ones(3)}


def qwen_image(state: State) -> State:
    return dict(state)


JOINT = [  # blocks of two streams, as FLUX's makers name them
    (r"^transformer_blocks\.", "double_blocks."),
    (r"\.attn\.(img|txt)_qkv\.", r".\1_attn.qkv."),
    (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
    (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
    (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
    (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
    (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
]


def joined(state: State) -> State:
    """The projections to queries, keys and values of both streams, each fused into one."""
    state = fused(state, ("to_q", "to_k", "to_v"), "img_qkv")
    return fused(state, ("add_q_proj", "add_k_proj", "add_v_proj"), "txt_qkv")


def flux2(state: State) -> State:
    shift, scale = "norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight"
    state = dict(state)
    first, second = state.pop(shift).chunk(2)
    state = joined(state)
    pairs = [
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"^time_guidance_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
        (r"^time_guidance_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
        (r"^(\w+_modulation(_img|_txt)?)\.linear\.", r"\1.lin."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_", r"single_blocks.\1.norm.norm_"),
        (r"\.norm\.norm_q\.weight", ".norm.query_norm.scale"),
        (r"\.norm\.norm_k\.weight", ".norm.key_norm.scale"),
        *JOINT,
        (r"\.ff\.linear_in\.", ".img_mlp.0."),
        (r"\.ff\.linear_out\.", ".img_mlp.2."),
        (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
        (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
    ]  # fmt: skip
    return renamed(state, pairs) | {scale: torch.cat([second, first])}


def wan(state: State) -> State:
    pairs = [
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"\.norm2\.", ".norm_second."),
        (r"\.norm3\.", ".norm2."),
        (r"\.norm_second\.", ".norm3."),
    ]
    return renamed(state, pairs)


def sana(state: State) -> State:
    crossed = renamed(state, [(r"\.attn2\.to_([kv])\.", r".attn2.cross_\1.")])
    crossed = fused(crossed, ("cross_k", "cross_v"), "kv_linear")
    crossed = renamed(crossed, [(r"\.attn2\.to_q\.", ".attn2.q_linear.")])
    pairs = [
        (r"^patch_embed\.proj\.", "x_embedder.proj."),
        (r"^time_embed\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_embed\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^time_embed\.linear\.", "t_block.1."),
        (r"^caption_projection\.linear_1\.", "y_embedder.y_proj.fc1."),
        (r"^caption_projection\.linear_2\.", "y_embedder.y_proj.fc2."),
        (r"^caption_norm\.", "attention_y_norm."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^scale_shift_table$", "final_layer.scale_shift_table"),
        (r"^transformer_blocks\.", "blocks."),
        (r"\.attn1\.to_out\.0\.", ".attn.proj."),
        (r"\.attn1\.", ".attn."),
        (r"\.attn2\.to_out\.0\.", ".cross_attn.proj."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.ff\.conv_inverted\.", ".mlp.inverted_conv.conv."),
        (r"\.ff\.conv_depth\.", ".mlp.depth_conv.conv."),
        (r"\.ff\.conv_point\.", ".mlp.point_conv.conv."),
    ]
    made = renamed(fused(crossed, ("to_q", "to_k", "to_v"), "qkv"), pairs)
    return made | {"pos_embed": torch.zeros(1, 4, 2), "y_embedder.y_embedding": torch.zeros(3, 2)}


def lumina2(state: State) -> State:
    state = fused(state, ("to_q", "to_k", "to_v"), "qkv")
    pairs = [
        (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
        (r"^time_caption_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_caption_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^norm_out\.linear_1\.", "final_layer.adaLN_modulation.1."),
        (r"^norm_out\.linear_2\.", "final_layer.linear."),
        (r"\.attn\.to_out\.0\.", ".attn.out."),
        (r"\.attn\.norm_([qk])\.", r".attn.\1_norm."),
        (r"\.attn\.", ".attention."),
        (r"\.feed_forward\.linear_", ".feed_forward.w"),
        (r"\.norm1\.linear\.", ".adaLN_modulation.1."),
        (r"\.norm1\.(norm\.)?", ".attention_norm1."),
        (r"\.norm2\.", ".attention_norm2."),
    ]
    return renamed(state, pairs) | {"norm_final.weight": torch.ones(3)}


def chroma(state: State) -> State:
    alone = {n: x for n, x in state.items() if n.startswith("single_")}
    alone = renamed(alone, [(r"\.attn\.to_", ".to_")])
    alone = fused(alone, ("to_q", "to_k", "to_v", "proj_mlp"), "linear1")
    joint = {n: x for n, x in state.items() if n not in alone and not n.startswith("single_")}
    joint = joined(joint)
    pairs = [
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1\.", r"\1.in_layer."),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2\.", r"\1.out_layer."),
        (r"^(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
        (r"^(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
        (r"^(single_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
        *JOINT,
        (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
        (r"\.ff\.net\.2\.", ".img_mlp.2."),
        (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
        (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
    ]
    return renamed(joint | alone, pairs)


# diffusers splits what these makers have fused at the widths of the released models.
WIDE: dict[str, dict] = {
    "lumina2": {
        "hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8, "num_layers": 1,
        "axes_dim_rope": [32, 32, 32], "ffn_dim_multiplier": 0.01,
    },
    "chroma": {
        "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 1,
        "num_single_layers": 1, "axes_dims_rope": [16, 56, 56],
    },
}  # fmt: skip


def widen(folder: Path, family: str) -> None:
    """Give a pipeline folder a transformer of one block at the released width, in bfloat16."""
    place = folder / "transformer"
    config = json.loads((place / "config.json").read_text(encoding="utf-8")) | WIDE[family]
    kind = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        net = kind.from_config(config).to(torch.bfloat16)
    noise = torch.randn(2**16 + 1).to(torch.bfloat16)
    net.to_empty(device="cpu")
    for values in net.state_dict().values():
        for part in values.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)])
    net.save_pretrained(place)


LAYOUTS: dict[str, Callable[[State], State]] = {
    "zimage": z_image,
    "qwenimage": qwen_image,
    "flux2": flux2,
    "wan": wan,
    "sana": sana,
    "lumina2": lumina2,
    "chroma": chroma,
}
