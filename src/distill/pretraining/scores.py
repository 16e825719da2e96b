"""What the trained parts are worth on `shapes`: numbers for the model card."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from rich.progress import track
from torch import Tensor
from transformers import Dinov2Model

from distill.pretraining.material import single_things
from distill.pretraining.vit import neighbour_accuracy
from distill.sampling import guided, seeded
from distill.shapes.judge import Judge, fresh_renders, judging_prompts
from distill.shapes.world import Prompt
from distill.teachers.network import PipelineTeacher

BATCH = 100  # pictures at a time
READER_SEED = 5  # apart from the seeds that students are judged with


@torch.no_grad()
def reader_accuracy(judge: Judge, vae: AutoencoderKL, n: int) -> dict[str, dict[str, float]]:
    """Shares of right answers about n fresh renders, and about the autoencoder's copies of them."""
    prompts = judging_prompts(n, seed=READER_SEED)
    renders = fresh_renders(prompts, seed=READER_SEED)
    parts = track(renders.split(BATCH), description="reader: judging")
    copies = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in parts])
    return {
        name: _rounded(judge.accuracy(judge.read(pixels)[1], prompts))
        for name, pixels in (("renders", renders), ("copies", copies))
    }


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items() if value == value}  # nan: no prompt says any


@torch.no_grad()
def teacher_accuracy(
    teacher: PipelineTeacher, judge: Judge, n: int, *, held_out: bool, steps: int, guidance: float
) -> float:
    """Share of n pictures, one a prompt, that show all that their prompt says."""
    prompts = judging_prompts(n, seed=0, held_out=held_out)
    pictures = []
    title = f"judging: {steps} steps, guidance {guidance:g}{', held-out' * held_out}"
    for start in track(range(0, n, BATCH), description=title):
        part = prompts[start : start + BATCH]
        pictures.append(_pictures(teacher, part, start, steps=steps, guidance=guidance))
    answers = judge.read(torch.cat(pictures))[1]
    return round(judge.accuracy(answers, prompts)["prompt_accuracy"], 4)


def _pictures(teacher: PipelineTeacher, prompts: list[Prompt], start: int, *, steps: int, guidance: float) -> Tensor:
    latents = guided(
        teacher,
        teacher.embed([p.caption for p in prompts]),
        seeded(range(start, start + len(prompts))),
        shape=teacher.latent_shape,
        steps=steps,
        guidance=guidance,
    )
    return teacher.decode(latents).clamp(-1, 1)


def vit_accuracy(vit: Dinov2Model, seed: int, known: int, asked: int) -> dict[str, float]:
    """Share of `asked` one-thing scenes whose nearest of `known` others shows the same kind, and colour."""
    pictures, labels = single_things(seed, known + asked)
    return {name: round(neighbour_accuracy(vit, pictures, truth, known), 4) for name, truth in labels.items()}
