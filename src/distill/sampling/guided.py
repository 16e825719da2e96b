"""Guided sampling with a teacher, by its own diffusers scheduler."""

import logging
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill.core.limits import check_strength, steps_left
from distill.core.score_distillation import guided_x0
from distill.core.types import Cond
from distill.sampling import check_finite, draw_noise, rounds_up
from distill.teachers.pipeline import PipelineTeacher

log = logging.getLogger(__name__)


def guided(
    teacher: PipelineTeacher,
    cond: Cond,
    generators: Sequence[torch.Generator],
    *,
    shape: Sequence[int],
    steps: int,
    guidance: float,
    image: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Latents [B, *shape] of the teacher by its own diffusers scheduler, in trailing steps from
    pure noise.

    With `image`, latents [B, *shape], the last `steps_left` steps for `strength`, from the noised
    image. Raises ValueError for results that are not finite.
    """
    options = {"shape": shape, "steps": steps, "guidance": guidance}
    for x_t in guided_steps(teacher, cond, generators, **options, image=image, strength=strength):
        last = x_t
    check_finite(last, "latents")
    return last


@torch.no_grad()
def guided_steps(
    teacher: PipelineTeacher,
    cond: Cond,
    generators: Sequence[torch.Generator],
    *,
    shape: Sequence[int],
    steps: int,
    guidance: float,
    image: Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[Tensor]:
    """x_t [B, *shape] after each step of `guided`; the last one is the result."""
    told = getattr(teacher, "guidance", None)
    if guidance != 1 and told is not None and teacher.network.model.config.get("guidance_embeds"):
        _warn_of_two_guidances(guidance, told)
    device = cond.tokens.device
    scheduler = _scheduler(teacher, steps, shape)
    timesteps = scheduler.timesteps
    scale, prediction = float(guidance), teacher.network.prediction
    x_t = draw_noise(shape, generators).to(device)
    if image is None:
        x_t = x_t * getattr(scheduler, "init_noise_sigma", 1.0)
    else:
        check_strength(steps, strength, rounds_up(teacher))
        timesteps = timesteps[steps - steps_left(steps, strength, rounds_up(teacher)) :]
        first = _time(teacher, timesteps[0]).expand(len(x_t)).to(device)
        x_t = teacher.process.diffuse(image, x_t, first)
    for timestep in timesteps:
        t = _time(teacher, timestep).expand(len(x_t)).to(device)
        output = teacher.process.from_x0(
            guided_x0(teacher, x_t, t, cond, scale), x_t, t, prediction
        )
        x_t = scheduler.step(output, timestep, x_t, return_dict=False)[0]
        yield x_t


@cache
def _warn_of_two_guidances(guidance: float, embedded: float) -> None:
    what = (
        "%g guides a teacher that is conditioned on guidance %g (teacher.guidance), with two passes"
        " a step; guidance=1 takes one"
    )
    log.warning(f"guidance={what}", guidance, embedded)


def _scheduler(
    teacher: PipelineTeacher, steps: int, shape: Sequence[int]
) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    config = teacher.pipeline.scheduler.config
    if teacher.network.prediction == "flow":
        # Sana's solver, for both kinds of process, names the shift flow_shift.
        shift = config.get("shift", config.get("flow_shift", 1.0))
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift)
        # The default levels end with a wasted step at sigma = 1/1000. These are 1, 1 - 1/n, ...,
        # 1/n, then shifted.
        mu = _shift_of(scheduler.config, shape[1] * shape[2] // teacher.patch**2)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
        return scheduler
    # Only trailing steps start at the level of pure noise.
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def _shift_of(config: Any, tokens: int) -> float | None:
    """The logarithm of the shift for a picture of so many tokens, for schedulers with a dynamic one
    (FLUX).
    """
    if not config.use_dynamic_shifting:
        return None
    share = (tokens - config.base_image_seq_len) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return config.base_shift + share * (config.max_shift - config.base_shift)


def _time(teacher: PipelineTeacher, timestep: Tensor) -> Tensor:
    """A scheduler's timestep as t [1] in [0, 1]."""
    if teacher.network.prediction == "flow":
        return timestep.float().reshape(1) / 1000
    return teacher.process.time(timestep.reshape(1))
