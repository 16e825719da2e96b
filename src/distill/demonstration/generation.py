"""What the page asks for, and how it is drawn: by a student, and by its teacher in many steps."""

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
from distill.worlds.shapes.grammar import parse
from distill.worlds.shapes.judge import Judge
from distill.worlds.shapes.reader import CHOICES, SLOTS, targets
from distill.worlds.shapes.world import SIDE, Prompt

QUESTIONS = [  # in the order in which a caption answers them
    *(f"{name}{slot}" for slot in range(SLOTS) for name in ("size", "fill", "colour", "kind")),
    *("axis", "background", "count"),
]


@dataclass(frozen=True)
class Request:
    """What is on the page; `seed` is that of the first picture, `guidance` the teacher's."""

    prompt: str
    seed: int = 0
    count: int = 1
    guidance: float = 4.0
    image: Image.Image | None = None
    strength: float = 0.5


@dataclass(frozen=True)
class Answer:
    """An answer of the reader: what the prompt `said`, and what it has `seen` in each picture."""

    question: str
    said: str
    seen: tuple[str, ...]

    @property
    def right(self) -> int:
        """In how many pictures."""
        return self.seen.count(self.said)


@dataclass(frozen=True)
class Generation:
    """Pictures, uint8 [N, 3, H, W], and how long they took in all.

    `words` is what the reader says, None where it cannot read; `unread` the end of a text that is
    too long.
    """

    pictures: Tensor
    seconds: float
    words: list[Answer] | None
    unread: str | None


class Models:
    """A student and the teacher it is shown beside, None for none.

    Its jobs are for one thread: see `worker.Worker`. `size` is of the pictures, pixels a side or
    [width, height]; None: what each model was trained for.
    """

    def __init__(self, student: Any, teacher: Any, sampler: Any, size: Any = None):
        self.student, self.teacher, self.sampler, self.size = student, teacher, sampler, size
        sides = self._sides(student)
        self.judge = Judge.load() if sides == (SIDE, SIDE) else None

    @classmethod
    def load(cls, run: str, teacher: str | None, *, size: Any, dtype: str) -> Models:
        """Raises ValueError for a run that was not distilled, or a size that it cannot draw."""
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
        """Draw once unseen: the page should not measure what a first picture takes longer."""
        for who in ("student", "teacher") if self.teacher else ("student",):
            for _ in self.job(who, Request("a red star"), 1):
                pass

    def student_steps(self, most: int = 8) -> list[int]:
        """The numbers of steps, up to `most`, that the student's sampler has levels for."""
        known = []
        for steps in range(1, most + 1):
            try:
                self.sampler.grid(steps, student=self.student)
            except ValueError:
                break
            known.append(steps)
        return known

    def job(self, who: str, request: Request, steps: int) -> Generator[None, None, Generation]:
        """Draw by `student` or `teacher`, yielding between steps.

        Raises ValueError, in words for the page.
        """
        if request.image is not None:
            self._check_strength(who, request.strength, steps)
        pixels, seconds = yield from timed(self._pixels(who, request, steps))
        words = None
        prompt = self.judge and parse(request.prompt)
        if prompt:
            words = read(self.judge, pixels, prompt)
        return Generation(pixels, seconds, words, self.student.unread([request.prompt]))

    def _check_strength(self, who: str, strength: float, steps: int) -> None:
        model = self.student if who == "student" else self.teacher
        try:
            check_strength(steps, strength, rounds_up(model))
        except ValueError:
            few = "1 step" if steps == 1 else f"{steps} steps"
            what = f"strength {strength:g} of {few} leaves none to draw"
            raise ValueError(f"{what}: it must be at least {1 / steps:g}") from None

    @torch.no_grad()
    def _pixels(self, who: str, request: Request, steps: int) -> Iterator[Any]:
        """Every estimate of the latents, and at last the pictures, uint8 [N, 3, H, W]."""
        model = self.student if who == "student" else self.teacher
        how: dict[str, Any] = {"shape": model.shape_of(self.size), "steps": steps}
        if request.image is not None:
            height, width = self._sides(model)
            start = model.encode(
                to_model_input(to_rgb(request.image), width, height).to(model.device)
            )
            how["image"] = start.expand(request.count, -1, -1, -1)
            how["strength"] = request.strength
        cond = model.embed([request.prompt] * request.count)
        noise = seeded(range(request.seed, request.seed + request.count))
        if who == "teacher":
            how["guidance"] = request.guidance
            estimates = guided_steps(model, cond, noise, **how)
        else:
            estimates = self.sampler.estimates(model, cond, noise, **how)
        for latents in estimates:
            yield latents
        yield to_bytes(model.decode(latents))

    def about(self) -> str:
        """The models and the machine, in a line."""
        where = self.student.device.type
        if where == "cpu":
            threads = torch.get_num_threads()
            where = f"the CPU with {threads} thread" + ("s" if threads > 1 else "")
        else:
            where = torch.cuda.get_device_name(self.student.device)
        said = f"a student of {_size(self.student)}"
        if self.teacher:
            said += f" beside its teacher of {_size(self.teacher)}"
        return f"{said}, on {where}"

    def _sides(self, model: Any) -> tuple[int, int]:
        """Height and width of a model's pictures."""
        height, width = model.shape_of(self.size)[1:]
        return height * model.unit // model.patch, width * model.unit // model.patch


def _size(model: Any) -> str:
    """The parameters of a model's denoiser."""
    count = sum(p.numel() for p in model.network.parameters())
    return f"{count / 1e9:.1f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"


def timed(steps: Iterator[Any]) -> Generator[None, None, tuple[Any, float]]:
    """Yields after each of the steps; returns the last, and the seconds that they took.

    The time between them does not count.
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
    """The reader's answers of pictures, uint8 [N, 3, 64, 64], to all that the prompt settles."""
    _, answers = judge.read(pictures.float() / 127.5 - 1)
    settled = targets([prompt])
    words = []
    for question in QUESTIONS:
        index = int(settled[question][0])
        options = [str(option) for option in CHOICES[question]]
        if index >= 0:
            seen = tuple(options[i] for i in answers[question].tolist())
            words.append(Answer(question, options[index], seen))
    return words
