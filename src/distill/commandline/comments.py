"""The comments of a YAML file: its header, and the comment beside or above each key."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml

from distill.storage.bounded import LOADER

SENTENCE = re.compile(r".+?\.(?=\s+[A-Z]|$)")


@dataclass(frozen=True)
class Comments:
    """`header` has the lines before the first key, `keys` maps a dotted key to its comment.

    An option in a defaults list is the key `defaults.<group>`.
    """

    header: list[str] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first sentence of the header, without its full stop."""
        paragraph = itertools.takewhile(bool, self.header)
        text = " ".join(" ".join(paragraph).split())
        found = SENTENCE.match(text)
        return (found[0] if found else text).rstrip(". ")


@cache
def read(file: Path) -> Comments:
    """The comments of a file."""
    text = file.read_text(encoding="utf-8")
    return Comments(_header(text), _keys(text))


@cache
def summary(file: Path) -> str:
    """The first sentence of a file's header. Its keys are not read, which would take longer."""
    return Comments(_header(file.read_text(encoding="utf-8"))).summary


def _header(text: str) -> list[str]:
    """The lines of the comment at the top of a file, without `#` and without `@package`."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].removeprefix(" ").rstrip())
    return lines


def _keys(text: str) -> dict[str, str]:
    beside, own_line = _remarks(text)
    top = len(text.splitlines()) - len(text[_top(text) :].splitlines())
    found: dict[str, str] = {}
    taken: set[int] = set()  # the comment of a line with several keys is the first one's
    for key, first, last in _places(yaml.compose(text, Loader=LOADER), ""):
        if first in taken:
            continue
        taken.add(first)
        above = []
        line = first - 1
        while line >= top and line in own_line:
            above.insert(0, own_line[line])
            line -= 1
        comment = " ".join([*above, *([beside[last]] if last in beside else [])])
        if comment:
            found[key] = comment
    return found


def _top(text: str) -> int:
    """The position where the header ends."""
    place = 0
    for line in text.splitlines(keepends=True):
        if not line.startswith("#"):
            break
        place += len(line)
    return place


def _remarks(text: str) -> tuple[dict[int, str], dict[int, str]]:
    """Line -> comment: of comments after a key, and of comments on a line of their own."""
    ends: dict[int, int] = {}  # line -> column behind the last token on it
    for token in yaml.scan(text, Loader=LOADER):
        start, end = token.start_mark, token.end_mark
        if start.index == end.index:
            continue
        for line in range(start.line, end.line):
            ends[line] = -1  # inside a text of several lines, where `#` is a character
        ends[end.line] = max(ends.get(end.line, 0), end.column)
    beside: dict[int, str] = {}
    own_line: dict[int, str] = {}
    for number, line in enumerate(text.splitlines()):
        end = ends.get(number, 0)
        rest = line[end:].lstrip() if end >= 0 else ""
        if rest.startswith("#"):
            (beside if number in ends else own_line)[number] = rest.lstrip("# ").rstrip()
    return beside, own_line


def _places(node: yaml.Node | None, path: str) -> Iterator[tuple[str, int, int]]:
    """(dotted key, its line, the line where its value ends); for a block value its own line."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _places(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        # In a defaults list `override /method: add` is the group method.
        name = key.value.split()[-1].lstrip("/") if path == "defaults." else key.value
        first = key.start_mark.line
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        yield f"{path}{name}", first, first if block else value.end_mark.line
        yield from _places(value, f"{path}{name}.")
