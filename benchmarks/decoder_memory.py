"""Memory of ADD's way from latents through the decoder and DINOv2 ViT-S to a gradient, with each
way to save some.

    python benchmarks/decoder_memory.py [pixels a side, 512] [pictures, 1]

Random weights of SD's sizes (decoder 49 M parameters, ViT-S 22 M): nothing is downloaded. Every way
runs in a process of its own: peak memory is the GPU's own count, or else the process's largest size
less what it had before the forward.
"""

from __future__ import annotations

import subprocess
import sys
import time

import resident
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from transformers import Dinov2Config, Dinov2Model

WAYS = ("plain", "checkpointing, block by block", "random crop of a quarter", "tiny decoder")


def megabytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident.peak() / 2**20


def measure(way: str, side: int, count: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if way == "tiny decoder":
        vae = AutoencoderTiny()
    else:
        widths = (128, 256, 512, 512)
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        vae = AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks
        )
        del vae.encoder
    eyes = Dinov2Model(
        Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    )
    for network in (vae, eyes):
        network.to(device).eval().requires_grad_(False)
    if way.startswith("checkpointing"):
        vae.enable_gradient_checkpointing()
    cells = side // 8 // (2 if way.startswith("random") else 1)
    x = torch.randn(count, 4, cells, cells, device=device, requires_grad=True)

    before, began = megabytes(), time.perf_counter()
    pixels = torch.nn.functional.interpolate(
        vae.decode(x).sample, size=(224, 224), mode="bilinear", antialias=True
    )
    sum(h.square().mean() for h in eyes(pixels, output_hidden_states=True).hidden_states).backward()
    assert x.grad.abs().max() > 0
    print(f"| {way} | {megabytes() - before:,.0f} | {time.perf_counter() - began:.1f} |")


def main() -> None:
    megabytes()  # a system that does not tell it ends here
    side, count = (int(a) for a in [*sys.argv[1:], *("512", "1")[len(sys.argv) - 1 :]])
    print(f"{count} of {side}x{side}\n\n| way | MB | seconds |\n|---|---|---|", flush=True)
    for way in WAYS:
        subprocess.run(
            [sys.executable, __file__, "measure", way, str(side), str(count)], check=True
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
