"""Edit pairs of `shapes`, and a UNet that edits: one of text to image that also reads a source.

As InstructPix2Pix (arXiv 2211.09800) does it: the added input channels start at zero, so training
starts at the text-to-image model; instruction, source, or both are dropped, so that both guide.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from distill.config.compose import shipped
from distill.data.edit_pairs import EditPairs
from distill.data.write import write_pairs
from distill.evaluation.shapes_edit import edited
from distill.sampling.guided import guided
from distill.teachers.attention import Attention
from distill.teachers.edit import InstructPix2Pix
from distill.teachers.sd import SD
from distill.terminal.progress import Bar, track
from distill.worlds.shapes.edit_judge import EditJudge, judging_edits
from distill.worlds.shapes.edits import sample_edit
from distill.worlds.shapes.pretraining.assemble import save_half
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import PER_SHARD, Work
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import SIDE

DROP = 0.05  # share of instructions alone, of sources alone, and of both, as in InstructPix2Pix
BATCH = 32  # pictures encoded or generated at a time
MOST_WEIGHT = 20.0  # of the loss, as for `unet`


def write_edits(work: Work) -> dict[str, Any]:
    """Write edit i of the seed as pair i: shards in `<out>/edits`."""
    asked = work.asked["edit_pairs"]

    def samples() -> Iterator[tuple[str, np.ndarray, np.ndarray, str, dict]]:
        numbers = range(asked["count"])
        for i in track(numbers, "edits: drawing", unit="pair", rate="pairs"):
            edit = sample_edit(asked["seed"], i)
            source, target = render([edit.source, edit.target])
            yield f"{i:06d}", source, target, edit.instruction, {"task": edit.task}

    write_pairs(str(work.out / "edits" / "edits-%06d.tar"), samples(), PER_SHARD)
    return {"pairs": asked["count"]}


def with_source(unet: nn.Module) -> nn.Module:
    """The UNet with as many more input channels, of weight zero: the same function of the first."""
    config = {k: v for k, v in unet.config.items() if not k.startswith("_")}
    channels = config["in_channels"]
    wider = type(unet)(**{**config, "in_channels": 2 * channels})
    state = dict(unet.state_dict())
    old = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([old, torch.zeros_like(old)], 1)
    wider.load_state_dict(state)
    wider.set_attn_processor(Attention())
    return wider.requires_grad_(True)


@torch.no_grad()
def encoded(base: SD, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs in half precision: scaled latents of targets, unscaled ones of sources, [N, C, h,
    w]; tokens [M + 1, L, D] of the empty and of all distinct instructions, and the row [N] of each
    pair's instruction.
    """
    data, kept = EditPairs(str(folder), size=SIDE), []
    number: dict[str, int] = {"": 0}
    rows = []
    for start in track(range(0, len(data), BATCH), "edits: encoding", unit="batch"):
        items = [data[i] for i in range(start, min(start + BATCH, len(data)))]
        target, source = (torch.stack([item[n] for item in items]) for n in ("pixels", "source"))
        kept.append((base.encode(target).half(), base._latents(source).half()))
        rows += [number.setdefault(item["caption"], len(number)) for item in items]
    texts = [list(number)[i : i + 256] for i in range(0, len(number), 256)]
    tokens = torch.cat([base.embed(part).tokens.half() for part in texts])
    targets, sources = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return targets, sources, tokens, torch.tensor(rows)


def train(work: Work) -> dict[str, Any]:
    """Fine-tune; the result is a `StableDiffusionInstructPix2PixPipeline` in `models/unet_edit`."""
    base, fit = SD(shipped(work.asked["networks"]["unet_edit"]["start"])), work.fit("unet_edit")
    targets, sources, tokens, rows = encoded(base, work.out / "edits")
    alphas_cumprod = base.pipeline.scheduler.alphas_cumprod.to(DEVICE)
    torch.manual_seed(fit.seed)
    net = with_source(base.pipeline.unet)

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x0, image = (x[index].float().to(DEVICE) for x in (targets, sources))
        eps = torch.randn(x0.shape, generator=generator).to(DEVICE)
        t = torch.randint(1000, (len(x0),), generator=generator).to(DEVICE)
        drawn = (torch.rand(len(index), generator=generator) / DROP).floor()
        no_text, no_source = (drawn == 0) | (drawn == 2), (drawn == 1) | (drawn == 2)
        text = tokens[torch.where(no_text, 0, rows[index])].float().to(DEVICE)
        image = image * (~no_source).view(-1, 1, 1, 1).to(DEVICE)
        signal = alphas_cumprod[t][:, None, None, None]
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
        guess = net(torch.cat([x_t, image], 1), t, encoder_hidden_states=text).sample.float()
        weight = (1 / signal).clamp(max=MOST_WEIGHT)
        return {"mse": (weight * (guess - eps).square()).mean()}

    fit(net, objective, samples=len(targets))
    save(net, base, work.models / "unet_edit")
    judge(work, InstructPix2Pix(str(work.models / "unet_edit")))
    return {"seconds": fit.seconds}


def save(net: nn.Module, base: SD, folder: Path) -> None:
    """Write the pipeline: this UNet, and the other parts of `base`."""
    parts = base.pipeline.components
    named = ("vae", "text_encoder", "tokenizer", "scheduler")
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
        unet=net, **{name: parts[name] for name in named}, **absent
    )
    save_half(pipeline, folder)


def judge(work: Work, teacher: InstructPix2Pix) -> None:
    """Record the scores at each pair of guidances; each row is written at once."""
    asked, edits = work.asked["scoring"], judging_edits(work.asked["scoring"]["prompts"], seed=0)
    judge = EditJudge.load()
    for guidance in asked["guidance"]:
        for image_guidance in asked["image_guidance"]:
            name = f"{asked['steps']} steps, guidance {guidance:g} and {image_guidance:g}"
            known = work.stage("unet_edit").get("edits", {})
            if name in known:
                continue
            scales = {"guidance": guidance, "image_guidance": image_guidance}
            options = {"shape": teacher.latent_shape, "steps": asked["steps"], **scales}
            with Bar(f"unet_edit: judging {name}", len(edits), unit="image") as bar:
                sample = partial(guided, teacher, **options)
                pictures = edited(teacher, sample, edits, range(len(edits)), bar)
            scores = {k: round(v, 4) for k, v in judge(pictures, edits).items()}
            work.note("unet_edit", edits=known | {name: scores})
