"""Work in processes of its own: a fork starts without importing anything again, ends with all that
it held on a GPU, and takes nobody with it if it fails.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A fork may use CUDA only if its parent has not, not even to ask for it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


THREADS = 4  # of each: several run at once


def start_method() -> str:
    """A fork, unless an import has begun to use CUDA in this process."""
    import torch

    forks = "fork" in multiprocessing.get_all_start_methods()
    return "fork" if forks and not torch.cuda.is_initialized() else "spawn"


@dataclass(frozen=True)
class Failed:
    """What became of work that gave nothing: the last line of its error."""

    said: str


class Child:
    """One call of a function in a process that starts as a copy of this one.

    What it prints goes to `log`.
    """

    def __init__(self, log: Path, work: Callable[..., Any], *given: Any) -> None:
        self.began = time.monotonic()
        how = multiprocessing.get_context(start_method())
        self._answers, theirs = how.Pipe(duplex=False)
        self._process = how.Process(target=_answer, args=(theirs, log, work, *given))
        self._process.start()
        theirs.close()

    def result(self) -> Any:
        """What the function returned, or `Failed`; None while it runs."""
        if self._answers.poll():
            try:
                found = self._answers.recv()
            except EOFError:
                self._process.join()
                return Failed(f"the process ended with code {self._process.exitcode}")
            self._process.join()
            return found
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def _answer(answers: Any, log: Path, work: Callable[..., Any], *given: Any) -> None:
    with log.open("a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        try:
            import torch

            torch.set_num_threads(min(THREADS, torch.get_num_threads()))
            answers.send(work(*given))
        except BaseException as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            answers.send(Failed(f"{type(error).__name__}: {lines[0]}"))
        answers.close()
