"""Loggers other than `metrics.csv`: their failures during a run do not end it.

    guarded_loggers.guarded(logger)   # after its first row its failures are warnings

A logger that cannot log its first row is set up wrongly, and ends the run at once.
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
MAX_FAILURES = 3  # ours: in a row; then it is no longer called, since each may wait for a network


class _Guard:
    """The calls of one logger, and how often they failed."""

    def __init__(self, logger: Logger):
        self.name = type(logger).__name__
        self.has_logged = False
        self.failed = 0  # times in a row

    def call(self, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.failed >= MAX_FAILURES:
            return None
        try:
            result = method(*args, **options)
        except Exception as error:  # a tracker may raise anything
            self._report(error)
            return None
        if method.__name__ == "log_metrics":  # other calls may do nothing
            self.failed, self.has_logged = 0, True
        return result

    def offer(self, call: Callable[..., Any], *args: Any) -> None:
        """Call something beside the rows, such as a picture; a failure is only a warning."""
        if self.failed >= MAX_FAILURES:
            return
        try:
            call(*args)
        except Exception as error:  # a tracker may raise anything
            self._warn(error)

    def _report(self, error: Exception) -> None:
        if not self.has_logged:
            what = f"{self._said(error)}; repair it, or leave it out as ~logger.<its name>"
            raise OSError(what) from error
        self._warn(error)

    def _said(self, error: Exception) -> str:
        return f"{self.name} cannot log ({type(error).__name__}: {first_line(error, 200)})"

    def _warn(self, error: Exception) -> None:
        self.failed += 1
        if self.failed in (1, MAX_FAILURES):
            more = "it is no longer called" if self.failed == MAX_FAILURES else "the run continues"
            log.warning("%s; %s, and metrics.csv has every row", self._said(error), more)


def guarded(logger: Logger) -> Logger:
    """The same logger, whose failures after the first row are warnings."""
    guard = logger.guard = _Guard(logger)  # `trackers.logged` offers pictures by it
    for name in CALLS:
        method = getattr(logger, name)
        setattr(logger, name, functools.wraps(method)(functools.partial(guard.call, method)))
    return logger
