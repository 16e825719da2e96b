"""Samplers: few steps with a student, many guided steps with a teacher. Latents in, latents out; no gradient.

consistency (LADD, LCM):  x0 = student(x_t, t);  x_t' = alpha_t' x0 + sigma_t' z,  z fresh,  t = 1, 1 - 1/n, ..., 1/n
guided teacher:           x0 = x0(empty) + s (x0(caption) - x0(empty)), stepped by Euler (flow) or DDIM (eps, v)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill.teachers.network import PipelineTeacher
from distill.types import Cond, Denoiser


class Guided:
    """A denoiser under classifier-free guidance of scale s; both estimates come from one doubled batch."""

    def __init__(self, denoiser: Denoiser, scale: float):
        self.denoiser, self.scale = denoiser, scale
        self.process = denoiser.process

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.scale == 1:
            return self.denoiser.x0(x_t, t, cond)
        both = Cond.cat([cond, cond.unconditional()])
        with_caption, without = self.denoiser.x0(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
        return without + self.scale * (with_caption - without)


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per picture, on the CPU, so that a seed means the same picture in any batch and on any device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise [B, *shape], each row from its own generator, as a diffusers pipeline draws its starting latents."""
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


@torch.no_grad()
def consistency(
    student: Denoiser, cond: Cond, generators: Sequence[torch.Generator], *, shape: Sequence[int], steps: int
) -> Tensor:
    """Latents [B, *shape] in `steps` student evaluations without guidance."""
    device = cond.tokens.device
    x_t = draw_noise(shape, generators).to(device)
    for i in range(steps):
        t = torch.full((len(x_t),), 1 - i / steps, device=device)
        x0 = student.x0(x_t, t, cond)
        if i < steps - 1:
            later = torch.full_like(t, 1 - (i + 1) / steps)
            x_t = student.process.diffuse(x0, draw_noise(shape, generators).to(device), later)
    return x0


@torch.no_grad()
def guided(
    teacher: PipelineTeacher,
    cond: Cond,
    generators: Sequence[torch.Generator],
    *,
    shape: Sequence[int],
    steps: int,
    guidance: float,
) -> Tensor:
    """Latents [B, *shape] from the teacher by its own diffusers scheduler, in trailing steps from pure noise."""
    device = cond.tokens.device
    scheduler = _scheduler(teacher, steps)
    denoiser, prediction = Guided(teacher, guidance), teacher.network.prediction
    x_t = draw_noise(shape, generators).to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        t = _time(teacher, timestep).expand(len(x_t)).to(device)
        output = teacher.process.from_x0(denoiser.x0(x_t, t, cond), x_t, t, prediction)
        x_t = scheduler.step(output, timestep, x_t, return_dict=False)[0]
    return x_t


def _scheduler(teacher: PipelineTeacher, steps: int) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    config = teacher.pipeline.scheduler.config
    if teacher.network.prediction == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        # The default grid ends with a wasted step at sigma = 1/1000; this one is 1, 1 - 1/n, ..., 1/n (then shifted).
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        return scheduler
    # Only trailing steps start at the level of pure noise.
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def _time(teacher: PipelineTeacher, timestep: Tensor) -> Tensor:
    """A scheduler's timestep as our t [1]."""
    if teacher.network.prediction == "flow":
        return timestep.float().reshape(1) / 1000
    return teacher.process.time(timestep.reshape(1))
