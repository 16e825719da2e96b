"""Transformers under the names of their makers' code, as in the files of their makers and ComfyUI.

Derived from the makers' layouts: fused projections, swapped halves, other names.
"""

from __future__ import annotations

import re
from collections.abc import Callable

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


def flux2(state: State) -> State:
    shift, scale = "norm_out.linear.weight", "final_layer.adaLN_modulation.1.weight"
    state = dict(state)
    first, second = state.pop(shift).chunk(2)
    state = fused(state, ("to_q", "to_k", "to_v"), "img_qkv")
    state = fused(state, ("add_q_proj", "add_k_proj", "add_v_proj"), "txt_qkv")
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
        (r"^transformer_blocks\.", "double_blocks."),
        (r"\.attn\.(img|txt)_qkv\.", r".\1_attn.qkv."),
        (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
        (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
        (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
        (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
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


LAYOUTS: dict[str, Callable[[State], State]] = {
    "zimage": z_image,
    "qwenimage": qwen_image,
    "flux2": flux2,
    "wan": wan,
    "sana": sana,
}
