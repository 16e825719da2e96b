"""One thread that runs the newest request of each client, urgent jobs first.

A job is a generator that yields between its steps and returns its result. So a device runs one step
at a time, and an urgent job waits for at most one step of another. This module is independent of
pictures.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

Steps = Generator[None, None, Any]


class Dropped(Exception):
    """A newer request of the same client has arrived, or the worker was closed."""


@dataclass(eq=False)
class _Job:
    client: Hashable
    urgency: int
    number: int
    steps: Steps
    future: Future


class Worker:
    """`submit` may be called from any thread; jobs run in one thread, which `close` ends.

    `requests` counts submitted requests. `dropped` counts those with at least one job that was
    dropped for a newer request of the same client.
    """

    def __init__(self) -> None:
        self.requests = 0
        self.dropped = 0
        self._jobs: list[_Job] = []
        self._newest: dict[Hashable, float] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    def submit(
        self, client: Hashable, jobs: Sequence[tuple[int, Steps]], moment: float = 0.0
    ) -> list[Future]:
        """Futures of the jobs, (urgency, steps) each; the lowest urgency runs first.

        All earlier jobs of the client are dropped, also a running one: their futures raise
        `Dropped`. So do those of a request that arrives late: `moment`, by the client's clock, is
        before that of its newest request.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the worker is closed")
            self.requests += 1
            new = [_Job(client, urgency, self.requests, steps, Future()) for urgency, steps in jobs]
            for job in new:  # from now on the future cannot be cancelled
                job.future.set_running_or_notify_cancel()
            if moment >= self._newest.get(client, moment):
                self._drop(client)
                self._newest[client] = moment
                self._jobs += new
                self._changed.notify_all()
            else:
                self._set_dropped(new)
        return [job.future for job in new]

    def close(self) -> None:
        """End the thread after the current step; waiting futures raise `Dropped`."""
        with self._changed:
            self._closed = True
            for client in {job.client for job in self._jobs}:
                self._drop(client)
            self._changed.notify_all()
        self._thread.join()

    def _drop(self, client: Hashable) -> None:
        old = [job for job in self._jobs if job.client == client]
        self._jobs = [job for job in self._jobs if job.client != client]
        self._set_dropped(old)

    def _set_dropped(self, jobs: list[_Job]) -> None:
        self.dropped += bool(jobs)
        for job in jobs:
            job.future.set_exception(Dropped())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if self._closed:
                    return
                job = min(self._jobs, key=lambda job: (job.urgency, job.number))
            self._step(job)

    def _step(self, job: _Job) -> None:
        """Advance a job by one step, without the lock: it may take long."""
        try:
            next(job.steps)
        except StopIteration as end:
            self._finish(job, end.value, None)
        except Exception as error:  # a model may raise anything: pass it on, and keep the thread
            self._finish(job, None, error)

    def _finish(self, job: _Job, result: Any, error: Exception | None) -> None:
        with self._changed:
            if job not in self._jobs:  # dropped meanwhile: its future has an exception already
                return
            self._jobs.remove(job)
            if error is None:
                job.future.set_result(result)
            else:
                job.future.set_exception(error)
