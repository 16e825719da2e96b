"""What the trained parts are worth on `shapes`: numbers for the model card."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from transformers import Dinov2Model

from distill.evaluation import pictures
from distill.pretraining.material import single_things
from distill.pretraining.vit import neighbour_accuracy
from distill.sampling import guided
from distill.shapes.judge import Judge, fresh_renders, judging_prompts
from distill.teachers.network import PipelineTeacher

READER_SEED = 5  # apart from the seeds that students are judged with


@torch.no_grad()
def reader_accuracy(judge: Judge, vae: AutoencoderKL, n: int) -> dict[str, dict[str, float]]:
    """Shares of right answers about n fresh renders, and about the autoencoder's copies of them."""
    prompts = judging_prompts(n, seed=READER_SEED)
    renders = fresh_renders(prompts, seed=READER_SEED)
    copies = torch.cat([vae.decode(vae.encode(x).latent_dist.mode()).sample for x in renders.split(100)])
    shares = {name: judge.accuracy(judge.read(x)[1], prompts) for name, x in (("renders", renders), ("copies", copies))}
    return {name: {k: round(v, 4) for k, v in s.items() if v == v} for name, s in shares.items()}  # nan: none says any


def teacher_accuracy(
    teacher: PipelineTeacher, judge: Judge, n: int, *, held_out: bool, steps: int, guidance: float
) -> float:
    """Share of n pictures, one a prompt, that show all that their prompt says."""
    prompts = judging_prompts(n, seed=0, held_out=held_out)
    shown = pictures(
        teacher,
        lambda cond, g: guided(teacher, cond, g, shape=teacher.latent_shape, steps=steps, guidance=guidance),
        prompts,
        range(n),
    )
    return round(judge.accuracy(judge.read(shown)[1], prompts)["prompt_accuracy"], 4)


def vit_accuracy(vit: Dinov2Model, seed: int, known: int, asked: int) -> dict[str, float]:
    """Share of `asked` one-thing scenes whose nearest of `known` others shows the same kind, and colour."""
    scenes, labels = single_things(seed, known + asked)
    return {name: round(neighbour_accuracy(vit, scenes, truth, known), 4) for name, truth in labels.items()}
