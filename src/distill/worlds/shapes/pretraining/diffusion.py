"""The tiny teachers: an SD3-type MMDiT on the rectified flow, and an SD-type UNet that predicts
eps.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from distill.config.compose import shipped
from distill.data.write import write_latents
from distill.evaluation.shapes import generate_pictures
from distill.machine.hardware import autocast
from distill.sampling import seeded
from distill.sampling.guided import guided
from distill.teachers.attention import Attention
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd import SD
from distill.teachers.sd3 import SD3, SILENT_TOKENS
from distill.teachers.silent_token_attention import set_silent_token_attention, token_weights
from distill.terminal.progress import Bar, track
from distill.worlds.shapes.judge import judging_prompts
from distill.worlds.shapes.pretraining.asked import teaching_stage
from distill.worlds.shapes.pretraining.assemble import SCHEDULE, save_sd, save_sd3
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.text import tokenize
from distill.worlds.shapes.pretraining.work import PER_SHARD, Work
from distill.worlds.shapes.world import draw_prompt

DROP = 0.1  # share of captions emptied, for classifier-free guidance
# SD3 has (0, 1). Content is decided at t > 0.8, which has 23 % of these draws instead of 8 %.
TIME_MEAN, TIME_SPREAD = 0.5, 1.2
# (x0, eps, tokens, pooled, generator) -> loss
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Captions:
    """Embeddings of distinct captions, in half precision: `tokens` [N, L, D] and `pooled` [N, P].

    Row 0 is the empty caption. `rows` [samples] is the index of each sample's caption, counted
    without the empty one.
    """

    tokens: Tensor
    pooled: Tensor
    rows: Tensor

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and pooled of samples `index`, replaced by the empty caption's with probability
        DROP.
        """
        dropped = torch.rand(len(index), generator=generator) < DROP
        rows = torch.where(dropped, 0, self.rows[index] + 1)
        return self.tokens[rows].float().to(DEVICE), self.pooled[rows].float().to(DEVICE)


@torch.no_grad()
def encode_captions(
    clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str], *, layer: int
) -> Captions:
    """Hidden states of `layer` (-1: the last, after the final norm; -2: as in SD3) and pooled
    outputs.
    """
    number = {caption: i for i, caption in enumerate(sorted(set(captions)))}
    tokens, pooled = [], []
    batches = tokenize(tokenizer, ["", *number]).split(256)
    for ids in track(batches, "encoding captions", unit="batch"):
        output = clip.text_model(input_ids=ids, output_hidden_states=True)
        tokens.append(
            (output.last_hidden_state if layer == -1 else output.hidden_states[layer]).half()
        )
        pooled.append(clip.text_projection(output.pooler_output).half())
    return Captions(
        torch.cat(tokens),
        torch.cat(pooled),
        torch.tensor([number[caption] for caption in captions]),
    )


def build_mmdit(
    latent_side: int, text_width: int, *, layers: int = 5, heads: int = 3, head_dim: int = 48
) -> SD3Transformer2DModel:
    """`layers` joint blocks of width `heads * head_dim`. Text [L, 2D]: one encoder serves as both
    CLIPs.

    With heads of 48, 5 blocks of 3 heads have 3.7 M parameters, 3 of 3 have 2.2 M, 2 of 3 have
    1.4 M, 6 of 4 have 7.8 M.
    """
    image = {"sample_size": latent_side, "pos_embed_max_size": latent_side // 2, "patch_size": 2}
    blocks = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    text = {"joint_attention_dim": 2 * text_width, "pooled_projection_dim": 2 * text_width}
    text["caption_projection_dim"] = heads * head_dim
    net = SD3Transformer2DModel(
        in_channels=4, out_channels=4, qk_norm="rms_norm", **image, **blocks, **text
    )
    zero = (".norm1.linear.", ".norm1_context.linear.")
    for name, parameter in net.named_parameters():  # blocks start as the identity, the output as 0
        if any(part in name for part in zero) or name.startswith("proj_out."):
            nn.init.zeros_(parameter)
    return net


def build_unet(latent_side: int, text_width: int) -> UNet2DConditionModel:
    image = {"sample_size": latent_side, "in_channels": 4, "out_channels": 4}
    shape = {
        "block_out_channels": (48, 96),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "cross_attention_dim": text_width}
    net = UNet2DConditionModel(**image, **shape, **blocks)
    net.set_attn_processor(Attention())
    return net


def flow(
    side: int,
    length: int,
    width: int,
    *,
    taught_by: str | None = None,
    cut: bool = False,
    compiled: bool = False,
    **shape: int,
) -> tuple[nn.Module, Loss]:
    """An MMDiT, and E |v(x_t, t) - (eps - x0)|^2 with x_t = (1 - t) x0 + t eps, t = sigmoid(u), u ~
    N(0.5, 1.2).

    With `taught_by`, a pipeline folder, the target is the velocity of its MMDiT at the same x_t and
    caption. If that model is exact the expectation is the same, with less variance: a small network
    learns faster. `cut`: start from evenly chosen blocks of that MMDiT, not from random weights.
    `compiled`: torch.compile the blocks, which takes a minute once and needs a C++ compiler, then
    saves a third.
    """
    net = build_mmdit(side, width, **shape)
    counts = torch.cat([torch.ones(1, length), torch.full((1, 1), float(SILENT_TOKENS))], dim=1).to(
        DEVICE
    )
    velocity = _velocity(net, counts, image_tokens=(side // 2) ** 2)
    teacher, networks = None, [net]
    if taught_by is not None:
        frozen = SD3Transformer2DModel.from_pretrained(shipped(taught_by), subfolder="transformer")
        teacher = _velocity(
            frozen.requires_grad_(False).to(DEVICE), counts, image_tokens=(side // 2) ** 2
        )
        networks.append(frozen)
        if cut:
            start_from_blocks(net, frozen)
    if compiled:
        for network in networks:
            for block in network.transformer_blocks:
                block.compile()

    def loss(
        x0: Tensor, eps: Tensor, tokens: Tensor, pooled: Tensor, generator: torch.Generator
    ) -> Tensor:
        t = (
            (TIME_MEAN + TIME_SPREAD * torch.randn(len(x0), generator=generator))
            .sigmoid()
            .to(DEVICE)
        )
        x_t = torch.lerp(x0, eps, t[:, None, None, None])
        target = eps - x0 if teacher is None else teacher(x_t, t, tokens, pooled)
        return (velocity(x_t, t, tokens, pooled) - target).square().mean()

    return net, loss


def start_from_blocks(net: SD3Transformer2DModel, source: SD3Transformer2DModel) -> None:
    """Initialise `net` from evenly chosen blocks of `source`, which has more blocks of the same
    width.

    The last block is always included, because it has no text output.
    """
    blocks = len(net.transformer_blocks)
    chosen = np.linspace(0, len(source.transformer_blocks) - 1, blocks).round().astype(int).tolist()
    taken = {
        k: v for k, v in source.state_dict().items() if not k.startswith("transformer_blocks.")
    }
    for position, number in enumerate(chosen):
        for name, value in source.transformer_blocks[number].state_dict().items():
            taken[f"transformer_blocks.{position}.{name}"] = value
    net.load_state_dict(taken)


def _velocity(net: nn.Module, counts: Tensor, image_tokens: int) -> Callable[..., Tensor]:
    """A function (x_t [B, C, S, S], t [B], tokens [B, L, D], pooled [B, P]) -> v of `net`, in
    float32.

    One text encoder serves as both CLIPs. One token with a weight replaces those of the silent
    third.
    """
    processor = set_silent_token_attention(net)

    def velocity(x_t: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        text = F.pad(tokens.repeat(1, 1, 2), (0, 0, 0, 1))
        with token_weights(processor, counts, image_tokens):
            v = net(x_t, text, pooled_projections=pooled.repeat(1, 2), timestep=1000 * t).sample
        return v.float()

    return velocity


def noise(side: int, length: int, width: int) -> tuple[nn.Module, Loss]:
    """A UNet, and its `noise_loss`."""
    net = build_unet(side, width)
    return net, noise_loss(net)


def noise_loss(net: nn.Module) -> Loss:
    """E w |eps_hat - eps|^2 on SD's schedule, t uniform, w = min(1 / alphas_cumprod, 20).

    1 / alphas_cumprod is the loss on v (Salimans & Ho 2022). At high noise, where the content is
    decided, an error of eps is a large error of x0; with SD's w = 1 a small network hardly learns
    there. `beside` [B, C', H, W], an optional argument of the loss, is read beside the sample.
    """
    alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod.to(DEVICE)

    def loss(
        x0: Tensor,
        eps: Tensor,
        tokens: Tensor,
        pooled: Tensor,
        generator: torch.Generator,
        beside: Tensor | None = None,
    ) -> Tensor:
        t = torch.randint(1000, (len(x0),), generator=generator).to(DEVICE)
        signal = alphas_cumprod[t][:, None, None, None]
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
        read = x_t if beside is None else torch.cat([x_t, beside], 1)
        guess = net(read, t, encoder_hidden_states=tokens).sample.float()
        return ((1 / signal).clamp(max=20) * (guess - eps).square()).mean()

    return loss


TEACHERS = {  # stage -> text encoder layer, functions to build and save, teacher class
    "mmdit": (-2, flow, save_sd3, SD3),
    "mmdit_small": (-2, flow, save_sd3, SD3),
    "mmdit_tiny": (-2, flow, save_sd3, SD3),
    "mmdit_large": (-2, flow, save_sd3, SD3),
    "unet": (-1, noise, save_sd, SD),
}


def train(work: Work, stage: str) -> dict[str, Any]:
    layer, build, save, family = TEACHERS[stage]
    clip = CLIPModel.from_pretrained(work.train / "clip").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(work.train / "tokenizer")
    captions = encode_captions(clip, tokenizer, work.captions, layer=layer)
    latents, fit = work.latents, work.fit(stage)
    torch.manual_seed(fit.seed)
    options = dict(work.asked["networks"].get(stage, {}))
    if teaching_stage(work.asked, stage):
        options["taught_by"] = str(work.models / options["taught_by"])
    net, loss = build(latents.shape[-1], *captions.tokens.shape[1:], **options)

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x0 = latents[index].float()
        eps = torch.randn(x0.shape, generator=generator)
        return {
            "mse": loss(x0.to(DEVICE), eps.to(DEVICE), *captions.draw(index, generator), generator)
        }

    fit(net, objective, samples=len(latents))
    save(net, work.vae, clip, tokenizer, work.models / stage)
    if work.of_shapes:
        judge(work, stage, family(str(work.models / stage)))
    return {"seconds": fit.seconds}


def judge(work: Work, stage: str, teacher: PipelineTeacher) -> None:
    """Record prompt accuracy at each guidance and at one step; each value is written at once."""
    asked, reader = work.asked["scoring"], work.judge
    n, guidances = asked["prompts"], [(asked["steps"], guidance) for guidance in asked["guidance"]]
    for steps, guidance in [*guidances, (1, work.asked["shards"]["guidance"])]:
        name = f"{steps} steps, guidance {guidance:g}"
        known = work.stage(stage).get("prompt_accuracy", {})
        if name not in known:
            sampler = partial(
                guided, teacher, shape=teacher.latent_shape, steps=steps, guidance=guidance
            )
            shares = {}
            for sort in ("training", "held_out"):
                prompts = judging_prompts(n, seed=0, held_out=sort == "held_out")
                what = f"{stage}: judging {name}, {sort.replace('_', ' ')} prompts"
                with Bar(what, n, unit="image", rate="images") as bar:
                    answers = reader.read(
                        generate_pictures(teacher, sampler, prompts, range(n), bar)
                    )[1]
                shares[sort] = round(reader.accuracy(answers, prompts)["prompt_accuracy"], 4)
            work.note(stage, prompt_accuracy=known | {name: shares})


def write_own(work: Work, batch: int = 32) -> dict[str, Any]:
    """Write latents of `mmdit` for new captions of `shapes`, or for the user's in turn; the seed is
    the index.

    WebDataset shards; existing ones stay. Larger batches exceed a CPU's caches and take twice as
    long.
    """
    asked, seed, folder = work.asked["shards"], work.data["seed"], work.models / "latents"
    if work.of_shapes:
        captions = [
            draw_prompt(np.random.default_rng([seed + 2, i])).caption for i in range(asked["count"])
        ]
    else:
        captions = [work.captions[i % len(work.captions)] for i in range(asked["count"])]
    teacher = SD3(str(work.models / "mmdit"))

    def samples(numbers: range) -> Iterator[tuple[str, np.ndarray, str]]:
        what = f"drawing latents {numbers[0]} to {numbers[-1]}"
        for start in track(numbers[::batch], what, unit="batch"):
            seeds = range(start, min(start + batch, numbers.stop))
            with autocast(work.asked["precision"], teacher.device.type):
                cond = teacher.embed([captions[i] for i in seeds])
                options = {k: asked[k] for k in ("steps", "guidance")}
                options["shape"] = teacher.latent_shape
                latents = guided(teacher, cond, seeded(seeds), **options)
            for i, latent in zip(seeds, latents, strict=True):
                yield f"{i:06d}", latent.half().cpu().numpy(), captions[i]

    for number, start in enumerate(range(0, len(captions), PER_SHARD)):
        if not (folder / f"latents-{number:06d}.tar").exists():
            numbers = range(start, min(start + PER_SHARD, len(captions)))
            (part,) = write_latents(str(folder / "part" / "%06d.tar"), samples(numbers), PER_SHARD)
            Path(part).replace(folder / f"latents-{number:06d}.tar")
    shutil.rmtree(folder / "part", ignore_errors=True)
    return {"latents": asked["count"]}
