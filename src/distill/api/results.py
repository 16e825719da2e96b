"""What a trained student gives: pictures, and a folder that diffusers reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from distill.api.errors import with_plain_errors
from distill.api.settings import given
from distill.config.compose import make

if TYPE_CHECKING:
    from PIL.Image import Image

    from distill.methods.base import Distillation
    from distill.teachers.pipeline import PipelineTeacher


@dataclass(frozen=True)
class _Model:
    """What draws: a teacher that embeds and decodes, and how latents are made of conditions."""

    teacher: Any
    latents: Callable[..., Any]


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
    """Pictures of prompts, as `python -m distill.sample` draws them; what is None is as there.

    Args:
        settings: their sampler is the student's.
        model: a method, whose averaged student draws, trained or not; or a teacher.
        prompts: texts.
        steps: 1 to 4 of a student, 28 or so of a teacher.
        seed: of the first picture of each prompt.
        count: pictures of each prompt, of seeds seed, seed + 1, ...
        guidance: of a teacher, which needs one; of a student None.
        precision: auto, bf16-mixed or 32-true, of the denoiser's passes.

    Returns:
        One picture for each prompt and seed, those of a prompt side by side.

    Raises:
        ValueError: for numbers out of their ranges, a teacher without guidance, or a student with.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts={prompts}: must be a list of texts; write [{prompts!r}]")
    chosen = {"steps": steps, "seed": seed, "count": count, "precision": precision}
    asked = given("sample", chosen)
    jobs = [(text, asked.seed + i) for text in prompts for i in range(asked.count)]
    with _drawing(settings, model, guidance) as drawing:
        return _pictures(drawing, jobs, asked)


def _pictures(model: _Model, jobs: list[tuple[str, int]], asked: DictConfig) -> list[Image]:
    """As many at a time as the command draws."""
    import torch
    from torchvision.transforms.functional import to_pil_image

    from distill.core.limits import drawn_at_once
    from distill.machine.hardware import autocast, memory_left, precision
    from distill.sampling import seeded, to_bytes

    teacher, found = model.teacher, []
    kind = teacher.device.type
    chosen = precision(asked.precision, "cpu" if kind == "cpu" else "auto").name
    sides = teacher.sides_of(teacher.latent_shape)
    many = drawn_at_once(*sides, most=8, room=memory_left(teacher))
    with torch.no_grad():
        for start in range(0, len(jobs), many):
            texts, seeds = zip(*jobs[start : start + many], strict=True)
            cond = teacher.embed(list(texts))
            with autocast(chosen, kind):
                how = {"shape": teacher.latent_shape, "steps": asked.steps}
                x0 = model.latents(cond, seeded(seeds), **how)
            found += [to_pil_image(each) for each in to_bytes(teacher.pictures(x0))]
    return found


@contextmanager
def _drawing(settings: DictConfig, model: Any, guidance: float | None) -> Iterator[_Model]:
    """Within: the model with the averaged weights of its student, where it is a method."""
    from functools import partial

    from distill.methods.base import Distillation
    from distill.sampling import distilled, sampler_of
    from distill.sampling.guided import guided

    if isinstance(model, Distillation):
        if guidance is not None:
            raise ValueError(f"guidance={guidance}: a student needs none; leave it out")
        sampler = make(settings.sampler, "sampler")
        with _averaged(model):
            yield _Model(model.teacher, partial(sampler, model.student))
    elif distilled(model.pipeline):
        if guidance is not None:
            raise ValueError(f"guidance={guidance}: a student needs none; leave it out")
        yield _Model(model, partial(sampler_of(model.pipeline), model))
    else:
        if guidance is None:
            what = "a teacher was not distilled to few steps"
            raise ValueError(f"guidance=None: {what}; give guidance=5, steps=28 or the like")
        yield _Model(model, partial(guided, model, guidance=guidance))


@contextmanager
def _averaged(method: Distillation) -> Iterator[None]:
    """Within: the student has its averaged weights and does not train; it stands by the teacher."""
    if method.sharded:
        what = "its networks are cut up among processes"
        raise ValueError(f"trainer=fsdp2: {what}; use the run's own student/, which is whole")
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
    """Write the averaged student as a diffusers pipeline; the folder, as a run's `student/`.

    It holds the student's network, of a LoRA with the adapters in it, the scheduler of the
    settings' sampler, and the teacher's other parts. The method can be trained on.

    Raises:
        FileExistsError: if something is at this path already.
    """
    from distill.students import save_pipeline

    path = Path(folder)
    if path.exists():
        raise FileExistsError(f"folder={path}: is there already; remove it or name another")
    sampler = make(settings.sampler, "sampler")
    with _averaged(method):
        scheduler = sampler.scheduler(method.student, method.teacher)
        return save_pipeline(method.student, method.teacher, path, scheduler, sampler)
