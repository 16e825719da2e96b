"""Speed and memory of training on networks of full size with random weights, so that nothing is
downloaded.

    python benchmarks/full_size.py [networks=sd3,sdxl,flux] [sizes=512,1024] [steps=8] \
        [any overrides of distill.run]

sd3 is SD3-medium (2.0 B), sdxl SDXL (2.6 B), flux FLUX.1's layout with half of its blocks (6 B),
which is trained as a LoRA. Each runs LADD in bfloat16 on latents of noise (the method does not
mind), 4 a step. Passes and steps take turns, as in step_time.py. A row of the table has the step,
its passes, the quotient, the share of the card's matrix product in bfloat16 that the passes'
operations reach in a step, and the peak of the allocator.

`small` shrinks every network, to try the script itself.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from common import TOKENIZER, noise_latents
from step_time import measure

from distill.machine.hardware import hardware

Pipeline = diffusers.DiffusionPipeline
BATCH = 4


def vae(channels: int) -> diffusers.AutoencoderKL:
    """A small one: latents are given, and nothing is decoded."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4}
    blocks |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = (32, 32, 32, 32)
    return diffusers.AutoencoderKL(block_out_channels=widths, latent_channels=channels, **blocks)


def clip(kind: type, width: int, layers: int, heads: int) -> transformers.PreTrainedModel:
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"projection_dim": width, "intermediate_size": 4 * width}
    return kind(transformers.CLIPTextConfig(**shape))


def tokenizer() -> transformers.CLIPTokenizer:
    return transformers.CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)


def sd3(small: bool) -> Pipeline:
    kind = transformers.CLIPTextModelWithProjection
    shapes = [(64, 1, 2), (64, 1, 2)] if small else [(768, 12, 12), (1280, 32, 20)]
    texts = [clip(kind, *shape) for shape in shapes]
    blocks = 2 if small else 24
    net = diffusers.SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=blocks,
        num_attention_heads=blocks,
        attention_head_dim=64,
        caption_projection_dim=64 * blocks,
        joint_attention_dim=4096,
        pooled_projection_dim=sum(text.config.projection_dim for text in texts),
        pos_embed_max_size=192,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=net,
        vae=vae(16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        text_encoder_3=None,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=None,
    )


def sdxl(small: bool) -> Pipeline:
    shapes = [(64, 1, 2), (64, 1, 2)] if small else [(768, 12, 12), (1280, 32, 20)]
    kinds = [transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection]
    texts = [clip(kind, *shape) for kind, shape in zip(kinds, shapes, strict=True)]
    net = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(32, 64, 64) if small else (320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1) if small else (1, 2, 10),
        attention_head_dim=(2, 2, 2) if small else (5, 10, 20),
        cross_attention_dim=sum(text.config.hidden_size for text in texts),
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + texts[1].config.projection_dim,
        use_linear_projection=True,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.StableDiffusionXLPipeline(
        unet=net,
        vae=vae(4),
        scheduler=diffusers.EulerDiscreteScheduler(**schedule),
        text_encoder=texts[0],
        text_encoder_2=texts[1],
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        add_watermarker=False,
    )


def flux(small: bool) -> Pipeline:
    width = 64 if small else 4096
    text = {"d_model": width, "d_kv": 64, "d_ff": 2 * width, "num_layers": 1, "num_heads": 4}
    net = diffusers.FluxTransformer2DModel(
        num_layers=1 if small else 9,
        num_single_layers=1 if small else 19,
        num_attention_heads=2 if small else 24,
        joint_attention_dim=width,
        pooled_projection_dim=64 if small else 768,
        guidance_embeds=True,
    )
    shape = (64, 1, 2) if small else (768, 12, 12)
    return diffusers.FluxPipeline(
        transformer=net,
        vae=vae(16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip(transformers.CLIPTextModel, *shape),
        tokenizer=tokenizer(),
        text_encoder_2=transformers.T5EncoderModel(transformers.T5Config(**text)),
        tokenizer_2=tokenizer(),
    )


# name -> the pipeline, the channels of its latents, and what its run needs
NETWORKS = {
    "sd3": (sd3, 16, ["teacher=sd3", "teacher.without=[text_encoder_3,tokenizer_3]"]),
    "sdxl": (sdxl, 4, ["teacher=sdxl"]),
    "flux": (flux, 16, ["teacher=flux", "student=lora"]),
}


def write(name: str, folder: Path, small: bool) -> list[str]:
    """Write the pipeline with random weights; returns what distill.run needs to read it."""
    build, _, words = NETWORKS[name]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = build(small)
    pipeline.to(torch.bfloat16).save_pretrained(folder / "teacher")
    return [*words, f"teacher.path={folder / 'teacher'}"]


def peak_rate() -> float:
    """Operations a second of a product of 8192 x 8192 matrices in bfloat16."""
    side = 8192 if torch.cuda.is_available() else 512
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    wait()
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    wait()
    return 10 * 2 * side**3 / (time.perf_counter() - began)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(name: str, size: int, words: list[str], steps: int, rate: float) -> str:
    try:
        found = measure(words, steps)
    except torch.OutOfMemoryError:
        return f"| {name} | {size} | out of memory | | | | |"
    ratio, share = found.step / found.unavoidable, found.turns.operations / found.step / rate
    peak = "-" if found.peak is None else f"{found.peak / 2**30:.1f} GiB"
    times = f"{found.step:.3f} s | {found.unavoidable:.3f} s | {ratio:.2f}"
    return f"| {name} | {size} | {times} | {share:.0%} | {peak} |"


def main(arguments: list[str]) -> None:
    small = "small" in arguments
    own = ("networks", "sizes", "steps")
    given = dict(word.split("=", 1) for word in arguments if word.split("=")[0] in own)
    overrides = [w for w in arguments if w != "small" and w.split("=")[0] not in own]
    sizes = given.get("sizes", "512,1024").split(",")
    rate = peak_rate()
    print(f"{hardware()}; torch {torch.__version__}; product {rate / 1e12:.0f} TFLOP/s", flush=True)
    print("| network | pixels a side | step | passes | quotient | share of peak | memory |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in given.get("networks", ",".join(NETWORKS)).split(","):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            words: list[Any] = write(name, folder, small)
            for size in map(int, sizes):
                side = size // 8
                data = noise_latents(folder, (NETWORKS[name][1], side, side))
                run = [*words, *data, "method=ladd", f"data.batch_size={BATCH}"]
                run += ["trainer.precision=bf16-mixed", *overrides]
                print(row(name, size, run, int(given.get("steps", 8)), rate), flush=True)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
