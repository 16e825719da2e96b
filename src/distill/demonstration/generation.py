"""Generate pictures for the page: by a student, and by its teacher in many steps."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from distill.config import models
from distill.core.limits import check_strength
from distill.evaluation.features import to_model_input
from distill.machine.hardware import device
from distill.sampling import distilled, rounds_up, seeded, to_bytes
from distill.sampling.guided import guided_steps
from distill.storage.pictures import to_rgb
from distill.worlds.shapes.frames import LEAST
from distill.worlds.shapes.grammar import parse
from distill.worlds.shapes.judge import Judge
from distill.worlds.shapes.reader import CHOICES, SLOTS, targets
from distill.worlds.shapes.world import SIDE, Prompt

QUESTIONS = [  # in the order of a caption
    *(f"{name}{slot}" for slot in range(SLOTS) for name in ("size", "fill", "colour", "kind")),
    *("axis", "background", "count"),
]


@dataclass(frozen=True)
class Request:
    """The settings of the page; `seed` is that of the first picture, `guidance` the teacher's."""

    prompt: str
    seed: int = 0
    count: int = 1
    guidance: float = 4.0
    image: Image.Image | None = None
    strength: float = 0.5


@dataclass(frozen=True)
class Answer:
    """A question to the reader: what the prompt `said`, and what is `seen` in each picture."""

    question: str
    said: str
    seen: tuple[str, ...]

    @property
    def right(self) -> int:
        """The number of pictures that match the prompt."""
        return self.seen.count(self.said)


@dataclass(frozen=True)
class Generation:
    """Pictures, uint8 [N, 3, H, W], and the seconds that they took together.

    `answers` are those of the reader, None if it cannot read the pictures or the prompt. `unread`
    is the truncated end of a prompt that is too long.
    """

    pictures: Tensor
    seconds: float
    answers: list[Answer] | None
    unread: str | None


class Models:
    """A student, and its teacher or None.

    Jobs must run in one thread: see `worker.Worker`. `size` is pixels a side or [width, height];
    None: the size that each model was trained for.
    """

    def __init__(self, student: Any, teacher: Any, sampler: Any, size: Any = None):
        self.student, self.teacher, self.sampler, self.size = student, teacher, sampler, size
        of_shapes = student.sides_of(student.latent_shape) == (SIDE, SIDE)
        readable = of_shapes and min(self._sides(student)) >= LEAST
        self.judge = Judge.load() if readable else None

    @classmethod
    def load(cls, run: str, teacher: str | None, *, size: Any, dtype: str) -> Models:
        """Load both. Raises ValueError for a run that was not distilled, or a wrong size."""
        student = models.student_of(run, dtype).to(device())
        if not distilled(student.pipeline):
            raise ValueError(
                f"run={run}: was not distilled to few steps; "
                f"give a student, and this as teacher={run}"
            )
        found = (
            models.student_of(teacher, dtype) if teacher else models.teacher_of_student(run, dtype)
        )
        sampler = models.sampler_of(run, student)
        return cls(student, found and found.to(device()), sampler, size)

    def warm_up(self) -> None:
        """Generate once: the first picture takes longer, and the page should not measure that."""
        for who in ("student", "teacher") if self.teacher else ("student",):
            for _ in self.job(who, Request("a red star"), 1):
                pass

    def student_steps(self, most: int = 8) -> list[int]:
        """The numbers of steps, up to `most`, for which the student's sampler has levels."""
        known = []
        for steps in range(1, most + 1):
            try:
                self.sampler.grid(steps, student=self.student)
            except ValueError:
                break
            known.append(steps)
        return known

    def job(self, who: str, request: Request, steps: int) -> Generator[None, None, Generation]:
        """Generate by `student` or `teacher`, yielding between steps.

        Raises ValueError with a sentence for the page.
        """
        if request.image is not None:
            self._check_strength(who, request.strength, steps)
        pixels, seconds = yield from timed(self._pixels(who, request, steps))
        answers = None
        prompt = self.judge and parse(request.prompt)
        if prompt:
            answers = read(self.judge, pixels, prompt)
        return Generation(pixels, seconds, answers, self.student.unread([request.prompt]))

    def _check_strength(self, who: str, strength: float, steps: int) -> None:
        model = self.student if who == "student" else self.teacher
        try:
            check_strength(steps, strength, rounds_up(model))
        except ValueError:
            few = "1 step" if steps == 1 else f"{steps} steps"
            what = f"strength {strength:g} of {few} leaves no step"
            raise ValueError(f"{what}: it must be at least {1 / steps:g}") from None

    @torch.no_grad()
    def _pixels(self, who: str, request: Request, steps: int) -> Iterator[Any]:
        """Yield every estimate of the latents, then the pictures, uint8 [N, 3, H, W]."""
        model = self.student if who == "student" else self.teacher
        options: dict[str, Any] = {"shape": model.shape_of(self.size), "steps": steps}
        if request.image is not None:
            height, width = self._sides(model)
            start = model.encode(
                to_model_input(to_rgb(request.image), width, height).to(model.device)
            )
            options["image"] = start.expand(request.count, -1, -1, -1)
            options["strength"] = request.strength
        cond = model.embed([request.prompt] * request.count)
        noise = seeded(range(request.seed, request.seed + request.count))
        if who == "teacher":
            options["guidance"] = request.guidance
            estimates = guided_steps(model, cond, noise, **options)
        else:
            estimates = self.sampler.estimates(model, cond, noise, **options)
        for latents in estimates:
            yield latents
        yield to_bytes(model.pictures(latents))

    def about(self) -> str:
        """The models and the device, as one line."""
        where = self.student.device.type
        if where == "cpu":
            threads = torch.get_num_threads()
            where = f"the CPU with {threads} thread" + ("s" if threads > 1 else "")
        else:
            where = torch.cuda.get_device_name(self.student.device)
        models_text = f"a student of {_size(self.student)}"
        if self.teacher:
            models_text += f" beside its teacher of {_size(self.teacher)}"
        return f"{models_text}, on {where}"

    def _sides(self, model: Any) -> tuple[int, int]:
        """Height and width of a model's pictures."""
        height, width = model.shape_of(self.size)[1:]
        return height * model.unit // model.patch, width * model.unit // model.patch


def _size(model: Any) -> str:
    """The parameters of a model's denoiser."""
    count = sum(p.numel() for p in model.network.parameters())
    return f"{count / 1e9:.1f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"


def timed(steps: Iterator[Any]) -> Generator[None, None, tuple[Any, float]]:
    """Yield after each step; returns the last value, and the seconds of all steps.

    The time between steps does not count.
    """
    seconds, last = 0.0, None
    while True:
        began = time.perf_counter()
        try:
            last = next(steps)
        except StopIteration:
            return last, seconds
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        yield


def read(judge: Judge, pictures: Tensor, prompt: Prompt) -> list[Answer]:
    """The reader's answers for pictures, uint8 [N, 3, H, W], to the questions of the prompt."""
    _, read_answers = judge.read(pictures.float() / 127.5 - 1)
    expected = targets([prompt])
    answers = []
    for question in QUESTIONS:
        index = int(expected[question][0])
        options = [str(option) for option in CHOICES[question]]
        if index >= 0:
            seen = tuple(options[i] for i in read_answers[question].tolist())
            answers.append(Answer(question, options[index], seen))
    return answers
