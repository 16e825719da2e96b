"""HTML of the page: pictures, their times, the reader's answers, and an explanation."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image
from torch import Tensor

from distill.demonstration.generation import Answer, Generation, Request
from distill.report.page import environment

TEMPLATES = Path(__file__).with_name("templates")
SMALL = 256  # pixels a side, up to which pictures are enlarged without interpolation
CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.board { display: grid !important; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(200px, 44%), 1fr)); align-items: start; }
.board > * { min-width: 0 !important; width: auto !important; }
.drawn figure { margin: 0; transition: opacity .2s .25s; }
.drawn.old figure { opacity: .35; }
.drawn figcaption { display: flex; flex-wrap: wrap; justify-content: space-between;
  gap: 0 8px; align-items: baseline; margin-bottom: 6px; }
.drawn .who { font-weight: 600; }
.drawn .time { font-variant-numeric: tabular-nums; }
.drawn .time, .note, .status { color: color-mix(in srgb, var(--body-text-color) 72%, transparent); }
.drawn .pictures { display: grid; gap: 4px; grid-template-columns: 1fr 1fr; }
.drawn .pictures.one { grid-template-columns: 1fr; }
.drawn img { width: 100%; height: auto; display: block; margin: 0; border-radius: 6px;
  border: 1px solid var(--border-color-primary); }
.drawn img.small { image-rendering: pixelated; }
.drawn .words { display: flex; flex-wrap: wrap; gap: 4px; margin: 8px 0 0; padding: 0;
  list-style: none; font-size: 13px; line-height: 1.35; }
.drawn .words li { margin: 0; padding: 1px 7px; border-radius: 9px; border: 1px solid; }
.drawn .right { color: #14713a; border-color: #14713a55; }
.drawn .wrong { color: #b3261e; border-color: #b3261e77; }
.dark .drawn .right { color: #6fd08c; border-color: #6fd08c55; }
.dark .drawn .wrong { color: #ff8a80; border-color: #ff8a8088; }
.gradio-container .html-container { padding: 0; }
h1.run { font-size: 22px; margin: 8px 0 0; overflow-wrap: anywhere; }
.note, .status { font-size: 14px; margin: 8px 0 0; }
.drawn .refused { color: var(--body-text-color); font-size: 14px; padding: 24px 12px; margin: 0;
  border: 1px dashed var(--border-color-primary); border-radius: 6px; }
.status .problem { color: var(--body-text-color); font-weight: 600; }
.about { max-width: 76ch; line-height: 1.55; margin-top: 12px; }
"""
ABOUT = """
<h2>What adversarial distillation is</h2>
<p>A diffusion model removes noise in about 28 steps. With guidance, which makes the picture follow
the text, each step evaluates its network twice.
Adversarial distillation trains a student, which starts as a copy of that teacher, to generate a
picture in one to four steps without guidance.
A discriminator learns to distinguish the student's pictures from real ones (ADD) or from the
teacher's (LADD, NitroFusion), and the student learns to fool it. So one step gives a sharp picture;
a regression would give the blurred mean of all pictures that fit.
The discriminator uses features of a frozen network: DINOv2 of the pixels in ADD, the teacher of
noised latents in LADD, and the teacher's encoder with a changing pool of heads in NitroFusion.
Between its few steps the student's picture is noised again, each time less, so that a later step
can correct an earlier one.</p>
<p>Papers:
<a href="https://arxiv.org/abs/2311.17042">ADD</a>
<a href="https://arxiv.org/abs/2403.12015">LADD</a>
<a href="https://arxiv.org/abs/2412.02030">NitroFusion</a></p>
"""


def _part(macro: str, *arguments: Any) -> Markup:
    """HTML of a macro in templates/parts.html."""
    macros = environment(TEMPLATES).get_template("parts.html").module
    return getattr(macros, macro)(*arguments)


def heading(run: str, about: str) -> Markup:
    return _part("heading", run, about)


def title(who: str, steps: int) -> str:
    return f"{who}, {steps} step" + ("s" if steps > 1 else "")


def column(who: str, steps: int, found: Generation, request: Request, *, reads: bool) -> Markup:
    """A column of generated pictures; `reads`: whether there is a reader for such pictures."""
    name = title(who, steps)
    images = [
        picture(pixels, f"{request.prompt}; {name}, seed {request.seed + i}")
        for i, pixels in enumerate(found.pictures)
    ]
    answers = answer_list(found.answers) if reads else ""
    return _part("column", name, found.seconds, images, answers)


def refused(who: str, steps: int, problem: str) -> Markup:
    """A column without pictures, and the reason."""
    return _part("refused", title(who, steps), problem)


def picture(pixels: Tensor, alternative: str) -> Markup:
    """Pixels, uint8 [3, H, W], as an <img> with embedded data."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.save(file := io.BytesIO(), "PNG", compress_level=1)
    data = Markup(base64.b64encode(file.getvalue()).decode())  # as it is: long values are cut
    return _part("picture", data, alternative, max(image.size) <= SMALL)


def answer_list(answers: list[Answer] | None) -> Markup:
    """The reader's answer to each attribute of the prompt."""
    return _part("answer_list", None if answers is None else list(map(_answer, answers)))


def _answer(answer: Answer) -> tuple[bool, str, str]:
    """Whether it is right, the question, and `red ✓`; `red ✗ green` for a wrong picture; `red 3/4`
    for several pictures.
    """
    right = answer.right == len(answer.seen)
    said, seen = spoken(answer.question, answer.said), spoken(answer.question, answer.seen[0])
    if right:
        mark = "✓"
    elif len(answer.seen) == 1:
        mark = f"✗ {seen}"
    else:
        mark = f"{answer.right}/{len(answer.seen)}"
    name, number = answer.question.rstrip("012"), answer.question[-1:]
    question = f"{name} of object {int(number) + 1}" if number.isdigit() else name
    return right, question, f"{said} {mark}"


def spoken(question: str, answer: str) -> str:
    """An answer of the reader as natural language."""
    if question == "axis":
        return {"horizontal": "side by side", "vertical": "one above the other"}[answer]
    if question == "background":
        return f"on {answer}"
    if question == "count":
        return f"{answer} object" + ("" if answer == "1" else "s")
    return answer


def status(problem: str | None, requests: int, dropped: int) -> Markup:
    """The line below the pictures."""
    return _part("status", problem, requests, dropped)
