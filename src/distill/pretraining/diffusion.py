"""The two tiny teachers: an SD3-type MMDiT on the rectified flow, and an SD-type UNet that predicts noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPModel

from distill.pretraining.fit import DEVICE, Budget, fit
from distill.teachers.folded import fold, weights

DROP = 0.1  # share of captions emptied, for classifier-free guidance
SILENT_TOKENS = 256  # the pipeline's default number of third-encoder tokens, all zero here
# SD3 has (0, 1). What a picture shows is decided at t > 0.8, which these draw 23 % of the time instead of 8 %.
TIME_MEAN, TIME_SPREAD = 0.5, 1.2
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Captions:
    """Encoded captions, half precision: `tokens` [N, L, D] and `pooled` [N, P]; row 0 is the empty caption."""

    tokens: Tensor
    pooled: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows index + 1, or the empty caption's with probability DROP."""
        dropped = torch.rand(len(index), generator=generator) < DROP
        rows = torch.where(dropped, 0, index + 1)
        return self.tokens[rows].float().to(DEVICE), self.pooled[rows].float().to(DEVICE)


@torch.no_grad()
def encode_captions(clip: CLIPModel, ids: Tensor, *, layer: int) -> Captions:
    """Token ids [N, L] -> hidden states of `layer` (-1: the last, after the final norm; -2: as SD3 uses) and pooled."""
    tokens, pooled = [], []
    for part in track(ids.split(256), description="captions"):
        output = clip.text_model(input_ids=part, output_hidden_states=True)
        tokens.append((output.last_hidden_state if layer == -1 else output.hidden_states[layer]).half())
        pooled.append(clip.text_projection(output.pooler_output).half())
    return Captions(torch.cat(tokens), torch.cat(pooled))


def build_mmdit(latent_side: int, text_width: int) -> SD3Transformer2DModel:
    """3.7 M parameters: 5 joint blocks, width 144. Text [L, 2D]: one encoder in both CLIP places."""
    net = SD3Transformer2DModel(
        sample_size=latent_side,
        pos_embed_max_size=latent_side // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        num_attention_heads=3,
        attention_head_dim=48,
        caption_projection_dim=144,
        joint_attention_dim=2 * text_width,
        pooled_projection_dim=2 * text_width,
        qk_norm="rms_norm",
    )
    for name, module in net.named_modules():  # every block starts as the identity, the network as zero
        if isinstance(module, nn.Linear) and (
            name.endswith(("norm1.linear", "norm1_context.linear")) or name == "proj_out"
        ):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return net


def build_unet(latent_side: int, text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def train_mmdit(
    latents: Tensor, captions: Captions, budget: Budget, *, out: Path, seed: int = 0
) -> tuple[nn.Module, float]:
    """E |v(x_t, t) - (eps - x0)|^2 with x_t = (1 - t) x0 + t eps and t = sigmoid(u), u ~ N(0.5, 1.2)."""
    torch.manual_seed(seed)
    net = build_mmdit(latents.shape[-1], captions.tokens.shape[-1])
    folded = fold(net)
    silent = torch.zeros(budget.batch_size, 1, 2 * captions.tokens.shape[-1], device=DEVICE)
    counts = torch.cat([torch.ones(1, captions.tokens.shape[1]), torch.full((1, 1), float(SILENT_TOKENS))], dim=1)
    counts = counts.to(DEVICE)
    image_tokens = (latents.shape[-1] // 2) ** 2

    def objective(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x0, eps, index = _draw(latents, budget.batch_size, generator)
        tokens, pooled = captions.draw(index, generator)
        t = (TIME_MEAN + TIME_SPREAD * torch.randn(len(x0), generator=generator)).sigmoid().to(DEVICE)
        x_t = torch.lerp(x0, eps, t[:, None, None, None])
        with weights(folded, counts, image_tokens):
            v = net(
                x_t,
                encoder_hidden_states=torch.cat([tokens.repeat(1, 1, 2), silent], dim=1),
                pooled_projections=pooled.repeat(1, 2),
                timestep=1000 * t,
            ).sample
        return {"mse": (v.float() - (eps - x0)).square().mean()}

    return net, fit("mmdit", net, objective, budget, out=out, seed=seed)


def train_unet(
    latents: Tensor, captions: Captions, budget: Budget, *, out: Path, seed: int = 0
) -> tuple[nn.Module, float]:
    """E w |eps_hat - eps|^2 on SD's schedule, t uniform, w = min(1 / alphas_cumprod, 20).

    1 / alphas_cumprod is the loss on v (Salimans & Ho 2022): at high noise, where a picture's content is decided, an
    error of eps is a large error of x0, and SD's w = 1 teaches a small network next to nothing there.
    """
    torch.manual_seed(seed)
    net = build_unet(latents.shape[-1], captions.tokens.shape[-1])
    alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)

    def objective(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        x0, eps, index = _draw(latents, budget.batch_size, generator)
        tokens, _ = captions.draw(index, generator)
        t = torch.randint(1000, (len(x0),), generator=generator).to(DEVICE)
        signal = alphas_cumprod[t][:, None, None, None]
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
        guess = net(x_t, t, encoder_hidden_states=tokens).sample.float()
        weight = (1 / signal).clamp(max=20)
        return {"mse": (weight * (guess - eps).square()).mean()}

    return net, fit("unet", net, objective, budget, out=out, seed=seed)


def _draw(latents: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.randint(len(latents), (size,), generator=generator)
    x0 = latents[index].float()
    return x0.to(DEVICE), torch.randn(x0.shape, generator=generator).to(DEVICE), index
