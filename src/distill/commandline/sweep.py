"""The jobs of `-m`: one that fails is noted, the next begins, and the end lists what failed."""

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

HERE = "BasicLauncher"  # the launcher that runs the jobs in this process; others see to theirs


class Sweep:
    """Without `-m` it does nothing."""

    def __init__(self) -> None:
        self.asked = not {"-m", "--multirun"}.isdisjoint(sys.argv)
        self.typed: dict[str, str] = {}  # word as Hydra reads it -> as it was typed
        self._jobs = 0
        self._failed: list[str] = []

    @contextmanager
    def job(self) -> Iterator[None]:
        """Keep what ends the job inside from ending the sweep. A signal ends both."""
        self._jobs += 1
        try:
            yield
        except SystemExit as end:
            if not self._goes_on() or not end.code:
                raise
            said = getattr(end, "__notes__", None) or [f"exit code {end.code}"]
            self._note(said[0])
        except Exception as error:
            if not self._goes_on():
                raise
            traceback.print_exc()
            self._note(f"{type(error).__name__}: {error}")

    def end(self) -> None:
        """Say which jobs failed; raises SystemExit if any did."""
        if self._failed:
            print(f"distill: {len(self._failed)} of {self._jobs} jobs failed", file=sys.stderr)
            print("\n".join(self._failed), file=sys.stderr)
            raise SystemExit(1)

    def _goes_on(self) -> bool:
        here = self.asked and str(HydraConfig.get().launcher._target_).endswith(HERE)
        return here and signals.received() is None

    def _note(self, said: str) -> None:
        # Hydra writes what is left out as `~group=null`.
        words = [self.typed.get(w, self.typed.get(w.removesuffix("=null"), w)) for w in overrides()]
        typed = masked(" ".join(map(masked_override, words)))
        self._failed.append(f"  {typed}: {' '.join(said.split())}")
