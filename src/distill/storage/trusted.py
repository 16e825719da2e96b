"""Packages that the user trusts, so that the command line may name their classes.

    DISTILL_TRUST=mypackage,other     trusts these packages

Installed packages with an entry point of the group `distill` are trusted too.
"""

import os
from functools import cache
from importlib.metadata import entry_points

TRUST = "DISTILL_TRUST"


def is_trusted(name: str) -> bool:
    """Whether this dotted name lies in a package that the user trusts."""
    return any(name.startswith(f"{root}.") for root in roots())


def roots() -> tuple[str, ...]:
    """The trusted modules and packages: those of the environment, then the installed ones."""
    listed = [name.strip() for name in os.environ.get(TRUST, "").split(",")]
    return tuple(root for root in (*listed, *plugins()) if root)


@cache
def plugins() -> tuple[str, ...]:
    """Modules of the entry points in the group `distill`, of all installed packages."""
    return tuple(point.module for point in entry_points(group="distill"))
