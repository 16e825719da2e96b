"""Parser of captions: the inverse of how `world` describes a scene."""

from __future__ import annotations

import re
from collections.abc import Iterable

from distill.worlds.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
    PHRASINGS,
    SIZES,
    Prompt,
    Thing,
)


def _one_of(words: Iterable[str]) -> str:
    return f"({'|'.join(words)})"


THING = re.compile(
    rf"an? (?:{_one_of(SIZES)} )?(?:{_one_of(FILLS)} )?{_one_of(COLOURS)} {_one_of(KINDS)}"
)
BACKGROUND = re.compile(rf"(.*) on (?:a {_one_of(BACKGROUNDS)} background|{_one_of(BACKGROUNDS)})")


def parse(caption: str) -> Prompt | None:
    """The prompt that a caption states; None for a text that the world would not generate.

    Capitals, spaces and a full stop are ignored, and `an` equals `a`.
    """
    text = " ".join(caption.lower().split()).rstrip(" .")
    background = None
    if found := BACKGROUND.fullmatch(text):
        text, *either = found.groups()
        background = either[0] or either[1]
    for names, axis in _arrangements(text):
        things = [_thing(name) for name in names]
        if all(things) and (len(things) < 3 or not any(thing.size for thing in things)):
            return Prompt(tuple(things), axis, background, caption)
    return None


def _arrangements(text: str) -> list[tuple[list[str], str | None]]:
    """All readings of the text as names along an axis: one name, or a phrasing of several."""
    readings: list[tuple[list[str], str | None]] = [([text], None)]
    for (count, axis), phrasings in PHRASINGS.items():
        for phrasing in phrasings:
            names = [f"(?P<name{i}>.+?)" for i in range(count)]
            if found := re.fullmatch(phrasing.format(*names), text):
                readings.append(([found[f"name{i}"] for i in range(count)], axis))
    return readings


def _thing(name: str) -> Thing | None:
    if not (found := THING.fullmatch(name)):
        return None
    size, fill, colour, kind = found.groups()
    return Thing(kind, colour, fill, size)
