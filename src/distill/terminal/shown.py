"""Escape values for output: text from files must not act in a terminal, on a page or in markdown.

Names in shards, captions, folders, runs and results may hold line breaks, terminal escape codes,
bidirectional control characters, and HTML. All code that shows such values escapes them by these
functions.

    shown(value)          one line for a terminal or a log
    in_html(value)        for a page, between tags and in quoted attributes
    in_markdown(value)    for markdown, including table cells
    in_csv(value)         for a cell of a CSV, which a spreadsheet must not read as a formula

Nothing here imports a slow library.
"""

import html
import re
from typing import Any

MOST = 2000  # ours: characters of a value in one line
# Control characters, line separators, surrogates, and bidirectional controls, which make a name
# read as another. Joiners (U+200D) stay, since scripts and emoji need them.
ACTING = "\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_LINE = re.compile(f"[{ACTING}]")
_IN_LINES = re.compile(f"(?![\n\t])[{ACTING}]")
# Printed text may also have line ends, tabs, and colours, which logging and libraries use.
_PRINTED = re.compile(f"\x1b\\[[0-9;]*m|\x1b\\[A|[\n\r\t]|([{ACTING}])")
_MARKDOWN = re.compile(r"[\\`|*<]|\](?=[(\[:])")
# First characters of a formula, also in their full-width forms; tabs and line ends are escaped.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def shown(value: Any, most: int = MOST) -> str:
    """A value as one line of plain text: control characters are escaped (`\\x1b`), long text is
    cut.
    """
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return _IN_LINE.sub(_escape, text)


def in_lines(value: str) -> str:
    """A text with escaped control characters except line ends and tabs; not cut."""
    return _IN_LINES.sub(_escape, value)


def printed(text: str) -> str:
    """Printed text with escaped control characters except line ends, tabs, colours, and moves to
    the start of a line or the line above.
    """
    return _PRINTED.sub(lambda match: _escape(match) if match[1] else match[0], text)


def in_html(value: Any) -> str:
    """A value as text between tags, or in an attribute in quotes."""
    return html.escape(shown(value))


def lines_in_html(value: str) -> str:
    """A text of several lines for <pre>."""
    return html.escape(in_lines(value))


def in_markdown(value: Any) -> str:
    """A value as text in a line or table cell of markdown."""
    return _MARKDOWN.sub(_backslashed, shown(value))


def in_csv(value: Any) -> Any:
    """A value for a cell of a CSV; texts that start like a formula get a leading '.

    A spreadsheet would calculate them (OWASP). Numbers, also as text, and None stay.
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
