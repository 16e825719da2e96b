"""Guided sampling with a teacher, by its own diffusers scheduler."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from distill.core.limits import check_strength, steps_left
from distill.core.process import RectifiedFlow
from distill.core.score_distillation import guided_x0
from distill.core.types import Cond, Denoiser
from distill.sampling import Consistency, Euler, check_finite, first_noise, rounds_up
from distill.sampling.angles import check_no_angles, has_angles
from distill.teachers.network import Network
from distill.teachers.pipeline import PipelineTeacher

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Guided(Euler):
    """Many guided steps, for a student that was tuned and not distilled.

    Euler's for flows, DDIM's for eps and v. The pictures are those of `guided`, by the teacher's
    scheduler, which the student keeps; only DDIM's of Stable Diffusion leaves the noise of its
    first training step, and this leaves none.

    guidance: its scale. flow_shift: of the levels of a flow, as in the teacher's scheduler (SD3's
    is 3).
    """

    guidance: float = 4.0
    flow_shift: float = 1.0
    few = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.flow_shift > 0:
            what = "must be above 0; 1 is no shift"
            raise ValueError(f"sampler.flow_shift={self.flow_shift}: {what}")

    def estimates(
        self, student: Denoiser, cond: Cond, generators: Sequence[torch.Generator], **options: Any
    ) -> Iterator[Tensor]:
        yield from super().estimates(
            WithGuidance(student, self.guidance), cond, generators, **options
        )

    def _trailing(self, steps: int, student: Any) -> list[float]:
        times = torch.tensor(super()._trailing(steps, student), dtype=torch.float64)
        return [float(t) for t in RectifiedFlow(self.flow_shift).sigma(times)]

    def check(self, network: Any) -> None:
        check_no_angles(network, "guided")
        if self.flow_shift != 1 and network.prediction != "flow":
            what = f"is for flows, and this teacher predicts {network.prediction}"
            raise ValueError(f"sampler.flow_shift={self.flow_shift}: {what}; make it 1")

    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        kept = teacher.pipeline.scheduler
        return type(kept).from_config(kept.config)


class WithGuidance:
    """A network whose x0 prediction is guided, as by `guided_x0`."""

    def __init__(self, network: Any, scale: float, image_scale: float = 1.0):
        self._of, self._scales = network, (scale, image_scale)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return guided_x0(self._of, x_t, t, cond, *self._scales)


def guided(
    teacher: PipelineTeacher,
    cond: Cond,
    generators: Sequence[torch.Generator],
    *,
    shape: Sequence[int],
    steps: int,
    guidance: float,
    image_guidance: float = 1.0,
    image: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Latents [B, *shape] of the teacher by its own diffusers scheduler, in trailing steps from
    pure noise.

    `image_guidance` is that of an editing teacher's source picture. With `image`, latents [B,
    *shape], the last `steps_left` steps for `strength`, from the noised image. Raises ValueError
    for results that are not finite.
    """
    options = {"shape": shape, "steps": steps, "guidance": guidance}
    options["image_guidance"] = image_guidance
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
    image_guidance: float = 1.0,
    image: Tensor | None = None,
    strength: float = 1.0,
) -> Iterator[Tensor]:
    """x_t [B, *shape] after each step of `guided`; the last one is the result.

    Of a teacher of few steps that has no other sampler (Sana-Sprint) they are its x0 predictions.
    """
    if guidance != 1:
        _warn_of_guidance(teacher, guidance)
    if has_angles(teacher):
        model = teacher if guidance == 1 else WithGuidance(teacher, float(guidance))
        how = {"shape": shape, "steps": steps, "image": image, "strength": strength}
        yield from Consistency().estimates(model, cond, generators, **how)
        return
    device = cond.tokens.device
    scheduler = _scheduler(teacher, steps, shape)
    timesteps = scheduler.timesteps
    scale, prediction = float(guidance), teacher.network.prediction
    x_t = first_noise(teacher, shape, generators).to(device)
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
            guided_x0(teacher, x_t, t, cond, scale, image_guidance), x_t, t, prediction
        )
        x_t = scheduler.step(output, timestep, x_t, return_dict=False)[0]
        yield x_t


def _warn_of_guidance(teacher: PipelineTeacher, guidance: float) -> None:
    told = getattr(teacher, "guidance", None)
    if told is not None and teacher.network.model.config.get("guidance_embeds"):
        _warn_of_two_guidances(guidance, told)
    if getattr(teacher, "few_steps", False):
        _warn_of_a_few_step_teacher(guidance)


@cache
def _warn_of_a_few_step_teacher(guidance: float) -> None:
    what = "%g guides a teacher that was distilled to few steps without guidance; use guidance=1"
    log.warning(f"guidance={what}", guidance)


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
        mu = None
        if scheduler.config.use_dynamic_shifting:  # the pipelines of FLUX
            tokens = shape[-2] * shape[-1] // teacher.patch**2
            mu = teacher.network.mu(scheduler.config, tokens, steps)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=mu)
        return scheduler
    # Only trailing steps start at the level of pure noise.
    scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def _time(teacher: PipelineTeacher, timestep: Tensor) -> Tensor:
    """A scheduler's timestep as t [1] in [0, 1]."""
    if teacher.network.prediction == "flow":
        return timestep.float().reshape(1) / 1000
    return teacher.process.time(timestep.reshape(1))
