"""The names that a pattern with braces stands for: x-{000..003}.tar."""

import re

from braceexpand import braceexpand

from distill.terminal.shown import shown

MOST_SHARDS = 2**20  # ours: the largest public sets have a quarter of it
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")  # of numbers, in braces


def names_of(pattern: str) -> list[str]:
    """The names that the braces of a pattern stand for. Raises FileNotFoundError for too
    many: not all can be there."""
    if _most_names(pattern) > MOST_SHARDS:
        what = f"its braces stand for more than {MOST_SHARDS:,} shards"
        raise FileNotFoundError(f"data.path={shown(pattern, 80)}: {what}; write a smaller range")
    return list(braceexpand(pattern))


def _most_names(pattern: str) -> int:
    """At least as many as the braces stand for; nothing is expanded for it."""
    count, commas = 1, []  # those of each open brace
    for first, last in RANGE.findall(pattern):
        if max(len(first), len(last)) > 18:
            return MOST_SHARDS + 1
        count *= abs(int(last) - int(first)) + 1
    for letter in pattern:
        if letter == "{":
            commas.append(0)
        elif letter == "," and commas:
            commas[-1] += 1
        elif letter == "}" and commas:
            count *= commas.pop() + 1
    return count
