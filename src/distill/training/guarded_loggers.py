"""Loggers beside `metrics.csv`, TensorBoard or a tracker: what fails in mid-run ends no run.

    guarded.spared(logger)   # once it has logged a row, its failures are warnings

One that cannot log the first row is set up wrongly, and ends the run before any time is lost.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from distill.machine.faults import first_line

log = logging.getLogger(__name__)
CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
TRIES = (
    3  # ours: failures in a row after which it is asked no more, since each may wait for a network
)


class _Spared:
    """The calls of one logger, and how often it has failed."""

    def __init__(self, logger: Logger):
        self.name = type(logger).__name__
        self.works = False  # it has logged a row
        self.failed = 0  # times in a row

    def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.failed >= TRIES:
            return None
        try:
            result = method(*args, **options)
        except Exception as error:  # a tracker may raise anything
            self._tell(error)
            return None
        if method.__name__ == "log_metrics":  # others may have nothing to do
            self.failed, self.works = 0, True
        return result

    def _tell(self, error: Exception) -> None:
        said = f"{self.name} cannot log ({type(error).__name__}: {first_line(error, 200)})"
        if not self.works:
            raise OSError(f"{said}; repair it, or leave it out as ~logger.<its name>") from error
        self.failed += 1
        if self.failed in (1, TRIES):
            more = "it is asked no more" if self.failed == TRIES else "the run goes on"
            log.warning("%s; %s, and metrics.csv has every row", said, more)


def spared(logger: Logger) -> Logger:
    """The same logger, whose failures in mid-run are warnings."""
    guard = _Spared(logger)
    for name in CALLS:
        method = getattr(logger, name)
        setattr(logger, name, functools.wraps(method)(functools.partial(guard.call, method)))
    return logger
