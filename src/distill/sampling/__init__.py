"""Samplers: few steps with a student, many guided steps with a teacher. Latents in, latents out; no
gradient.

students:        consistency (LADD), Euler-ancestral (ADD) or Euler steps, t = 1, 1 - 1/n, ..., 1/n
guided teacher:  x0 = x0(empty) + s (x0(caption) - x0(empty))
                 stepped by Euler (flow) or DDIM (eps, v)
"""

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UNet2DConditionModel,
)
from torch import Tensor

from distill.core.limits import check_strength, steps_left
from distill.core.process import level_like
from distill.core.types import Cond, Denoiser
from distill.machine.hardware import autocast
from distill.teachers.network import Network
from distill.teachers.pipeline import PipelineTeacher
from distill.teachers.schedulers import FlowScheduler, ShiftedLCMScheduler

log = logging.getLogger(__name__)
# What Stable Diffusion's pipelines want to read in a scheduler's file, or warn; these schedulers do
# not use it.
OFFSET = 1
ORIGINAL = 4  # LCM's original_inference_steps: what 1 to 4 steps are chosen from


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One generator per picture, on the CPU, so that a seed means the same picture in any batch and
    on any device.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], some of them beyond -> uint8 on the CPU, rounded as diffusers does: a cast
    would cut off.

    Raises ValueError for pixels that are no numbers, which would be a black picture.
    """
    check_finite(pixels, "pictures")
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def check_finite(x: Tensor, what: str) -> None:
    """Raise ValueError, naming `what`, unless all of x [B, ...] are finite numbers."""
    bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"{what}: {bad} of {len(x)} hold values that are not finite: the weights are damaged,"
            " or overflow in their dtype; give them anew, or in bfloat16 or float32"
        )


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise [B, *shape], each row from its own generator, as a diffusers pipeline draws its
    starting latents.
    """
    return torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


def step_noise(student: Any, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Noise [B, *shape] of a later step, as the scheduler of a pipeline draws it: in the layout of
    its latents.
    """
    network = getattr(student, "network", student)
    unpacked = getattr(network, "unpacked", None)
    if unpacked is None:
        return draw_noise(shape, generators)
    return unpacked(draw_noise(network.packed_shape(shape), generators), shape)


def rounds_up(student: Any) -> bool:
    """Whether the pipeline of this student, or teacher, rounds the steps of an image up: see
    `steps_left`.
    """
    return getattr(getattr(student, "network", student), "rounds_up", False)


def in_precision(
    make: Callable[..., Tensor],
    cond: Cond,
    generators: Sequence[torch.Generator],
    *,
    precision: str,
    **how: Any,
) -> Tensor:
    """The latents of a sampler, its denoiser's passes made in this precision."""
    with autocast(precision, cond.tokens.device.type):
        return make(cond, generators, **how)


@dataclass(frozen=True, kw_only=True)
class FewSteps(ABC):
    """A sampler of students: estimate x0, go to the next level, without guidance.

    levels: the first n of them are the n steps; None: 1, 1 - 1/n, ..., 1/n, as diffusers' trailing
    spacing.
    """

    levels: Sequence[float] | None = None
    finite: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.levels is None:
            return
        falling = all(a > b for a, b in itertools.pairwise([*self.levels, 0.0]))
        if not self.levels or not falling or not self.levels[0] <= 1:
            raise ValueError(
                f"sampler.levels={self.levels}: must fall from at most 1, and stay above 0"
            )

    def grid(self, steps: int, strength: float = 1.0, student: Any = None) -> list[float]:
        """The levels of `steps` steps; of them the last `steps_left`, as diffusers has it for
        images.
        """
        check_strength(steps, strength, rounds_up(student))
        if self.levels is not None and steps > len(self.levels):
            raise ValueError(f"steps={steps}: this sampler knows {len(self.levels)} levels")
        every = self._trailing(steps, student) if self.levels is None else list(self.levels[:steps])
        return every[steps - steps_left(steps, strength, rounds_up(student)) :]

    def _trailing(self, steps: int, student: Any) -> list[float]:
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
        """Latents [B, *shape]; from noise, or from the latents `image` [B, *shape] noised to the
        first level left.
        """
        how = {"shape": shape, "steps": steps, "image": image, "strength": strength}
        for x0 in self.estimates(student, cond, generators, **how):
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
        """The same step by step: x0 [B, *shape] as each step estimates it, the last of which is the
        result.
        """
        grid = self.grid(steps, 1.0 if image is None else strength, student)
        device = cond.tokens.device
        x_t = draw_noise(shape, generators).to(device)
        if image is not None:
            warn_of_noise(steps, strength, grid[0])
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
        """What stands for x_1."""
        return noise

    @abstractmethod
    def _next(
        self, student: Denoiser, x_t: Tensor, x0: Tensor, t: Tensor, later: Tensor, noise: Tensor
    ) -> Tensor:
        """x at the level `later`."""

    def check(self, network: Any) -> None:
        """Raise ValueError for a network that cannot be sampled so."""
        if self.finite and (network.prediction == "flow" or network.process.ends_in_noise):
            what = (
                "a little of the data to its end, as Stable Diffusion's does, and this teacher's"
                " ends in pure noise"
            )
            raise ValueError(
                f"sampler={type(self).__name__} needs a process that keeps {what}; use"
                " sampler=consistency"
            )

    @abstractmethod
    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        """The diffusers scheduler that does the same."""


class Consistency(FewSteps):
    """x_t' = alpha_t' x0 + sigma_t' z with fresh z (LCM, LADD)."""

    def _trailing(self, steps: int, student: Any) -> list[float]:
        """On Stable Diffusion's schedule LCM's: of four levels those at floor(4 i / n); three are
        1, .75, .5.
        """
        if getattr(student, "prediction", "flow") == "flow":
            return super()._trailing(steps, student)
        if steps > ORIGINAL:
            raise ValueError(f"steps={steps}: this student's scheduler has at most {ORIGINAL}")
        return [1 - (ORIGINAL * i // steps) / ORIGINAL for i in range(steps)]

    def _next(
        self, student: Denoiser, x_t: Tensor, x0: Tensor, t: Tensor, later: Tensor, noise: Tensor
    ) -> Tensor:
        return student.process.diffuse(x0, noise, later)

    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        """Flow: Euler's, with fresh noise.

        eps and v: four original steps, 999, 749, 499 and 249, of which 1, 2, 3 and 4 steps take
        theirs.
        """
        if student.prediction == "flow":
            return flow_scheduler(of_unet=_of_unet(student), stochastic=True)
        if student.shift:
            return ShiftedLCMScheduler(**_schedule_of(teacher), shifted_timestep=student.shift)
        own = {"original_inference_steps": ORIGINAL, "clip_sample": False}
        return LCMScheduler(**_schedule_of(teacher), **own, steps_offset=OFFSET)


class Euler(FewSteps):
    """x_t' = alpha_t' x0 + sigma_t' eps with the eps that goes with x0: no noise but the first, so
    for flows alone diffusers' plain scheduler and a `generator` make the same pictures.
    """

    def _next(
        self, student: Denoiser, x_t: Tensor, x0: Tensor, t: Tensor, later: Tensor, noise: Tensor
    ) -> Tensor:
        process, column = student.process, (-1, *[1] * (x_t.ndim - 1))
        alpha, sigma = (level(t).view(column) for level in (process.alpha, process.sigma))
        return process.diffuse(x0, (x_t - alpha * x0) / sigma, later)

    def check(self, network: Any) -> None:
        if network.prediction != "flow":
            what = "is for teachers of flows, and this one predicts " + network.prediction
            raise ValueError(f"sampler=euler: {what}; use sampler=consistency")

    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        self.check(student)
        return flow_scheduler(of_unet=_of_unet(student), stochastic=False)


def _of_unet(student: Network) -> bool:
    return isinstance(student.model, UNet2DConditionModel)


def flow_scheduler(*, of_unet: bool, stochastic: bool) -> Any:
    """Of students of flows: no shift, for the levels were trained as they are.

    `of_unet`: the pipelines of UNets ask of a scheduler what diffusers' own of flows has not.
    """
    kind = FlowScheduler if of_unet else FlowMatchEulerDiscreteScheduler
    return kind(shift=1.0, stochastic_sampling=stochastic)


class EulerAncestral(FewSteps):
    """Euler's step to a lower noise, and fresh noise up to the next level: the sampler of SD-Turbo
    and SDXL-Turbo.

    With rho = sigma / alpha and z = x / alpha:
    up^2 = rho'^2 (rho^2 - rho'^2) / rho^2,  down^2 = rho'^2 - up^2,
    z' = x0 + (z - x0) down / rho + up n. It begins at rho(1) n, which must be finite: not for
    flows.
    """

    finite = True

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
        if shift := getattr(network, "shift", None):
            raise ValueError(
                f"student.shift={shift}: diffusers' Euler sampler knows none; use"
                " sampler=consistency"
            )

    def scheduler(self, student: Network, teacher: PipelineTeacher) -> Any:
        self.check(student)
        own = {"timestep_spacing": "trailing", "steps_offset": OFFSET}
        return EulerAncestralDiscreteScheduler(**_schedule_of(teacher), **own)


def _schedule_of(teacher: PipelineTeacher) -> dict[str, Any]:
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    kept += ("prediction_type", "trained_betas", "rescale_betas_zero_snr")
    config = teacher.pipeline.scheduler.config
    return {key: config[key] for key in kept if config.get(key)}


def sampler_of(pipeline: Any) -> FewSteps:
    """The sampler that an exported pipeline's scheduler stands for, at the levels that its index
    says.
    """
    ancestral = isinstance(pipeline.scheduler, EulerAncestralDiscreteScheduler)
    kind = EulerAncestral if ancestral else Consistency
    said = getattr(pipeline, "sampler", None) or {}
    if said.get("name") == Euler.__name__:
        kind = Euler
    return kind(levels=said.get("levels"))


def distilled(pipeline: Any) -> bool:
    """Whether a pipeline is one of few steps: by its scheduler, as ours and others have it, or by
    its index.
    """
    config = pipeline.scheduler.config
    few = isinstance(pipeline.scheduler, LCMScheduler) or config.get("stochastic_sampling", False)
    ancestral = isinstance(pipeline.scheduler, EulerAncestralDiscreteScheduler)
    few = few or (ancestral and config.timestep_spacing == "trailing")
    return few or bool(getattr(pipeline, "sampler", None))


@cache
def warn_of_noise(steps: int, strength: float, first: float) -> None:
    if first == 1 and strength < 1:
        what = "begins at pure noise, as diffusers' pipeline does, and nothing of the image is left"
        log.warning("strength=%g steps=%d: %s; use more steps or less", strength, steps, what)
