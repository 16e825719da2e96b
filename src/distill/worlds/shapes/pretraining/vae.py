"""A small KL autoencoder: pictures [-1, 1] of side S <-> latents [4, S/4, S/4]."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill.storage.atomic import atomic_folder
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import Work, pixels

BATCH = 32  # pictures at a time; larger batches exceed a CPU's caches and take twice as long
KL_WEIGHT = 1e-4  # per latent dimension; keeps latents bounded without visible blur


def build(side: int) -> AutoencoderKL:
    shape = {
        "block_out_channels": (24, 48, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 4,
    }
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    return AutoencoderKL(sample_size=side, **shape, **blocks)


def train(work: Work) -> dict[str, Any]:
    """Train with L1 + 2 L2 + KL; then standardise the latents.

    Score: PSNR, 10 log10(range^2 / MSE) in dB, on the last 1 %.
    """
    pictures, fit = work.pictures, work.fit("vae")
    torch.manual_seed(fit.seed)
    vae = build(pictures.shape[-1])
    learnt = len(pictures) - max(64, len(pictures) // 100)

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = pixels(pictures[index].to(DEVICE))
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator=generator)).sample.float() - x
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return {"l1": error.abs().mean(), "l2": 2 * error.square().mean(), "kl": KL_WEIGHT * kl}

    fit(vae, objective, samples=learnt)
    standardise(vae, encode(vae, pictures[: min(learnt, 2048)]))
    with atomic_folder(work.train / "vae") as part:
        vae.save_pretrained(part)
    parts = pictures[learnt:].split(128)
    errors = [vae.decode(encode(vae, part)).sample.clamp(-1, 1) - pixels(part) for part in parts]
    psnr = 10 * torch.log10(4 / torch.cat(errors).square().mean((1, 2, 3)))
    return {"psnr_db": float(psnr.mean()), "seconds": fit.seconds}


@torch.no_grad()
def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1, by rewriting the 1x1 convolutions around
    the latents.

    The reconstruction is unchanged. Diffusers' single `scaling_factor` cannot do this: channels
    differ threefold, and a diffusion model would see the weak ones only at low noise.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    enter, leave = vae.quant_conv, vae.post_quant_conv
    leave.bias += (leave.weight[:, :, 0, 0] * mean).sum(1)
    leave.weight *= deviation[None, :, None, None]
    both = torch.cat([deviation, torch.ones_like(deviation)])  # moments: means, log variances
    enter.weight /= both[:, None, None, None]
    enter.bias.copy_(
        torch.cat([(enter.bias[:4] - mean) / deviation, enter.bias[4:] - 2 * deviation.log()])
    )
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """uint8 pictures [N, 3, S, S] -> latents [N, 4, S/4, S/4]: posterior means, already
    standardised. They are computed where the autoencoder is, and are on the CPU.
    """
    parts = (pixels(part.to(vae.device)) for part in pictures.split(BATCH))
    return torch.cat([vae.encode(part).latent_dist.mode().cpu() for part in parts])
