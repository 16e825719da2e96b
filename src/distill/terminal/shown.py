"""How a value is shown: what comes from a file stands as text in a terminal, on a page and in
markdown.

Names in shards, captions, folders, runs and their results may hold line breaks, escape codes of
terminals, marks that turn the direction of writing, and HTML. Whoever shows one passes it through
here, and nobody escapes by himself.

    shown(value)          one line for a terminal or a log
    in_html(value)        the same for a page, between tags and in quoted attributes
    in_markdown(value)    the same for markdown, cells of tables included
    in_csv(value)         the same for a cell of a CSV, which no spreadsheet takes for a formula

Nothing here imports a library that takes long.
"""

import html
import re
from typing import Any

MOST = 2000  # ours: characters of a value in one line
# Controls of terminals and of lines, halves of surrogate pairs, and marks of the direction of
# writing: with the last a name reads as another. Joiners of letters (U+200D) stay, which scripts
# and emoji need.
ACTING = "\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_LINE = re.compile(f"[{ACTING}]")
_IN_LINES = re.compile(f"(?![\n\t])[{ACTING}]")
# What printed text may have besides: ends of lines, tabs, and the colours that logging and
# libraries give theirs.
_PRINTED = re.compile(f"\x1b\\[[0-9;]*m|\x1b\\[A|[\n\r\t]|([{ACTING}])")
_MARKDOWN = re.compile(r"[\\`|*<]|\](?=[(\[:])")
# What a formula begins with, in the wide forms of East Asian fonts too; tabs and ends of lines are
# escaped.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shown(value: Any, most: int = MOST) -> str:
    """A value as one line of plain text: what would act is an escape (`\\x1b`), and what is too
    long is cut.
    """
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return _IN_LINE.sub(_escape, text)


def in_lines(value: str) -> str:
    """The same of a text that may have lines and tabs, whole."""
    return _IN_LINES.sub(_escape, value)


def printed(text: str) -> str:
    """What is printed by anybody: lines, tabs, colours and a line's rewriting pass, nothing else
    that acts.
    """
    return _PRINTED.sub(lambda match: _escape(match) if match[1] else match[0], text)


def in_html(value: Any) -> str:
    """A value as text between tags, or in an attribute in quotes."""
    return html.escape(shown(value))


def lines_in_html(value: str) -> str:
    """A text with its lines, between the tags of `pre`."""
    return html.escape(in_lines(value))


def in_markdown(value: Any) -> str:
    """A value as text in a line of markdown, in a table or not."""
    return _MARKDOWN.sub(_backslashed, shown(value))


def in_csv(value: Any) -> Any:
    """A value for a cell of a CSV: a number or None itself, also one in words; any other text as
    text.

    A spreadsheet calculates what begins like a formula. As OWASP advises a ' stands before that.
    """
    if not isinstance(value, str):
        return value
    text = shown(value)
    return f"'{text}" if text.startswith(FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _backslashed(match: re.Match[str]) -> str:
    return f"\\{match[0]}"


def _escape(match: re.Match[str]) -> str:
    letter = match[0]
    if letter in _NAMED:
        return _NAMED[letter]
    number = ord(letter)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
