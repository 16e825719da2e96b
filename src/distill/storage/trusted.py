"""Packages of the user's own, by their environment or by what they have installed.

    DISTILL_TRUST=mypackage,other     packages that one's own command line may name

Installed packages with an entry point of the group `distill` count as named there.
"""

import os
from functools import cache
from importlib.metadata import entry_points

TRUST = "DISTILL_TRUST"


def is_trusted(name: str) -> bool:
    """Whether the user's environment or an installed package lets this dotted name in."""
    return any(name.startswith(f"{root}.") for root in roots())


def roots() -> tuple[str, ...]:
    """The modules and packages that the user trusts."""
    given = [word.strip() for word in os.environ.get(TRUST, "").split(",")]
    return tuple(root for root in (*given, *plugins()) if root)


@cache
def plugins() -> tuple[str, ...]:
    """Modules of the entry points that installed packages have in the group `distill`."""
    return tuple(point.module for point in entry_points(group="distill"))
