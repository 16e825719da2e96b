"""The gradio page: settings go to the worker, and generated pictures come back."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from distill.demonstration import html
from distill.demonstration.generation import Generation, Models, Request
from distill.demonstration.worker import Dropped, Worker
from distill.machine.faults import first_line

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
import gradio as gr

log = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio requests its own page at start
CHOICES = (1, 2, 3, 4, 8)  # offered numbers of student steps, besides the initial ones
MOST = 8  # pictures of a column
LAST = 1000  # priority of the teacher: after every student
WITH_MOMENT = "(...inputs) => [...inputs.slice(0, -1), performance.now()]"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")
EMPTY = "Type what the picture should show."
STRENGTH = "1 keeps nothing of the picture"
OTHERS = ("a photo of a fox in the snow",)
CAPTIONS = (
    "a large red star on black",
    "a small striped green triangle on pink",
    "a yellow square to the left of a purple cross",
    "a dotted orange circle above a blue square on white",
)


class Page:
    """`launch` starts the server and returns; every change on the page calls `generate`."""

    def __init__(self, models: Models, worker: Worker, cfg: DictConfig):
        self.models, self.worker, self.cfg = models, worker, cfg
        given = OmegaConf.to_container(cfg).get("steps")
        self.initial_steps = sorted({given} if isinstance(given, int) else set(given))
        for steps in self.initial_steps:
            models.sampler.grid(steps, student=models.student)
        known = models.student_steps(max(CHOICES))
        self.choices = sorted({n for n in CHOICES if n in known} | set(self.initial_steps))
        self.captions = CAPTIONS if models.judge else ()
        self.columns: dict[tuple[str, int], gr.HTML] = {}
        self.blocks = self._blocks()

    def launch(self, host: str, port: int, *, open_browser: bool) -> None:
        hosts = {*os.environ.get("NO_PROXY", "").split(","), host} - {""}
        os.environ["NO_PROXY"] = ",".join(sorted(hosts))  # a proxy could not reach the page
        theme = gr.themes.Default(font=FONTS, font_mono=MONO, primary_hue="blue").set(
            block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300"
        )
        self.blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=theme,
            css=html.CSS,
        )

    def close(self) -> None:
        self.blocks.close(verbose=False)

    def _blocks(self) -> gr.Blocks:
        """The components from top to bottom, with their events."""
        with gr.Blocks(title="distill", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.HTML(html.heading(self.cfg.run, self.models.about()))
            prompt = self._prompt()
            with gr.Row(elem_classes="board"):
                for steps in self.choices:
                    self._column("student", steps, visible=steps in self.initial_steps)
                if self.models.teacher:
                    self._column("teacher", 0, visible=True)
            status = gr.HTML(html.status(None, 0, 0))
            if self.captions:
                examples = [[caption] for caption in self.captions]
                gr.Examples(examples, [prompt], label="Captions of shapes")
            inputs = [prompt, *self._settings()]
            gr.HTML(html.ABOUT, elem_classes="about")
            gr.on(
                [page.load, *(component.change for component in inputs)],
                self.generate,
                [*inputs, gr.Number(visible=False)],
                [*self.columns.values(), status],
                js=WITH_MOMENT,
                show_progress="hidden",
                trigger_mode="multiple",  # the worker drops old requests, also running ones
                concurrency_limit=None,
                api_visibility="private",
            )
        return page

    def _prompt(self) -> gr.Textbox:
        first = self.cfg.prompt or (self.captions or OTHERS)[0]
        return gr.Textbox(first, label="What the picture shows", autofocus=True, elem_id="prompt")

    def _column(self, who: str, steps: int, *, visible: bool) -> None:
        name = f"{who}-{steps}" if steps else who
        self.columns[who, steps] = gr.HTML(elem_id=name, elem_classes="drawn", visible=visible)

    def _settings(self) -> list[Any]:
        """The components of `generate`'s arguments after the prompt, in their order."""
        cfg = self.cfg
        with gr.Row(equal_height=False):
            with gr.Column():
                label = "Steps of the student, a column each"
                chosen = gr.CheckboxGroup(self.choices, value=self.initial_steps, label=label)
                seed = gr.Number(cfg.seed, label="Seed", minimum=0, maximum=2**32, precision=0)
                count = gr.Slider(1, max(MOST, cfg.count), cfg.count, step=1, label="Pictures")
            with gr.Column():
                image = gr.Image(
                    type="pil",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Start from a picture",
                    height=150,
                    buttons=[],
                )
                strength = gr.Slider(
                    0.05, 1, cfg.strength, step=0.05, label="Strength", info=STRENGTH
                )
            with gr.Column(visible=self.models.teacher is not None):
                most = max(50, cfg.teacher_steps)
                steps = gr.Slider(1, most, cfg.teacher_steps, step=1, label="Steps of the teacher")
                most = max(10, cfg.guidance)
                guidance = gr.Slider(
                    1, most, cfg.guidance, step=0.5, label="Guidance of the teacher"
                )
        return [chosen, seed, count, image, strength, steps, guidance]

    async def generate(
        self,
        prompt: str,
        chosen: list[int],
        seed: int | None,
        count: int,
        image: Image.Image | None,
        strength: float,
        teacher_steps: int,
        guidance: float,
        moment: float,
        tab: gr.Request,
    ) -> AsyncIterator[list[Any]]:
        """Yield updates of the page when columns are ready, until the page has changed again.

        The arguments are the settings on the page, and the `moment` of its clock when it sent them.
        """
        request = Request(prompt.strip(), seed or 0, count, guidance, image, strength)
        asked = [("student", n, n) for n in sorted(chosen)]
        if self.models.teacher:
            asked.append(("teacher", 0, teacher_steps))
        if not request.prompt:
            self.worker.submit(tab.session_hash, [], moment)
            yield self._updates({}, EMPTY)
            return
        jobs = [
            (LAST if who == "teacher" else steps, self.models.job(who, request, steps))
            for who, _, steps in asked
        ]
        futures = self.worker.submit(tab.session_hash, jobs, moment)
        columns, problem = self._marked_old(asked), None
        yield self._updates(columns, problem)
        results = [_result(*each) for each in zip(asked, futures, strict=True)]
        for result in asyncio.as_completed(results):
            (who, key, steps), drawn = await result
            if isinstance(drawn, Dropped):
                yield [gr.skip()] * (len(self.columns) + 1)  # gradio sends the last update again
                return
            if isinstance(drawn, Generation):
                shown = html.column(who, steps, drawn, request, reads=self.models.judge is not None)
                problem = problem or too_long(drawn.unread)
            else:
                shown = html.refused(who, steps, in_words(drawn))
            columns[who, key] = gr.HTML(shown, elem_classes="drawn", visible=True)
            # All known columns: of several quick updates the browser only shows the last.
            yield self._updates(columns, problem)

    def _marked_old(self, asked: list[tuple[str, int, int]]) -> dict[tuple[str, int], Any]:
        """Show the wanted columns, and mark their content as old."""
        wanted = {(who, key) for who, key, _ in asked}
        return {
            key: gr.HTML(elem_classes=["drawn", "old"], visible=key in wanted)
            for key in self.columns
        }

    def _updates(self, columns: dict[tuple[str, int], Any], problem: str | None) -> list[Any]:
        """A value for each output of `generate`."""
        status = html.status(problem, self.worker.requests, self.worker.dropped)
        return [*(columns.get(key, gr.skip()) for key in self.columns), status]


async def _result(asked: tuple[str, int, int], future: Future) -> tuple[tuple[str, int, int], Any]:
    """The request, and its result or exception."""
    try:
        return asked, await asyncio.wrap_future(future)
    except Exception as error:
        return asked, error


def too_long(unread: str | None) -> str | None:
    if not unread:
        return None
    return f"The text is longer than the model reads, which ends before \u201c{unread[:40]}\u201d."


def in_words(error: Exception) -> str:
    """An error as a sentence for the page; bugs are also logged with their traceback."""
    if isinstance(error, ValueError):
        return first_line(error)
    log.error("generating failed", exc_info=error)
    return f"Generating failed ({first_line(error)}); the terminal shows more."
