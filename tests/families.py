"""The table of teacher families, each with a tiny random pipeline in the real folder layout.

The latents are [4, 16, 16], for pictures of 64x64 pixels. A new family needs a writer and a row in
`FAMILIES`.
"""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from omegaconf import OmegaConf

import tiny

CONF = Path(__file__).parents[1] / "conf" / "teacher"
TEXT, CLIP = 48, 16  # widths


SMALL = {"height": tiny.SIDE, "width": tiny.SIDE}


def as_is(x: Any, *_: Any) -> Any:
    return x


def packed(latents: torch.Tensor) -> torch.Tensor:
    """As FLUX has it: two by two latents a token, channel by channel."""
    b, c, h, w = latents.shape
    cells = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(b, h * w // 4, c * 4)


def unpacked(tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    """Tokens of FLUX for a small picture -> latents [B, 4, 16, 16]."""
    cells = tokens.view(len(tokens), 8, 8, 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(len(tokens), 4, 16, 16)


def scaled(raw: torch.Tensor, vae: Any) -> torch.Tensor:
    return 0.8 * (raw - (vae.config.get("shift_factor") or 0.0))


def standardised(raw: torch.Tensor, vae: Any) -> torch.Tensor:
    """As FLUX.2 has it: two by two latents are one, by the statistics of a batch norm."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(-1, 1, 1)
    return (F.pixel_unshuffle(raw, 2) - vae.bn.running_mean.view(-1, 1, 1)) / std


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
    guided: arguments of its pipeline for guidance 5 against the empty caption; None without it.
    scale: guidance of that call; 1: its pipeline guides by an input of its network, or not at all.
    given, returned: latents as the pipeline takes them, and those that it returns as latents, which
        its autoencoder may have been told.
    latents: of what its autoencoder encodes.
    pooled: whether captions have a pooled embedding.
    letters: whether its only text encoder reads captions letter by letter.
    after_caption: whether a block returns image tokens behind each caption's own tokens.
    image_first: whether it returns them before all others.
    slow: whether only its step against the pipeline and its export at one step are quick tests.
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
    guided: Mapping[str, Any] | None = field(default_factory=lambda: {"guidance_scale": 5.0})
    scale: float = 5.0
    given: Callable[[torch.Tensor], torch.Tensor] = as_is
    returned: Callable[[torch.Tensor, Any], torch.Tensor] = as_is
    latents: Callable[[torch.Tensor, Any], torch.Tensor] = scaled
    pooled: bool = True
    letters: bool = False
    after_caption: bool = False
    image_first: bool = False
    slow: bool = False


def sized(length: int) -> dict[str, Any]:
    """Of a row whose files do not say the size: a small one, and captions of so many tokens."""
    options = {"size": tiny.SIDE, "length": length}
    words = tuple(f"teacher.{key}={value}" for key, value in options.items())
    return {
        "options": options,
        "words": words,
        "call": {"max_sequence_length": length, **SMALL},
    }


def write(family: str, folder: Path) -> Path:
    """Write the pipeline of a family, of `FAMILIES` or of `OTHERS`, into a folder."""
    torch.manual_seed(0)
    pipeline = (FAMILIES | OTHERS)[family].write()
    pipeline.save_pretrained(folder)
    return folder


def opened(folder: Path, kind: Any = diffusers.DiffusionPipeline) -> Any:
    """The pipeline of a folder as a user of plain diffusers opens it."""
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def teacher_at(folder: Path, **options: Any) -> Any:
    """The teacher of a pipeline folder; its index names the class."""
    from distill.teachers.families import teacher_class

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return teacher_class(index["_class_name"])(str(folder), **options)


def heard(teacher: Any, *inputs: Any) -> dict[str, Any]:
    """What each of a teacher's tapped modules returns in one pass of its network."""
    found: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, n=name: found.__setitem__(n, output))
        for name, (module, _) in teacher.network.tappable().items()
    ]
    with torch.no_grad():
        teacher.x0(*inputs)
    for handle in handles:
        handle.remove()
    return found


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


def umt5() -> dict[str, Any]:
    """A UMT5 encoder that reads letter by letter."""
    shape = {"vocab_size": 80, "d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(**shape, num_heads=2))
    return {**t5(), "text_encoder": encoder}


def gemma(layers: int = 1) -> dict[str, Any]:
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
    shape = {"hidden_size": TEXT, "intermediate_size": 32, "head_dim": 8}
    shape["num_hidden_layers"] = layers
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 64}
    config = transformers.Gemma2Config(vocab_size=80, **shape, **heads)
    return {"text_encoder": transformers.Gemma2Model(config), "tokenizer": tokenizer}


def qwen_tokenizer(*more: str) -> transformers.Qwen2Tokenizer:
    """Qwen's, for letters alone and `more` tokens, with a chat template of the form of its own."""
    letters = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate([*letters, *special])},
        merges=[],
        additional_special_tokens=special[1:],
        model_max_length=1024,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


QWEN = {"vocab_size": 264, "hidden_size": TEXT, "intermediate_size": 32, "num_hidden_layers": 2}
QWEN |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def qwen() -> dict[str, Any]:
    """A causal Qwen 3 of 28 layers, since FLUX.2's pipeline reads the 27th."""
    tokenizer = qwen_tokenizer()
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Qwen3Config(**DEEP, **heads, num_hidden_layers=28)
    return {"text_encoder": transformers.Qwen3ForCausalLM(config), "tokenizer": tokenizer}


DEEP = {"vocab_size": 272, "hidden_size": 8, "intermediate_size": 8, "initializer_range": 0.3}
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def mistral() -> dict[str, Any]:
    """A Mistral 3 of 31 layers, since FLUX.2's pipeline reads the 30th, with eyes that see nothing.

    The pipeline's system message is one token.
    """
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    of_images = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = qwen_tokenizer(*of_images, "[SYSTEM_PROMPT]", "[INST]", SYSTEM_MESSAGE)
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(), tokenizer, chat_template=MISTRAL
    )
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**DEEP, **heads, num_hidden_layers=31),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    encoder = transformers.Mistral3ForConditionalGeneration(config)
    return {"text_encoder": encoder, "tokenizer": processor}


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


def pixart(kind: type = diffusers.PixArtSigmaPipeline, sample_size: int = 16) -> Any:
    """PixArt-Sigma, or alpha, which is conditioned on the picture's size if `sample_size` is
    128.
    """
    net = diffusers.PixArtTransformer2DModel(
        sample_size=sample_size,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8 if sample_size < 128 else 12,  # a third of the width is the ratio's
        cross_attention_dim=16 if sample_size < 128 else 24,
        caption_channels=TEXT,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02
    )
    return kind(transformer=tiny.shake(net, 2), vae=vae(), scheduler=scheduler, **t5())


def pixart_alpha() -> Any:
    return pixart(diffusers.PixArtAlphaPipeline)


def pixart_alpha_1024() -> Any:
    return pixart(diffusers.PixArtAlphaPipeline, sample_size=128)


def chatglm() -> dict[str, Any]:
    """Kolors' text encoder, and its tokenizer, which reads letter by letter."""
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    letters = string.ascii_letters + string.digits + ",.-"
    train = sentencepiece.SentencePieceTrainer.train
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        with file.open("wb") as opened:
            vocabulary = {"vocab_size": len(letters) + 4, "model_type": "char", "minloglevel": 2}
            train(sentence_iterator=iter([letters]), model_writer=opened, **vocabulary)
        tokenizer = ChatGLMTokenizer(str(file))
        tokenizer.save_vocabulary = partial(_write_vocabulary, file.read_bytes())
    shape = {"num_layers": 2, "hidden_size": TEXT, "ffn_hidden_size": 32, "padded_vocab_size": 96}
    shape |= {"num_attention_heads": 2, "kv_channels": 8, "seq_length": 256}
    shape |= {"multi_query_attention": True, "multi_query_group_num": 1, "original_rope": True}
    text_encoder = ChatGLMModel(ChatGLMConfig(**shape), empty_init=False)
    for name, parameter in text_encoder.named_parameters():
        if "layernorm" in name:  # they are made without values
            torch.nn.init.ones_(parameter)
    return {"text_encoder": text_encoder, "tokenizer": tokenizer}


def _write_vocabulary(vocabulary: bytes, folder: str, *_: Any, **__: Any) -> tuple[str]:
    file = Path(folder) / "tokenizer.model"
    file.write_bytes(vocabulary)
    return (str(file),)


def kolors() -> Any:
    net = tiny.sdxl_unet(24, TEXT)
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    config |= {"encoder_hid_dim": TEXT, "encoder_hid_dim_type": "text_proj"}
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.014}
    schedule |= {"num_train_timesteps": 1100, "timestep_spacing": "leading"}
    return diffusers.KolorsPipeline(
        unet=tiny.shake(type(net)(**config), 2),
        vae=vae(),
        scheduler=diffusers.EulerDiscreteScheduler(**schedule),
        **chatglm(),
    )


def sana() -> Any:
    solver = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return diffusers.SanaPipeline(
        transformer=linear_dit(),
        vae=deep_compression(),
        scheduler=diffusers.DPMSolverMultistepScheduler(**solver),
        **gemma(),
    )


def sana_sprint() -> Any:
    return diffusers.SanaSprintPipeline(
        transformer=linear_dit(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        vae=deep_compression(),
        scheduler=diffusers.SCMScheduler(),
        **gemma(),
    )


def linear_dit(**options: Any) -> Any:
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
        **options,
    )
    return tiny.shake(net, 2)


def deep_compression() -> diffusers.AutoencoderDC:
    halves = {}
    for half in ("encoder", "decoder"):
        halves[f"{half}_block_types"] = ("ResBlock", "ResBlock", "EfficientViTBlock")
        halves[f"{half}_block_out_channels"] = (8, 8, 8)
        halves[f"{half}_layers_per_block"] = (1, 1, 1)
        halves[f"{half}_qkv_multiscales"] = ((), (), (5,))
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.8, **halves
    )


def flux(*, guidance_embeds: bool = True) -> Any:
    net = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT,
        pooled_projection_dim=CLIP,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    texts = clip(CLIP, transformers.CLIPTextModel) | {
        f"{name}_2": part for name, part in t5().items()
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=guidance_embeds, shift=3.0 if guidance_embeds else 1.0
    )
    return diffusers.FluxPipeline(
        transformer=tiny.shake(net, 2), vae=vae(shift_factor=0.1), scheduler=scheduler, **texts
    )


def zimage() -> Any:
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 24, 24],
    )
    text = transformers.Qwen3Model(transformers.Qwen3Config(**QWEN, head_dim=8))
    return diffusers.ZImagePipeline(
        transformer=tiny.shake(net, 2),
        vae=vae(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=text,
        tokenizer=qwen_tokenizer(),
    )


def qwenimage() -> Any:
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 2, 2),
    )
    levels = {"dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    moments = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.2, 0.9]}
    autoencoder = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, **levels, **moments)
    rope = {"rope_type": "default", "mrope_section": [4, 4, 4]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision |= {"out_hidden_size": TEXT, "fullatt_block_indexes": [0]}
    texts = transformers.Qwen2_5_VLConfig(
        text_config={**QWEN, "rope_parameters": {**rope, "rope_theta": 10000.0}},
        vision_config=vision,
    )
    return diffusers.QwenImagePipeline(
        transformer=tiny.shake(net, 2),
        vae=tiny.shake(autoencoder, 1, std=0.02),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(texts),
        tokenizer=qwen_tokenizer(),
    )


def lumina2() -> Any:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=16,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 24, 24),
        cap_feat_dim=TEXT,
    )
    return diffusers.Lumina2Pipeline(
        transformer=tiny.shake(net, 2),
        vae=vae(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        **gemma(layers=2),
    )


def flux_schnell() -> Any:
    """Told no guidance, and sampled without a shift."""
    return flux(guidance_embeds=False)


def chroma() -> Any:
    net = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        transformer=tiny.shake(net, 2),
        vae=vae(shift_factor=0.1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        **t5(),
    )


def flux2_net(width: int, *, guidance_embeds: bool) -> Any:
    return tiny.shake(
        diffusers.Flux2Transformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=3 * width,
            timestep_guidance_channels=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        2,
    )


def flux2_vae() -> Any:
    """Its latents are of 2x2 pixels and have one channel. Four of them are one of ours."""
    net = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 24),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=8,
        sample_size=tiny.SIDE,
    )
    net.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    net.bn.running_var.copy_(torch.tensor([0.5, 0.8, 1.2, 1.5]))
    return tiny.shake(net, 1, std=0.02)


def flux2() -> Any:
    return diffusers.Flux2Pipeline(
        transformer=flux2_net(8, guidance_embeds=True),
        vae=flux2_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        **mistral(),
    )


def flux2_klein(*, is_distilled: bool = False) -> Any:
    return diffusers.Flux2KleinPipeline(
        transformer=flux2_net(8, guidance_embeds=False),
        vae=flux2_vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        is_distilled=is_distilled,
        **qwen(),
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


def of_channels(net: Any, channels: int, out_channels: int = 4) -> Any:
    """A denoiser whose first layer also reads channels of a picture."""
    config = {k: v for k, v in net.config.items() if not k.startswith("_")}
    sizes = {"in_channels": channels, "out_channels": out_channels}
    return tiny.shake(type(net)(**{**config, **sizes}), 2)


def instruct_pix2pix() -> Any:
    parts = sd15().components
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        **{**parts, "unet": of_channels(parts["unet"], 8)}, requires_safety_checker=False
    )


OF_XL = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def instruct_pix2pix_xl() -> Any:
    parts = sdxl().components
    return diffusers.StableDiffusionXLInstructPix2PixPipeline(
        unet=of_channels(parts["unet"], 8),
        add_watermarker=False,
        **{n: parts[n] for n in OF_XL},
    )


def without_variance(vae: Any) -> Any:
    """The autoencoder, sure of its latents: pipelines that fill masks sample from its posterior, of
    which our teachers read the mean.
    """
    last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    with torch.no_grad():  # log variances, the last half of the channels
        last.weight[len(last.weight) // 2 :] = 0
        last.bias[len(last.bias) // 2 :] = -30
    return vae


def sd_inpaint() -> Any:
    parts = sd15().components
    parts |= {"unet": of_channels(parts["unet"], 9), "vae": without_variance(parts["vae"])}
    return diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def sdxl_inpaint() -> Any:
    parts = sdxl().components
    parts |= {"unet": of_channels(parts["unet"], 9), "vae": without_variance(parts["vae"])}
    return diffusers.StableDiffusionXLInpaintPipeline(
        add_watermarker=False, **{n: parts[n] for n in ("unet", *OF_XL)}
    )


def wan(**settings: Any) -> Any:
    """Videos of 32x48: latents [4, T, 4, 6]. Its autoencoder has the strides of the real one."""
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    levels = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    levels["temperal_downsample"] = [False, True, True]
    moments = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.2, 0.9]}
    autoencoder = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, **levels, **moments)
    solver = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return diffusers.WanPipeline(
        transformer=tiny.shake(net, 2),
        vae=tiny.shake(autoencoder, 1, std=0.02),
        scheduler=diffusers.UniPCMultistepScheduler(**solver),
        **umt5(),
        **settings,
    )


def sd3_inpaint() -> Any:
    """Its pipeline reads 33 channels, hence 16 of latents."""
    parts = sd35().components
    config = {k: v for k, v in parts["vae"].config.items() if not k.startswith("_")}
    wide = diffusers.AutoencoderKL(**{**config, "latent_channels": 16})
    parts["vae"] = without_variance(tiny.shake(wide, 1, std=0.02))
    parts["transformer"] = of_channels(parts["transformer"], 33, 16)
    return diffusers.StableDiffusion3InpaintPipeline(**parts)


def flux_fill() -> Any:
    """Packed by 2 x 2: latents, those around the mask, and the mask's 4 x 4 pixels for each."""
    parts = {k: v for k, v in flux().components.items() if v is not None}
    parts["transformer"] = of_channels(parts["transformer"], 4 * (4 + 4 + 16), 16)
    return diffusers.FluxFillPipeline(**{**parts, "vae": without_variance(parts["vae"])})


def flux_kontext() -> Any:
    return diffusers.FluxKontextPipeline(**flux().components)


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
        **sized(64),
        guided={"guidance_scale": 3.5, "true_cfg_scale": 5.0, "negative_prompt": [""] * 2},
        given=packed,
        returned=unpacked,
        letters=True,
    ),
    "zimage": Row(
        write=zimage,
        named=("z_image", "z_image_turbo"),
        taps=BLOCKS,
        **sized(96),
        guided={"guidance_scale": 4.0},  # 1 is added to it
        image_first=True,
        pooled=False,
        letters=True,
        slow=True,
    ),
    "flux2": Row(
        write=flux2,
        named=("flux2",),
        taps=("block0", "block1", "single0", "single1"),
        patch=1,
        unit=4,
        **sized(96),
        guided={"guidance_scale": 4.0},
        scale=1.0,
        returned=lambda x, _: x.transpose(1, 2).unflatten(2, (16, 16)),
        latents=standardised,
        pooled=False,
        letters=True,
        slow=True,
    ),
    "pixart_alpha": Row(
        write=pixart_alpha,
        named=("pixart_alpha",),
        taps=BLOCKS,
        call={"use_resolution_binning": False},
        pooled=False,
        letters=True,
        slow=True,
    ),
    "qwenimage": Row(
        write=qwenimage,
        named=("qwen_image",),
        taps=BLOCKS,
        **sized(256),
        guided={"true_cfg_scale": 5.0, "negative_prompt": [""] * 2},
        given=packed,
        returned=unpacked,
        pooled=False,
        letters=True,
        slow=True,
    ),
    "lumina2": Row(
        write=lumina2,
        named=("lumina2",),
        taps=BLOCKS,
        after_caption=True,
        pooled=False,
        letters=True,
        slow=True,
    ),
    "kolors": Row(
        write=kolors,
        named=("kolors",),
        taps=("down0", "down1", "mid", "up0", "up1"),
        grid=False,
        patch=1,
        unit=4,
        letters=True,
        slow=True,
    ),
    "sana_sprint": Row(
        write=sana_sprint,
        named=("sana_sprint",),
        taps=BLOCKS,
        patch=1,
        unit=4,
        # its instruction has too many letters
        words=("teacher.variant=null", "teacher.instruction=false"),
        call={"use_resolution_binning": False, **SMALL},
        guided=None,
        pooled=False,
        letters=True,
        slow=True,
    ),
    "flux2_klein": Row(
        write=flux2_klein,
        named=("flux2_klein_base", "flux2_klein"),
        taps=("block0", "block1", "single0", "single1"),
        patch=1,
        unit=4,
        **sized(96),
        returned=standardised,
        latents=standardised,
        pooled=False,
        letters=True,
        slow=True,
    ),
    "chroma": Row(
        write=chroma,
        named=("chroma",),
        taps=("block0", "block1", "single0", "single1"),
        **sized(64),
        given=packed,
        returned=unpacked,
        pooled=False,
        letters=True,
        slow=True,
    ),
    "flux_schnell": Row(
        write=flux_schnell,
        named=("flux_schnell",),
        taps=("block0", "block1", "single0", "single1"),
        **sized(64),
        guided={"guidance_scale": 0.0},
        scale=1.0,
        given=packed,
        returned=unpacked,
        letters=True,
        slow=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Other:
    """What the tests know about a family that has a file of its own.

    write: makes its pipeline with tiny random weights.
    option: its option of the group `teacher`; None without one.
    options: further options of its teacher.
    reads: what its data hold beside pictures and captions: masks, sources, or nothing.
    """

    write: Callable[[], Any]
    option: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    reads: str | None = None


# Further options of FLUX's teachers, and arguments of their pipelines for small pictures.
OF_FLUX = {"size": tiny.SIDE, "length": 64}
CALL_OF_FLUX = {"max_sequence_length": 64, **SMALL}
OF_WAN = {"frames": 9, "height": 32, "width": 48, "length": 24}
OTHERS = {
    "auraflow": Other(write=auraflow),
    "flux_fill": Other(write=flux_fill, option="flux_fill", options=OF_FLUX, reads="masks"),
    "flux_kontext": Other(
        write=flux_kontext, option="flux_kontext", options=OF_FLUX, reads="sources"
    ),
    "instruct_pix2pix": Other(write=instruct_pix2pix, option="instruct_pix2pix", reads="sources"),
    "instruct_pix2pix_xl": Other(
        write=instruct_pix2pix_xl,
        option="sdxl_instruct_pix2pix",
        options={"size": tiny.SIDE},
        reads="sources",
    ),
    "pixart_alpha_1024": Other(write=pixart_alpha_1024),
    "sd3_inpaint": Other(write=sd3_inpaint, option="sd3_inpaint", reads="masks"),
    "sd_inpaint": Other(write=sd_inpaint, option="sd_inpaint", reads="masks"),
    "sdxl_inpaint": Other(write=sdxl_inpaint, option="sdxl_inpaint", reads="masks"),
    "wan": Other(write=wan, option="wan", options=OF_WAN),
}
EDITORS = ("instruct_pix2pix", "instruct_pix2pix_xl")
INPAINTERS = ("sd_inpaint", "sdxl_inpaint", "sd3_inpaint", "flux_fill")
TRAINED = (*FAMILIES, *(name for name, row in OTHERS.items() if row.option))
# Their networks are of a class that another family has, with other weights, inputs or channels.
VARIANTS = (
    *("pixart_alpha", "kolors", "sana_sprint", "flux2_klein", "flux_schnell", "flux_fill"),
    *("flux_kontext", "sd3_inpaint", *EDITORS, "sd_inpaint", "sdxl_inpaint"),
)


def words_of(family: str, folder: Path) -> list[str]:
    """A family's teacher at this folder, as a user asks for it."""
    if family in FAMILIES:
        row = FAMILIES[family]
        option, more = row.named[0], list(row.words)
    else:
        other = OTHERS[family]
        option, more = other.option, [f"teacher.{k}={v}" for k, v in other.options.items()]
    return [f"teacher={option}", f"teacher.path={folder}", "teacher.dtype=float32", *more]


def teacher_of(family: str, folder: Path, **options: Any) -> Any:
    """The teacher of a family's folder, with the further options of its row."""
    return teacher_at(folder, **{**(FAMILIES | OTHERS)[family].options, **options})


def marks(family: str) -> Any:
    """The mark of a test of this family, but for those that are quick for every family."""
    return training(family) if FAMILIES[family].slow else ()


def training(family: str) -> Any:
    """The mark of a test that trains each family."""
    return pytest.mark.nightly if family in VARIANTS else pytest.mark.slow


def marked() -> list[Any]:
    """All families, as parameters of such a test."""
    return [pytest.param(family, marks=marks(family)) for family in FAMILIES]


def type_of(option: str) -> Any:
    """The facts of the family of this option of the group `teacher`."""
    from distill.teachers.families import family

    node = OmegaConf.load(CONF / f"{option}.yaml")
    return family(node._target_)
