"""Files that a thread writes while training goes on.

    writer = BackgroundWriter()
    writer.save(state, path)       # returns when the state is copied
    writer.submit(job, argument)   # any other job
    writer.check()                 # raises the error of a job that has failed
    writer.finish()                # waits for all jobs, and does the same

Lightning's AsyncCheckpointIO allocates every copy anew, on the device of the tensors, lets any
number of them wait, and tells of a full disk at the next checkpoint.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from distill.storage.bounded import format_bytes
from distill.storage.checkpoint_files import write_checkpoint
from distill.storage.staging import Staging

log = logging.getLogger("distill.training.checkpoints")
MOST_WAITING = 4  # ours: jobs that wait for the thread, each of which holds its pictures


class BackgroundWriter:
    """One thread that runs jobs in the order in which they were submitted.

    After a job has failed, later ones are not run until its error was raised: otherwise earlier
    checkpoints would be removed though the new one could not be written.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[None]] = deque()
        self._error: BaseException | None = None
        self._staging = Staging()
        self._refused = False  # whether it was said that the copies do not fit

    def save(self, state: Any, path: Path) -> None:
        """Write a checkpoint. Waits for earlier jobs, and until `state` is copied.

        Without memory for a copy it waits until the checkpoint is written. Raises the error of an
        earlier job.
        """
        self.join()
        copied = self._staging.copy(state)
        if copied is None:
            self._say_refused()
            write_checkpoint(state, path)
        else:
            self.submit(write_checkpoint, copied, path)

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Run `job` in the thread. If many jobs are waiting, wait for the first of them."""
        while self._jobs and (self._jobs[0].done() or len(self._jobs) > MOST_WAITING):
            wait([self._jobs.popleft()])
        self._thread = self._thread or ThreadPoolExecutor(1, "distill-writer")
        self._jobs.append(self._thread.submit(self._run, job, *arguments))

    def check(self) -> None:
        """Raise the error of a job that has failed."""
        if self._error is not None:
            self.join()

    def join(self) -> None:
        """Wait for all jobs. Raises the error of the first that has failed."""
        wait(self._jobs)
        self._jobs.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """`join`, end the thread, and free the memory of the copies."""
        try:
            self.join()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None
            self._staging.clear()

    def _run(self, job: Callable[..., None], *arguments: Any) -> None:
        if self._error is not None:
            return
        try:
            job(*arguments)
        except BaseException as error:
            self._error = error

    def _say_refused(self) -> None:
        if self._refused or not self._staging.refused:
            return
        self._refused = True
        size = format_bytes(self._staging.refused)
        what = "a copy of the state does not fit into half of the free memory"
        log.warning("%s (%s): training waits while a checkpoint is written", what, size)
