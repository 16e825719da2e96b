"""A user's own mistake is said in one sentence, exit code 1, without a traceback; HYDRA_FULL_ERROR=1 shows it all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MISTAKES = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


@contextmanager
def said_plainly() -> Iterator[None]:
    """Turn a mistake of the user into `distill: <sentence>` on stderr; anything else stays a bug with its traceback."""
    try:
        yield
    except Exception as error:
        cause = _root(error)
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not isinstance(cause, MISTAKES):
            raise
        print(f"distill: {cause}", file=sys.stderr)
        raise SystemExit(1) from None


def _root(error: BaseException) -> BaseException:
    """What went wrong first: Hydra wraps an exception of a constructor in one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
