"""Pipelines whose denoiser has its released configuration and random weights, in bfloat16.

The rest of a pipeline is small. Text encoders have one to a few layers, of the width that the
denoiser reads, and the tokenizers of `tests/families.py`: captions are embedded before training in
a run that minds its memory. Autoencoders have the real latents and few channels: latents are given.

Without `full` it is the tiny pipeline of `tests/families.py`, to try a script itself.
FLUX.2 dev (32 B) is left out: its weights are twice those of the disks and memories meant here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import families

DTYPE = torch.bfloat16
SPREAD = 0.02  # of random weights
NOISE = 2**24 + 1  # values that are drawn; a larger weight repeats them


# -- denoisers: the released configurations --------------------------------------------------------


def sd15() -> Any:
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def sdxl(**options: Any) -> Any:
    shape: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
        "use_linear_projection": True,
    }
    return diffusers.UNet2DConditionModel(**{**shape, **options})


def kolors() -> Any:
    """SDXL's, which reads 4,096 numbers of a token."""
    hidden = {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}
    return sdxl(projection_class_embeddings_input_dim=6 * 256 + 4096, **hidden)


def sd3(**options: Any) -> Any:
    shape: dict[str, Any] = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64}
    shape |= {"caption_projection_dim": 1536, "joint_attention_dim": 4096}
    shape |= {"pooled_projection_dim": 2048, "sample_size": 128, "pos_embed_max_size": 192}
    return diffusers.SD3Transformer2DModel(**{**shape, **options})


def sd35_medium() -> Any:
    dual = tuple(range(13))
    return sd3(pos_embed_max_size=384, dual_attention_layers=dual, qk_norm="rms_norm")


def pixart() -> Any:
    """Sigma: 28 blocks of 1,152 channels."""
    options = {"caption_channels": 4096, "cross_attention_dim": 1152, "interpolation_scale": 2}
    return diffusers.PixArtTransformer2DModel(sample_size=128, num_layers=28, **options)


def sana() -> Any:
    """Of 1.6 B: 20 blocks of 70 heads of 32, cross attention of 20 heads of 112."""
    return diffusers.SanaTransformer2DModel(num_layers=20, sample_size=32, caption_channels=2304)


def lumina2() -> Any:
    """26 blocks of 2,304 channels, behind two refiners of each stream."""
    lengths = {"axes_lens": (300, 512, 512), "axes_dim_rope": (32, 32, 32)}
    return diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304, **lengths)


def z_image() -> Any:
    """The defaults: 30 blocks of 3,840 channels, and two refiners of each stream."""
    return diffusers.ZImageTransformer2DModel()


def klein() -> Any:
    """FLUX.2 klein of 4 B: 5 joint and 20 single blocks of 3,072 channels."""
    shape = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
    return diffusers.Flux2Transformer2DModel(
        **shape, joint_attention_dim=3 * 2560, guidance_embeds=False
    )


def chroma() -> Any:
    """The defaults: 19 joint and 38 single blocks of 3,072 channels."""
    return diffusers.ChromaTransformer2DModel()


def flux() -> Any:
    """The defaults, of dev: 19 joint and 38 single blocks of 3,072 channels, told of guidance."""
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def qwen_image() -> Any:
    """The defaults: 60 joint blocks of 3,072 channels."""
    return diffusers.QwenImageTransformer2DModel()


def wan() -> Any:
    """Wan 2.1 T2V, named 1.3 B and of 1.42: 30 blocks of 1,536 channels."""
    shape = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128}
    return diffusers.WanTransformer3DModel(**shape, ffn_dim=8960, text_dim=4096, freq_dim=256)


# -- the small rest --------------------------------------------------------------------------------


def vae(channels: int, cell: int = 8) -> Any:
    """Of latents [channels, H / cell, W / cell]."""
    levels = cell.bit_length()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * levels}
    widths = (32,) * levels
    return diffusers.AutoencoderKL(block_out_channels=widths, latent_channels=channels, **blocks)


def flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(block_out_channels=(32,) * 4, layers_per_block=1)


def deep_compression() -> Any:
    halves: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        halves[f"{half}_block_types"] = ("ResBlock",) * 6
        halves[f"{half}_block_out_channels"] = (32,) * 6
        halves[f"{half}_layers_per_block"] = (1,) * 6
        halves[f"{half}_qkv_multiscales"] = ((),) * 6
    return diffusers.AutoencoderDC(latent_channels=32, **halves)


def of_videos(kind: type) -> Any:
    return kind(base_dim=8, num_res_blocks=1)


def wider(encoder: Any, **sizes: Any) -> Any:
    """A text encoder like this one of other sizes."""
    config = encoder.config
    return type(encoder)(type(config)(**{**config.to_dict(), **sizes}))


def clips(pipeline: Any) -> dict[str, Any]:
    """CLIP L, and where there are two the bigger G."""
    found = {"text_encoder": wider(pipeline.text_encoder, hidden_size=768, projection_dim=768)}
    second = getattr(pipeline, "text_encoder_2", None)
    if isinstance(second, transformers.CLIPTextModelWithProjection):
        found["text_encoder_2"] = wider(second, hidden_size=1280, projection_dim=1280)
    return found


def of_sd3(pipeline: Any) -> dict[str, Any]:
    return {**clips(pipeline), "text_encoder_3": wider(pipeline.text_encoder_3, d_model=4096)}


def of_flux(pipeline: Any) -> dict[str, Any]:
    return {**clips(pipeline), "text_encoder_2": wider(pipeline.text_encoder_2, d_model=4096)}


def widened(**sizes: Any) -> Callable[[Any], dict[str, Any]]:
    """Changes the only text encoder."""
    return lambda pipeline: {"text_encoder": wider(pipeline.text_encoder, **sizes)}


def chat_glm(pipeline: Any) -> dict[str, Any]:
    encoder = wider(pipeline.text_encoder, hidden_size=4096)
    for name, parameter in encoder.named_parameters():
        if "layernorm" in name:  # they are made without values
            nn.init.ones_(parameter)
    return {"text_encoder": encoder}


def qwen_vl(pipeline: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {**families.QWEN, "hidden_size": 3584, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "rope_parameters": rope}
    vision = {**pipeline.text_encoder.config.vision_config.to_dict(), "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {"text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config)}


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A pipeline of full size.

    billions: weights of its denoiser, as its makers state them; of Wan those of its files.
    family: its row in `tests/families.py`.
    texts: its text encoders, from those of the tiny pipeline.
    channels, cell: of its latents; a latent is cell x cell pixels. Of videos: a quarter of the
        frames and one.
    """

    billions: float
    make: Callable[[], Any]
    teacher: str
    family: str
    texts: Callable[[Any], dict[str, Any]]
    vae: Callable[[], Any]
    channels: int = 16
    cell: int = 8
    words: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def four() -> Any:
    return vae(4)


def sixteen() -> Any:
    return vae(16)


T5 = widened(d_model=4096)
GEMMA = widened(hidden_size=2304)
QWEN = widened(hidden_size=2560)
OF_SANA = ("teacher.variant=null", "teacher.instruction=false")  # whose letters are too many
NETWORKS = {
    "sd15": Network(0.86, sd15, "sd15", "sd15", clips, four, 4),
    "sdxl": Network(2.6, sdxl, "sdxl", "sdxl", clips, four, 4),
    "sd3": Network(2.0, sd3, "sd3", "sd35", of_sd3, sixteen),
    "sd35_medium": Network(2.5, sd35_medium, "sd35_medium", "sd35", of_sd3, sixteen),
    "pixart": Network(0.6, pixart, "pixart_sigma", "pixart", T5, four, 4),
    "sana": Network(1.6, sana, "sana", "sana", GEMMA, deep_compression, 32, 32, OF_SANA),
    "kolors": Network(2.6, kolors, "kolors", "kolors", chat_glm, four, 4),
    "lumina2": Network(2.6, lumina2, "lumina2", "lumina2", GEMMA, sixteen),
    "z_image": Network(6.0, z_image, "z_image", "zimage", QWEN, sixteen),
    "klein": Network(4.0, klein, "flux2_klein_base", "flux2_klein", QWEN, flux2_vae, 128, 16),
    "chroma": Network(8.9, chroma, "chroma", "chroma", T5, sixteen),
    "flux": Network(12.0, flux, "flux", "flux", of_flux, sixteen),
    "wan": Network(
        1.42, wan, "wan", "wan", T5, lambda: of_videos(diffusers.AutoencoderKLWan)
    ),
    "qwen_image": Network(
        20.0, qwen_image, "qwen_image", "qwenimage", qwen_vl,
        lambda: of_videos(diffusers.AutoencoderKLQwenImage),
    ),
}  # fmt: skip


def denoiser_of(pipeline: Any) -> str:
    """The name of the denoiser in this pipeline."""
    return "unet" if "unet" in pipeline.components else "transformer"


def on_meta(name: str) -> Any:
    """The denoiser at its released configuration, without values."""
    with torch.device("meta"):
        return NETWORKS[name].make()


def write(name: str, folder: Path, *, full: bool = True, weights: bool = True) -> None:
    """Write the pipeline into this folder; without `weights` the denoiser's are left out."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    pipeline = (families.FAMILIES | families.OTHERS)[network.family].write()
    if full:
        pipeline.register_modules(**network.texts(pipeline), vae=network.vae())
    pipeline.to(DTYPE).save_pretrained(folder)
    if not full:
        return
    place = folder / denoiser_of(pipeline)
    for file in place.glob("*.safetensors"):  # of the tiny one
        file.unlink()
    net = on_meta(name)
    net.save_config(place)
    if weights:
        fill(net)
        net.save_pretrained(place)


def fill(net: nn.Module) -> None:
    """Give a network on the meta device random weights: faster than any initialisation."""
    noise = (SPREAD * torch.randn(NOISE)).to(DTYPE)
    state = {key: filled(key, x, noise) for key, x in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def filled(name: str, like: Tensor, noise: Tensor) -> Tensor:
    """Noise for a matrix, ones for a norm's scale, zeros for a bias."""
    if like.dim() < 2:
        values = torch.ones if name.endswith("weight") else torch.zeros
        return values(like.shape, dtype=DTYPE)
    found = torch.empty(like.shape, dtype=DTYPE)
    for part in found.view(-1).split(len(noise)):
        part.copy_(noise[: len(part)])
    return found


def latents_of(name: str, side: int, frames: int, *, full: bool = True) -> tuple[int, ...]:
    """The shape of latents for pictures of side x side pixels, of Wan for 832 x 480."""
    network = NETWORKS[name]
    if not full:
        return (4, 3, 4, 6) if name == "wan" else (4, 16, 16)
    if name == "wan":
        return network.channels, 1 + (frames - 1) // 4, 480 // network.cell, 832 // network.cell
    return network.channels, side // network.cell, side // network.cell


def words_of(name: str, folder: Path, side: int, frames: int, *, full: bool = True) -> list[str]:
    """What distill.run needs to read the pipeline."""
    network = NETWORKS[name]
    if not full:
        given = [w for w in families.words_of(network.family, folder) if "dtype" not in w]
        return [*given, "teacher.dtype=bfloat16"]
    words = [f"teacher={network.teacher}", f"teacher.path={folder}", *network.words]
    if name == "wan":
        return [*words, f"teacher.frames={frames}"]
    sized = name in ("z_image", "klein", "chroma", "flux", "qwen_image")
    return [*words, f"teacher.size={side}"] if sized else words
