"""Families whose language model reads a caption in the chat template of its tokenizer.

A template is a program, and comes with the folder. It runs once, in a process with limits
(`render_template.py`), on a caption that marks its place. Captions then stand in the text that it
gave.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from distill.core.types import Cond
from distill.teachers import render_template
from distill.teachers.sized import SizedTeacher
from distill.terminal.shown import shown

MARK = " \0 "  # stands for the caption; its spaces show whether the template strips them
SWAPPED = threading.Lock()  # held while a tokenizer has the short template; threads wait
LONGEST = 120.0  # ours: seconds in which a slow machine starts a Python and imports transformers


class ChatTeacher(SizedTeacher):
    """What these families share. Raises ValueError, at the first caption, for a template that does
    not put it once into a text of its own.
    """

    caption_at = "messages[-1].content"  # the caption's place in a conversation, for Jinja
    template_options: ClassVar[dict[str, Any]]  # with which the pipeline calls the template

    def __init__(self, path: str, **options: Any):
        super().__init__(path, **options)
        self._templated = self.pipeline.tokenizer  # a tokenizer, or a processor with one

    @property
    def _tokenizer(self) -> Any:
        return getattr(self._templated, "tokenizer", self._templated)

    def _conversation(self, caption: str) -> list[dict[str, Any]]:
        """The messages that the template is given."""
        return [{"role": "user", "content": caption}]

    @abstractmethod
    def _embedded(self, captions: list[str]) -> Cond:
        """Captions, embedded by the pipeline."""

    @cached_property
    def _around(self) -> tuple[str, str, bool]:
        """The text before the caption and after it, and whether spaces around it are stripped."""
        template = self._templated.chat_template
        if isinstance(template, Mapping):
            template = template.get("default")
        where = f"teacher.path={self.folder or self.pipeline.name_or_path}: its chat template"
        if not template:
            raise ValueError(f"{where} is missing (chat_template in tokenizer/); fetch it anew")
        variables = {**self._tokenizer.special_tokens_map, **self.template_options}
        text = rendered(template, self._conversation(MARK), variables, where)
        stripped = MARK not in text
        parts = text.split(MARK.strip(" ") if stripped else MARK)
        if len(parts) != 2:
            what = f"gives a text that has the caption {len(parts) - 1} times"
            raise ValueError(f"{where} {what}, and it must stand there once; fetch it anew")
        return parts[0], parts[1], stripped

    def _encode(self, captions: list[str]) -> Cond:
        before, after, stripped = self._around
        caption = f"{self.caption_at} | trim" if stripped else self.caption_at
        part = self._templated
        with SWAPPED:
            theirs = part.chat_template
            part.chat_template = f"{{{{ {before!a} }}}}{{{{ {caption} }}}}{{{{ {after!a} }}}}"
            try:
                return self._embedded(captions)
            finally:
                part.chat_template = theirs  # what a student's folder gets

    def _longest_tokenizer(self) -> tuple[Any, int]:
        # The template's tokens before the caption. Those after it are cut first.
        tokenizer = self._tokenizer
        template = len(tokenizer(self._around[0], add_special_tokens=False).input_ids)
        return tokenizer, self.length - template + len(tokenizer("").input_ids)


def rendered(
    template: str, conversation: list[dict[str, Any]], variables: dict[str, Any], where: str
) -> str:
    """The text that a chat template gives for a conversation; errors start with `where`."""
    question = {"path": sys.path, "template": template, "conversation": conversation}
    command = [sys.executable, "-I", str(Path(render_template.__file__))]
    asked = json.dumps(question | {"variables": variables})
    why = "it was stopped"
    try:
        answer = subprocess.run(
            command, input=asked, capture_output=True, encoding="utf-8", timeout=LONGEST
        )
        if answer.returncode == 0:
            return str(json.loads(answer.stdout))
        if answer.returncode > 0:  # below 0: the limit of time ended it
            why = (answer.stderr.strip().splitlines() or [why])[-1]
    except subprocess.TimeoutExpired:
        pass
    limits = f"{render_template.SECONDS} s and {render_template.MEMORY >> 20} MiB"
    what = f"gives no text within {limits} ({shown(why, 120)})"
    raise ValueError(f"{where} {what}; fetch it anew")
