"""The table of teacher families, each with a tiny random pipeline in the real folder layout.

The latents are [4, 16, 16], for pictures of 64x64 pixels. A new family needs a writer and a row in
`FAMILIES`.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from omegaconf import OmegaConf

import tiny

CONF = Path(__file__).parents[1] / "conf" / "teacher"
TEXT, CLIP = 48, 16  # widths


SMALL = {"height": tiny.SIDE, "width": tiny.SIDE}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the tests know about a family.

    write: makes its pipeline with tiny random weights.
    named: its options of the group `teacher`; quick tests use the first.
    taps: the taps after whole blocks.
    grid: whether these taps give image tokens of `patch` x `patch` latents.
    unit: the sides of its pictures must be multiples of this number of pixels.
    options, words: further options of its teacher, in Python and on the command line.
    call: arguments of its pipeline for small pictures.
    guided: arguments of its pipeline for guidance 5 against the empty caption.
    pooled: whether captions have a pooled embedding.
    letters: whether its only text encoder reads captions letter by letter.
    """

    write: Callable[[], Any]
    named: tuple[str, ...]
    taps: tuple[str, ...]
    grid: bool = True
    patch: int = 2
    unit: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    guided: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 5.0})
    pooled: bool = True
    letters: bool = False


def write(family: str, folder: Path) -> Path:
    """Write the pipeline of a family, of `FAMILIES` or of `OTHERS`, into a folder."""
    torch.manual_seed(0)
    pipeline = FAMILIES[family].write() if family in FAMILIES else OTHERS[family]()
    pipeline.save_pretrained(folder)
    return folder


def teacher_at(folder: Path, **options: Any) -> Any:
    """The teacher of a pipeline folder; its index names the class."""
    from distill.teachers.families import teacher_class

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return teacher_class(index["_class_name"])(str(folder), **options)


def clip(width: int, kind: type = transformers.CLIPTextModelWithProjection) -> dict[str, Any]:
    """A CLIP text encoder and its tokenizer."""
    from distill.worlds.shapes.pretraining import text

    tokenizer = text.train_tokenizer(tiny.CAPTIONS, length=tiny.LENGTH, vocab_size=600)
    special = {
        f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")
    }
    shape = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
    }
    sizes = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tiny.LENGTH,
        "num_attention_heads": 2,
    }
    return {
        "text_encoder": kind(transformers.CLIPTextConfig(**shape, **sizes, **special)),
        "tokenizer": tokenizer,
    }


def t5() -> dict[str, Any]:
    """A T5 encoder that reads letter by letter."""
    letters = [("▁", -2.0), *((c, -3.0) for c in string.ascii_letters + string.digits + ",.-")]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    config = transformers.T5Config(
        vocab_size=80, d_model=TEXT, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    return {"text_encoder": transformers.T5EncoderModel(config), "tokenizer": tokenizer}


def gemma() -> dict[str, Any]:
    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        *string.ascii_letters,
        *string.digits,
        *",.-:\n",
    ]
    tokenizer = transformers.GemmaTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], add_bos_token=True
    )
    shape = {"hidden_size": TEXT, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 64}
    config = transformers.Gemma2Config(vocab_size=80, **shape, **heads)
    return {"text_encoder": transformers.Gemma2Model(config), "tokenizer": tokenizer}


def vae(**options: Any) -> diffusers.AutoencoderKL:
    from distill.worlds.shapes.pretraining import vae

    autoencoder = tiny.shake(vae.build(tiny.SIDE), 1, std=0.02)
    autoencoder.register_to_config(scaling_factor=0.8, **options)
    return autoencoder


def sd35() -> Any:
    """Two CLIPs, a T5 with nonzero tokens, and dual attention in the first of three blocks."""
    net = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=TEXT,
        pooled_projection_dim=CLIP + 24,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    texts = {}
    for suffix, parts in {"": clip(CLIP), "_2": clip(24), "_3": t5()}.items():
        texts |= {f"{name}{suffix}": part for name, part in parts.items()}
    # Single files leave this projection out, and it is then the identity.
    torch.nn.init.eye_(texts["text_encoder"].text_projection.weight)
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny.shake(net, 2),
        vae=vae(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **texts,
    )


def sdxl() -> Any:
    """As in `tiny`, but with two CLIPs of different widths, as in the real model. A single file's
    text encoders are recognised by their width.
    """
    net = tiny.sdxl_unet(CLIP + 24, 24)
    texts = clip(CLIP, transformers.CLIPTextModel) | {
        f"{name}_2": part for name, part in clip(24).items()
    }
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=net, vae=vae(), scheduler=scheduler, add_watermarker=False, **texts
    )


def pixart() -> Any:
    net = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02
    )
    return diffusers.PixArtSigmaPipeline(
        transformer=tiny.shake(net, 2), vae=vae(), scheduler=scheduler, **t5()
    )


def sana() -> Any:
    net = diffusers.SanaTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
    )
    halves = {}
    for half in ("encoder", "decoder"):
        halves[f"{half}_block_types"] = ("ResBlock", "ResBlock", "EfficientViTBlock")
        halves[f"{half}_block_out_channels"] = (8, 8, 8)
        halves[f"{half}_layers_per_block"] = (1, 1, 1)
        halves[f"{half}_qkv_multiscales"] = ((), (), (5,))
    dc = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.8, **halves
    )
    solver = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    scheduler = diffusers.DPMSolverMultistepScheduler(**solver)
    return diffusers.SanaPipeline(
        transformer=tiny.shake(net, 2), vae=dc, scheduler=scheduler, **gemma()
    )


def flux() -> Any:
    net = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT,
        pooled_projection_dim=CLIP,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    texts = clip(CLIP, transformers.CLIPTextModel) | {
        f"{name}_2": part for name, part in t5().items()
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return diffusers.FluxPipeline(
        transformer=tiny.shake(net, 2), vae=vae(shift_factor=0.1), scheduler=scheduler, **texts
    )


def auraflow() -> Any:
    """A family that docs/how_to/add_a_teacher.md adds."""
    net = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pos_embed_max_size=256,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return diffusers.AuraFlowPipeline(
        transformer=tiny.shake(net, 2), vae=vae(), scheduler=scheduler, **t5()
    )


def sd15() -> Any:
    """The UNet of `tiny`, with one CLIP."""
    from distill.worlds.shapes.pretraining import assemble, diffusion

    net = tiny.shake(diffusion.build_unet(16, CLIP), 2)
    return diffusers.StableDiffusionPipeline(
        unet=net,
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(**assemble.SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **clip(CLIP, transformers.CLIPTextModel),
    )


BLOCKS = ("block0", "block1", "block2")
FAMILIES = {
    "sd15": Row(
        write=sd15,
        named=("sd15", "sd21"),
        taps=("down0", "down1", "mid", "up0", "up1"),
        grid=False,
        patch=1,
        unit=4,
    ),
    "sdxl": Row(
        write=sdxl,
        named=("sdxl",),
        taps=("down0", "down1", "mid", "up0", "up1"),
        grid=False,
        patch=1,
        unit=4,
    ),
    "sd35": Row(write=sd35, named=("sd3", "sd35_medium", "sd35_large"), taps=BLOCKS),
    "pixart": Row(
        write=pixart,
        named=("pixart_sigma",),
        taps=BLOCKS,
        call={"use_resolution_binning": False},
        pooled=False,
        letters=True,
    ),
    "sana": Row(
        write=sana,
        named=("sana",),
        taps=BLOCKS,
        patch=1,
        unit=4,
        # its instruction has too many letters
        words=("teacher.variant=null", "teacher.instruction=false"),
        call={"use_resolution_binning": False, **SMALL},
        pooled=False,
        letters=True,
    ),
    "flux": Row(
        write=flux,
        named=("flux",),
        taps=("block0", "block1", "single0", "single1"),
        options={"size": tiny.SIDE, "length": 64},
        words=(f"teacher.size={tiny.SIDE}", "teacher.length=64"),
        call={"max_sequence_length": 64, **SMALL},
        guided={"guidance_scale": 3.5, "true_cfg_scale": 5.0, "negative_prompt": [""] * 2},
        letters=True,
    ),
}
OTHERS = {"auraflow": auraflow}


def type_of(option: str) -> Any:
    """The facts of the family of this option of the group `teacher`."""
    from distill.teachers.families import family

    node = OmegaConf.load(CONF / f"{option}.yaml")
    return family(node._target_)
