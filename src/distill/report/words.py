"""Numbers and values as a reader wants to see them."""

from __future__ import annotations

import math
from html import escape


def is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def none(sentence: str) -> str:
    """The paragraph that stands where there is nothing to show."""
    return f'<p class="none">{escape(sentence)}</p>'


def percent(x: float) -> str:
    """A share as it is spoken of; 99.7 % is not 100 %, and 0.2 % is not nothing."""
    near_an_end = 0 < x < 0.01 or 0.99 < x < 1
    return f"{100 * x:.1f}\N{NO-BREAK SPACE}%" if near_an_end else f"{100 * x:.0f}\N{NO-BREAK SPACE}%"


def number(x: float) -> str:
    """Three significant digits, without an exponent where the number can be read at sight."""
    if x == 0 or 1e-3 <= abs(x) < 1e6:
        return f"{x:,.0f}" if abs(x) >= 100 or x == 0 else f"{x:#.3g}"
    return f"{x:.1e}".replace("e-0", "e-").replace("e+0", "e")


def steps(n: int) -> str:
    return f"{n:,} step" if n == 1 else f"{n:,} steps"


def spelt(n: int) -> str:
    return ("one", "two", "three", "four")[n - 1] if 1 <= n <= 4 else f"{n:,}"


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 59.5:
        return f"{minutes:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def spoken(x: object) -> str:
    """Any value of a JSON file in one line."""
    if isinstance(x, dict):
        return ", ".join(f"{key} {spoken(value)}" for key, value in x.items())
    if isinstance(x, list):
        return ", ".join(map(spoken, x))
    if isinstance(x, bool) or x is None:
        return {True: "yes", False: "no", None: "none"}[x]
    return f"{x:,}" if isinstance(x, int) and abs(x) >= 10_000 else str(x)
