"""What real models take by the default settings, counted on meta tensors: the table of the README.

    python benchmarks/memory.py

Parameters are those of diffusers' and transformers' classes at the released configurations, in
bfloat16; a picture's decoding is the most that tensors have at one time (`distill.machine.memory`),
without the weights and without workspaces of kernels. No weights are read, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers

from distill.core.limits import at_once
from distill.machine.memory import peak

GIB = 2**30
DTYPE = torch.bfloat16


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(**options)


def sd15() -> Any:
    return unet(sample_size=64, cross_attention_dim=768)


def sdxl() -> Any:
    return unet(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=192,
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def autoencoder(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
    )


def clip_l() -> Any:
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape))


def clip_g() -> Any:
    shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
    config = transformers.CLIPTextConfig(**shape, num_hidden_layers=32, projection_dim=1280)
    return transformers.CLIPTextModelWithProjection(config)


def t5() -> Any:
    shape = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24}
    return transformers.T5EncoderModel(
        transformers.T5Config(**shape, feed_forward_proj="gated-gelu", vocab_size=32128)
    )


# Name -> denoiser, text encoders, channels of the latents, pixels a side.
MODELS: dict[str, tuple[Callable[[], Any], list[Callable[[], Any]], int, int]] = {
    "SD 1.5": (sd15, [clip_l], 4, 512),
    "SDXL": (sdxl, [clip_l, clip_g], 4, 1024),
    "SD3 medium": (sd3, [clip_l, clip_g, t5], 16, 1024),
    "FLUX": (flux, [clip_l, t5], 16, 1024),
}


def parameters(make: Callable[[], Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def decoding(channels: int, side: int, many: int) -> int:
    """Bytes that decoding takes at one time, beside the weights."""
    with torch.device("meta"):
        vae = autoencoder(channels).to(DTYPE).eval()
        latents = torch.empty(many, channels, side // 8, side // 8, dtype=DTYPE)
    return peak(lambda: vae.decode(latents).sample)


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    heads = (
        "",
        "denoiser",
        "full student",
        "text encoders",
        "autoencoder",
        "decoding",
        "16 at once",
    )
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for name, (denoiser, texts, channels, side) in MODELS.items():
        count = parameters(denoiser)
        numbers = [
            count * 2,
            count * 22,
            2 * sum(map(parameters, texts)),
            2 * parameters(lambda channels=channels: autoencoder(channels)),
            decoding(channels, side, at_once(side, side)),
            decoding(channels, side, 16),
        ]
        print(f"| {name} | " + " | ".join(f"{number / GIB:.1f}" for number in numbers) + " |")


if __name__ == "__main__":
    main()
