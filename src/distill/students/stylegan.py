"""A GAN's generator as the student: a baseline without a diffusion prior, from nothing.

It takes the place of StyleGAN-T++ in ADD's comparison. The method gives it noise at t = 1 and a
caption like any student, and gets x0; see `teachers.generator`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from distill.teachers.generator import GeneratorNetwork, StyleGenerator
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.sd3 import SD3

# Settings that a generator shares with its teacher's network: those of its inputs.
FITTING = ("in_channels", "sample_size", "pooled_projection_dim", "joint_attention_dim")


def stylegan(
    teacher: PipelineTeacher,
    *,
    channels: int = 96,
    blocks: int = 1,
    mapping_layers: int = 2,
    mapping_width: int = 128,
    layer_scale: float = 1e-5,
) -> GeneratorNetwork:
    """A generator of the teacher's latents with random weights, all trainable. It has one step.

    `channels` are those of every layer, `blocks` the residual blocks at each resolution, whose
    scale starts at `layer_scale`. The mapping network has `mapping_layers` layers of
    `mapping_width`. Raises ValueError for a teacher whose pipeline cannot call it.
    """
    if type(teacher) is not SD3:
        what = f"is called by a {SD3.kind.__name__}, and the teacher is a {type(teacher).__name__}"
        raise ValueError(f"student=stylegan: {what}; choose a teacher of SD3's kind")
    options = {
        "channels": channels,
        "blocks": blocks,
        "mapping_layers": mapping_layers,
        "mapping_width": mapping_width,
        "layer_scale": layer_scale,
    }
    generator = StyleGenerator(**_inputs(teacher.network.model.config), **options)
    student = GeneratorNetwork(generator).float().requires_grad_(True).train()
    student.rounds_up, student.draws = teacher.rounds_up, teacher.draws
    return student


def parameters(denoiser: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Number of weights of a generator with these options, for a teacher's network of this
    configuration.
    """
    with torch.device("meta"):
        generator = StyleGenerator(**_inputs(denoiser), **options)
    return sum(p.numel() for p in generator.parameters())


def _inputs(denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """What a generator has in common with a teacher's network of this configuration."""
    return {key: denoiser[key] for key in FITTING}
