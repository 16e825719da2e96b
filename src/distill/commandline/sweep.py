"""The jobs of `-m`: a job that fails does not stop the sweep; the end lists the failed ones."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig

from distill.config.compose import overrides
from distill.config.typed import masked_override
from distill.machine import signals
from distill.terminal.secret import masked

HERE = "BasicLauncher"  # the launcher that runs jobs in this process; others handle failures


class Sweep:
    """Without `-m` it does nothing."""

    def __init__(self) -> None:
        self.asked = not {"-m", "--multirun"}.isdisjoint(sys.argv)
        self.typed: dict[str, str] = {}  # argument for Hydra -> argument as it was typed
        self._jobs = 0
        self._failed: list[str] = []

    @contextmanager
    def job(self) -> Iterator[None]:
        """Record an error of the job inside, and let the sweep continue. A signal ends both."""
        self._jobs += 1
        try:
            yield
        except SystemExit as end:
            if not self._continues() or not end.code:
                raise
            notes = getattr(end, "__notes__", None) or [f"exit code {end.code}"]
            self._record(notes[0])
        except Exception as error:
            if not self._continues():
                raise
            traceback.print_exc()
            self._record(f"{type(error).__name__}: {error}")

    def end(self) -> None:
        """Print the failed jobs; raises SystemExit if there are any."""
        if self._failed:
            print(f"distill: {len(self._failed)} of {self._jobs} jobs failed", file=sys.stderr)
            print("\n".join(self._failed), file=sys.stderr)
            raise SystemExit(1)

    def _continues(self) -> bool:
        here = self.asked and str(HydraConfig.get().launcher._target_).endswith(HERE)
        return here and signals.received() is None

    def _record(self, message: str) -> None:
        # Hydra writes `~group` as `~group=null`.
        typed = [self.typed.get(x, self.typed.get(x.removesuffix("=null"), x)) for x in overrides()]
        arguments = masked(" ".join(map(masked_override, typed)))
        self._failed.append(f"  {arguments}: {' '.join(message.split())}")
