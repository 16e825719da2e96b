"""Generate pictures with a student or a teacher, and save a student for diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from distill.api.errors import with_plain_errors
from distill.api.settings import command_settings
from distill.config.compose import make

if TYPE_CHECKING:
    from PIL.Image import Image

    from distill.methods.base import Distillation
    from distill.teachers.pipeline import PipelineTeacher


@dataclass(frozen=True)
class _Generator:
    """`teacher` embeds captions and decodes latents; `sample` makes latents from a `Cond`."""

    teacher: Any
    sample: Callable[..., Any]


@with_plain_errors
def sample_images(
    settings: DictConfig,
    model: Distillation | PipelineTeacher,
    prompts: Sequence[str],
    *,
    steps: int | None = None,
    seed: int | None = None,
    count: int | None = None,
    guidance: float | None = None,
    precision: str | None = None,
) -> list[Image]:
    """Generate pictures for prompts, as `python -m distill.sample` does.

    An argument that is None takes the default of that command.

    Args:
        settings: their sampler is used for the student.
        model: a method, whose averaged student is used, trained or not; or a teacher.
        prompts: list of texts.
        steps: 1 to 4 for a student, about 28 for a teacher.
        seed: seed of the first picture of each prompt.
        count: pictures for each prompt, with the seeds seed, seed + 1, ...
        guidance: guidance scale; required for a teacher, None for a student.
        precision: auto, bf16-mixed or 32-true, for the denoiser.

    Returns:
        One picture for each prompt and seed, ordered by prompt and then by seed; of a video up to
        eight frames of it, side by side.

    Raises:
        ValueError: if a number is out of range, a teacher has no guidance, or a student has one.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts}: must be a list of texts; write [{prompts!r}]")
    values = {"steps": steps, "seed": seed, "count": count, "precision": precision}
    options = command_settings("sample", values)
    jobs = [(text, options.seed + i) for text in prompts for i in range(options.count)]
    with _generator(settings, model, guidance) as generator:
        return _generate(generator, jobs, options)


def _generate(
    generator: _Generator, jobs: list[tuple[str, int]], options: DictConfig
) -> list[Image]:
    """One picture for each (prompt, seed), in the batches that the command uses."""
    import torch
    from torchvision.transforms.functional import to_pil_image

    from distill.core.limits import drawn_at_once
    from distill.machine.hardware import autocast, memory_left, precision
    from distill.sampling import seeded, to_bytes

    teacher = generator.teacher
    device = teacher.device.type
    dtype = precision(options.precision, "cpu" if device == "cpu" else "auto").name
    height, width = teacher.sides_of(teacher.latent_shape)
    sides = (height, width * teacher.frames)
    batch_size = drawn_at_once(*sides, most=8, room=memory_left(teacher))
    images: list[Image] = []
    with torch.no_grad():
        for start in range(0, len(jobs), batch_size):
            texts, seeds = zip(*jobs[start : start + batch_size], strict=True)
            cond = teacher.embed(list(texts))
            with autocast(dtype, device):
                x0 = generator.sample(
                    cond, seeded(seeds), shape=teacher.latent_shape, steps=options.steps
                )
            images += [to_pil_image(pixels) for pixels in to_bytes(teacher.pictures(x0))]
    return images


@contextmanager
def _generator(settings: DictConfig, model: Any, guidance: float | None) -> Iterator[_Generator]:
    """Within: how this model generates. The student of a method has its averaged weights."""
    from functools import partial

    from distill.core.limits import check_guidance_scale
    from distill.methods.base import Distillation
    from distill.sampling import distilled, sampler_of
    from distill.sampling.guided import guided

    if isinstance(model, Distillation):
        if guidance is not None:
            raise ValueError(f"guidance={guidance}: a student needs none; leave it out")
        sampler = make(settings.sampler, "sampler")
        with _averaged(model):
            yield _Generator(model.teacher, partial(sampler, model.student))
    elif distilled(model.pipeline):
        if guidance is not None:
            raise ValueError(f"guidance={guidance}: a student needs none; leave it out")
        yield _Generator(model, partial(sampler_of(model.pipeline), model))
    else:
        if guidance is None:
            what = "a teacher was not distilled to few steps"
            raise ValueError(f"guidance=None: {what}; give guidance=5, steps=28 or the like")
        check_guidance_scale(guidance, "guidance")
        yield _Generator(model, partial(guided, model, guidance=guidance))


@contextmanager
def _averaged(method: Distillation) -> Iterator[None]:
    """Within: the student has its averaged weights, is in eval mode, and is on the teacher's
    device.
    """
    if method.sharded:
        what = "its networks are sharded over processes"
        raise ValueError(f"trainer=fsdp2: {what}; use student/ of the run folder instead")
    student = method.student.to(method.teacher.device)
    training = student.training
    with method.ema.swap():
        student.eval()
        try:
            yield
        finally:
            student.train(training)


@with_plain_errors
def save_student(settings: DictConfig, method: Distillation, folder: str | Path) -> Path:
    """Write the averaged student as a diffusers pipeline, and return its folder.

    The folder equals the `student/` of a run. It holds the student's network, the scheduler of the
    settings' sampler, and the other parts of the teacher's pipeline. LoRA adapters are merged into
    the network. Training can continue afterwards.

    Raises:
        FileExistsError: if the path exists.
    """
    from distill.students import save_pipeline

    path = Path(folder)
    if path.exists():
        raise FileExistsError(f"folder={path}: is there already; remove it or name another")
    sampler = make(settings.sampler, "sampler")
    with _averaged(method):
        scheduler = sampler.scheduler(method.student, method.teacher)
        return save_pipeline(method.student, method.teacher, path, scheduler, sampler)
