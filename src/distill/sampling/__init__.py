"""Samplers: few steps of a student, many guided steps of a teacher. Latents in and out; no
gradient.

students:        consistency (LADD), Euler-ancestral (ADD) or Euler steps, t = 1, 1 - 1/n, ..., 1/n
guided teacher:  x0 = x0(empty) + s (x0(caption) - x0(empty))
                 with steps of Euler (flow) or DDIM (eps, v)
"""

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from distill.core.limits import check_strength, steps_left
from distill.core.process import level_like
from distill.core.times import ResolutionShift, Shift
from distill.core.types import Cond, Denoiser
from distill.machine.hardware import autocast
from distill.sampling.angles import check_no_angles, has_angles, pipeline_levels
from distill.sampling.noise import draw_noise as draw_noise
from distill.sampling.noise import first_noise, step_noise
from distill.sampling.shifts import check_shift, shift_of
from distill.teachers.loading.locate import is_few_step
from distill.teachers.network import Network
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.schedulers import FlowScheduler, ShiftedLCMScheduler
from distill.terminal.console import note

log = logging.getLogger(__name__)
# steps_offset: Stable Diffusion's pipelines warn without it; these schedulers do not use it.
STEPS_OFFSET = 1
ONE_STEP = "this student is a GAN's generator, which makes a picture in one step from noise"
ORIGINAL_STEPS = 4  # LCM's original_inference_steps, from which 1 to 4 steps are chosen


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per picture, on the CPU: a seed gives the same picture in any batch and on any
    device.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], with overshoot -> uint8 on the CPU, rounded as in diffusers and not
    truncated.

    Raises ValueError for values that are not finite; they would give a black picture.
    """
    check_finite(pixels, "pictures")
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def check_finite(x: Tensor, what: str) -> None:
    """Raise ValueError, naming `what`, unless all values of x [B, ...] are finite."""
    bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"{what}: {bad} of {len(x)} hold values that are not finite: the weights are damaged,"
            " or overflow in their dtype; replace them, or use bfloat16 or float32"
        )


def rounds_up(student: Any) -> bool:
    """Whether the pipeline of this student or teacher rounds up the steps for an image: see
    `steps_left`.
    """
    return getattr(getattr(student, "network", student), "rounds_up", False)


def has_one_step(student: Any) -> bool:
    """Whether this student or pipeline knows pure noise alone, as a GAN's generator does."""
    return bool(getattr(getattr(student, "network", student), "one_step", False))


def possible_steps(wanted: Sequence[int], student: Any) -> list[int]:
    """Those of the numbers of steps that the student has. Raises ValueError if it has none."""
    if not has_one_step(student) or not wanted:
        return list(wanted)
    if 1 not in wanted:
        raise ValueError(f"steps={list(wanted)}: {ONE_STEP}; use 1")
    if len(wanted) > 1:
        note(f"evaluated in one step alone: {ONE_STEP}")
    return [1]


def in_precision(
    sampler: Callable[..., Tensor],
    cond: Cond,
    generators: Sequence[torch.Generator],
    *,
    precision: str,
    **options: Any,
) -> Tensor:
    """The latents of a sampler, with the denoiser's passes in this precision."""
    with autocast(precision, cond.tokens.device.type):
        return sampler(cond, generators, **options)


@dataclass(frozen=True, kw_only=True, repr=False)
class FewSteps(ABC):
    """A sampler of students without guidance: predict x0, renoise to the next level.

    levels: the first n of them are the n steps; None: 1, 1 - 1/n, ..., 1/n, diffusers' trailing
    spacing. shift: moves the levels with the size of the picture.
    """

    levels: Sequence[float] | None = None
    shift: Shift = None
    needs_finite_rho: ClassVar[bool] = False
    few = True  # whether it is for students of few steps

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", ResolutionShift.of(self.shift, "sampler.shift"))
        if self.levels is None:
            return
        falling = all(a > b for a, b in itertools.pairwise([*self.levels, 0.0]))
        if not self.levels or not falling or not self.levels[0] <= 1:
            raise ValueError(
                f"sampler.levels={self.levels}: must fall from at most 1, and stay above 0"
            )

    def __repr__(self) -> str:
        shift = f", shift={self.shift}" if self.shift else ""  # results name their sampler by this
        return f"{type(self).__name__}(levels={self.levels}{shift})"

    def grid(
        self,
        steps: int,
        strength: float = 1.0,
        student: Any = None,
        shape: Sequence[int] | None = None,
    ) -> list[float]:
        """The noise levels of `steps` steps for latents of this shape, [C, H, W]; for an image the
        last `steps_left` of them, as in diffusers.
        """
        if steps > 1 and has_one_step(student):
            raise ValueError(f"steps={steps}: {ONE_STEP}; use steps=1")
        check_strength(steps, strength, rounds_up(student))
        if self.levels is not None and steps > len(self.levels):
            raise ValueError(f"steps={steps}: this sampler has {len(self.levels)} levels")
        levels = (
            self._trailing(steps, student) if self.levels is None else list(self.levels[:steps])
        )
        shift = cast("ResolutionShift | None", self.shift)  # since __post_init__
        if shift and shape:
            levels = shift.of_levels(levels, shape)
        return levels[steps - steps_left(steps, strength, rounds_up(student)) :]

    def _trailing(self, steps: int, student: Any) -> list[float]:
        if has_angles(student):
            return pipeline_levels(steps)
        return [1 - i / steps for i in range(steps)]

    @torch.no_grad()
    def __call__(
        self,
        student: Denoiser,
        cond: Cond,
        generators: Sequence[torch.Generator],
        *,
        shape: Sequence[int],
        steps: int,
        image: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Latents [B, *shape], from noise, or from the latents `image` [B, *shape] noised to the
        first level.
        """
        options = {"shape": shape, "steps": steps, "image": image, "strength": strength}
        for x0 in self.estimates(student, cond, generators, **options):
            last = x0
        return last

    @torch.no_grad()
    def estimates(
        self,
        student: Denoiser,
        cond: Cond,
        generators: Sequence[torch.Generator],
        *,
        shape: Sequence[int],
        steps: int,
        image: Tensor | None = None,
        strength: float = 1.0,
    ) -> Iterator[Tensor]:
        """The x0 prediction [B, *shape] of each step; the last one is the result."""
        grid = self.grid(steps, 1.0 if image is None else strength, student, shape)
        device = cond.tokens.device
        x_t = first_noise(student, shape, generators).to(device)
        if image is not None:
            warn_if_image_is_lost(steps, strength, grid[0])
            x_t = student.process.diffuse(image, x_t, level_like(x_t, grid[0]))
        elif grid[0] == 1:
            x_t = self._first(student, x_t)
        for now, later in itertools.pairwise([*grid, 0.0]):
            t = level_like(x_t, now)
            x0 = student.x0(x_t, t, cond)
            yield x0
            if later > 0:
                noise = step_noise(student, shape, generators).to(device)
                x_t = self._next(student, x_t, x0, t, level_like(x_t, later), noise)

    def _first(self, student: Denoiser, noise: Tensor) -> Tensor:
        """x at t = 1, from unit noise."""
        return noise

    @abstractmethod
    def _next(
        self, student: Denoiser, x_t: Tensor, x0: Tensor, t: Tensor, later: Tensor, noise: Tensor
    ) -> Tensor:
        """x at the noise level `later`."""

    def check(self, network: Any) -> None:
        """Raise ValueError for a network that this sampler cannot sample."""
        if self.needs_finite_rho and (
            network.prediction == "flow" or network.process.ends_in_noise
        ):
            what = (
                "a little of the data at t = 1, as Stable Diffusion's does; this teacher's ends in"
                " pure noise"
            )
            raise ValueError(
                f"sampler={type(self).__name__} needs a process that keeps {what}; use"
                " sampler=consistency"
            )
        if has_one_step(network) and self.levels and self.levels[0] != 1:
            what = f"{ONE_STEP}, level 1; make it null"
            raise ValueError(f"sampler.levels={list(self.levels)}: {what}")
        if self.shift:
            check_shift(self.shift, network, "sampler.shift")

    @abstractmethod
    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        """The equivalent diffusers scheduler."""


class Consistency(FewSteps):
    """x_t' = alpha_t' x0 + sigma_t' z with fresh noise z, as in LCM and LADD."""

    def _trailing(self, steps: int, student: Any) -> list[float]:
        """On Stable Diffusion's schedule LCM's levels: of four those at floor(4 i / n); for three
        1, .75, .5.
        """
        if getattr(student, "prediction", "flow") == "flow":
            return super()._trailing(steps, student)
        if steps > ORIGINAL_STEPS:
            raise ValueError(
                f"steps={steps}: this student's scheduler has at most {ORIGINAL_STEPS}"
            )
        return [1 - (ORIGINAL_STEPS * i // steps) / ORIGINAL_STEPS for i in range(steps)]

    def _next(
        self, student: Denoiser, x_t: Tensor, x0: Tensor, t: Tensor, later: Tensor, noise: Tensor
    ) -> Tensor:
        return student.process.diffuse(x0, noise, later)

    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        """For a flow Euler's scheduler with fresh noise; for eps and v LCM's.

        LCM's has four original steps, 999, 749, 499 and 249, from which 1, 2, 3 or 4 steps are
        chosen.
        """
        if has_angles(student):
            return SCMScheduler(sigma_data=teacher.pipeline.scheduler.config.get("sigma_data", 0.5))
        if student.prediction == "flow":
            options = {"of_unet": _of_unet(student), "shift": self.shift}
            return flow_scheduler(stochastic=True, **options)
        if student.shift:
            return ShiftedLCMScheduler(**_schedule_of(teacher), shifted_timestep=student.shift)
        settings = {"original_inference_steps": ORIGINAL_STEPS, "clip_sample": False}
        return LCMScheduler(**_schedule_of(teacher), **settings, steps_offset=STEPS_OFFSET)


class Euler(FewSteps):
    """x_t' = alpha_t' x0 + sigma_t' eps with the eps that x0 implies. No noise after the first.

    For flows only. Diffusers' plain scheduler with a `generator` gives the same pictures.
    """

    def _next(
        self, student: Denoiser, x_t: Tensor, x0: Tensor, t: Tensor, later: Tensor, noise: Tensor
    ) -> Tensor:
        process, column = student.process, (-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = (level(t).view(column) for level in (process.alpha, process.sigma))
        return process.diffuse(x0, (x_t - alpha * x0) / sigma, later)

    def check(self, network: Any) -> None:
        if network.prediction != "flow":
            what = "is for teachers that predict a flow; this one predicts " + network.prediction
            raise ValueError(f"sampler=euler: {what}; use sampler=consistency")
        check_no_angles(network, "euler")
        super().check(network)

    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        self.check(student)
        options = {"of_unet": _of_unet(student), "shift": self.shift}
        return flow_scheduler(stochastic=False, **options)


def _of_unet(student: Network) -> bool:
    return isinstance(student.model, UNet2DConditionModel)


def flow_scheduler(*, of_unet: bool, stochastic: bool, shift: Shift = None) -> Any:
    """Scheduler of flow students, without a shift but the sampler's: they are trained at these
    levels.

    `of_unet`: pipelines of UNets call methods that diffusers' own flow scheduler does not have.
    """
    moved = ResolutionShift.of(shift, "sampler.shift")
    kind = FlowScheduler if of_unet else FlowMatchEulerDiscreteScheduler
    return kind(shift=1.0, stochastic_sampling=stochastic, **(moved.settings() if moved else {}))


class EulerAncestral(FewSteps):
    """Euler's step to a lower noise level, then fresh noise: the sampler of SD-Turbo and
    SDXL-Turbo.

    With rho = sigma / alpha and z = x / alpha:
    up^2 = rho'^2 (rho^2 - rho'^2) / rho^2,  down^2 = rho'^2 - up^2,
    z' = x0 + (z - x0) down / rho + up n.
    It starts at rho(1) n, and rho(1) must be finite: not for flows.
    """

    needs_finite_rho = True

    def _first(self, student: Denoiser, noise: Tensor) -> Tensor:
        return student.process.diffuse(torch.zeros_like(noise), noise, level_like(noise, 1))

    def _next(
        self, student: Denoiser, x_t: Tensor, x0: Tensor, t: Tensor, later: Tensor, noise: Tensor
    ) -> Tensor:
        process, column = student.process, (-1, *[1] * (x_t.ndim - 1))
        rho, rho_later = ((process.sigma(at) / process.alpha(at)).view(column) for at in (t, later))
        up = rho_later * (rho**2 - rho_later**2).sqrt() / rho
        down = (rho_later**2 - up**2).sqrt()
        z = x0 + (x_t / process.alpha(t).view(column) - x0) * down / rho + up * noise
        return process.alpha(later).view(column) * z

    def check(self, network: Any) -> None:
        super().check(network)
        shift = getattr(network, "shift", None)
        if shift:
            raise ValueError(
                f"student.shift={shift}: diffusers' Euler sampler has no shift; use"
                " sampler=consistency"
            )

    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        self.check(student)
        settings = {"timestep_spacing": "trailing", "steps_offset": STEPS_OFFSET}
        return EulerAncestralDiscreteScheduler(**_schedule_of(teacher), **settings)


def _schedule_of(teacher: PipelineTeacher) -> dict[str, Any]:
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    kept += ("prediction_type", "trained_betas", "rescale_betas_zero_snr")
    config = teacher.pipeline.scheduler.config
    return {key: config[key] for key in kept if config.get(key)}


def sampler_of(pipeline: Any) -> FewSteps:
    """The sampler of an exported pipeline, from its scheduler and the levels in its index."""
    ancestral = isinstance(pipeline.scheduler, EulerAncestralDiscreteScheduler)
    kind = EulerAncestral if ancestral else Consistency
    saved = getattr(pipeline, "sampler", None) or {}
    if saved.get("name") == Euler.__name__:
        kind = Euler
    return kind(levels=saved.get("levels"), shift=shift_of(pipeline.scheduler.config, saved))


def distilled(pipeline: Any) -> bool:
    """Whether a pipeline is of few steps, by its scheduler or by its index."""
    names = {kind.__name__ for kind in type(pipeline.scheduler).__mro__}
    few = is_few_step(names, pipeline.scheduler.config)
    return few or bool(getattr(pipeline, "sampler", None))


@cache
def warn_if_image_is_lost(steps: int, strength: float, first: float) -> None:
    if first == 1 and strength < 1:
        what = "starts at pure noise, as in diffusers' pipeline, and ignores the image"
        log.warning("strength=%g steps=%d: %s; use more or fewer steps", strength, steps, what)
