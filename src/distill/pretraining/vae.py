"""A small KL autoencoder: pictures [-1, 1] of side S <-> latents [4, S/4, S/4]."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill.pretraining.fit import DEVICE, Budget, fit

KL_WEIGHT = 1e-4  # per latent dimension; keeps latents bounded without visible blur


def build(side: int) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=side,
        latent_channels=4,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def train(pictures: Tensor, budget: Budget, *, out: Path, seed: int = 0) -> tuple[AutoencoderKL, dict[str, float]]:
    """`pictures` uint8 [N, 3, S, S] -> autoencoder with latents of mean 0, deviation 1; PSNR on the last 1 %."""
    torch.manual_seed(seed)
    held = max(64, len(pictures) // 100)
    train_set, test_set = pictures[:-held], pictures[-held:]
    vae = build(pictures.shape[-1])

    def objective(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(train_set), (budget.batch_size,), generator=generator)
        x = train_set[index].to(DEVICE).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        fake = vae.decode(posterior.sample(generator=generator)).sample.float()
        error = fake - x
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return {"l1": error.abs().mean(), "l2": 2 * error.square().mean(), "kl": KL_WEIGHT * kl}

    seconds = fit("vae", vae, objective, budget, out=out, seed=seed)
    vae.eval().requires_grad_(False)
    standardise(vae, encode(vae, train_set[:2048], raw=True))
    return vae, {"psnr_db": psnr(vae, test_set), "seconds": seconds}


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 by rewriting the two 1x1 convolutions around the latents.

    Pictures in and out stay the same. Diffusers' single `scaling_factor` cannot do it: channels differ threefold, and a
    diffusion model would see the weak ones only under little noise.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    enter, leave = vae.quant_conv, vae.post_quant_conv
    leave.bias += (leave.weight[:, :, 0, 0] * mean).sum(1)
    leave.weight *= deviation[None, :, None, None]
    both = torch.cat([deviation, torch.ones_like(deviation)])  # moments are means, then log variances
    enter.weight /= both[:, None, None, None]
    enter.bias.copy_(torch.cat([(enter.bias[:4] - mean) / deviation, enter.bias[4:] - 2 * deviation.log()]))
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, *, raw: bool = False, batch: int = 128) -> Tensor:
    """uint8 pictures [N, 3, S, S] -> latents [N, 4, S/4, S/4]: posterior means, scaled unless `raw`."""
    chunks = [vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in pictures.split(batch)]
    latents = torch.cat(chunks)
    return latents if raw else (latents - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents of any precision [N, 4, S/4, S/4] -> uint8 pictures [N, 3, S, S]."""
    return ((vae.decode(latents.float()).sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean over pictures of 10 log10(range^2 / MSE), in dB."""
    errors = []
    for part in pictures.split(128):
        x = part.float() / 127.5 - 1
        fake = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((fake - x).square().mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())
