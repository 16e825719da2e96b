"""Which rows of full_size.py run when, and the networks that are written for them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from children import Child, Failed  # before torch: it says how CUDA is asked for

# isort: split
from full_size_rows import Row
from networks import write

AHEAD = 2  # networks that are written before their first row may start
COUNTS = 5  # processes that count
GRACE = 60  # seconds that a row may take after the end
LATE = Failed("stopped: out of time")


@dataclass
class Queue:
    """Rows that wait and run, the networks that are written for them, and their counts.

    Rows start in their order. The next networks are written while rows run, and a network is
    removed after its last row.
    """

    plan: Any
    rows: list[Row]
    work: Callable[..., Any]
    counts_by: Callable[..., Any] | None
    place: Path
    log: Path
    at_once: int
    deadline: float
    room: float
    waiting: list[Row] = field(init=False)
    running: dict[Row, Child] = field(default_factory=dict)
    counting: dict[Row, Child] = field(default_factory=dict)
    counts: dict[Row, Any] = field(default_factory=dict)
    found: dict[Row, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)  # None: it is being written
    begun: set[str] = field(default_factory=set)  # networks with a row that started
    writer: tuple[str, Child] | None = None

    def __post_init__(self) -> None:
        self.waiting = list(self.rows)

    def results(self) -> Iterator[tuple[Row, Any, Any]]:
        """Each row with its count, if rows are counted, and what was measured, as they end."""
        while self.waiting or self.running or self.found:
            late = time.monotonic() - self.deadline
            if late > 0:
                self.waiting.clear()
            self._write()
            self._count(late > GRACE)
            self._start()
            self._collect(late > GRACE)
            yield from self._complete()
            time.sleep(0.1)

    def stop(self) -> None:
        children = [*self.running.values(), *self.counting.values()]
        for child in [*children, *([self.writer[1]] if self.writer else [])]:
            child.stop()

    def teacher(self, network: str) -> Path:
        return self.place / network

    def _child(self, work: Any, *given: Any) -> Child:
        return Child(self.log, work, *given)

    def _write(self) -> None:
        if self.writer:
            name, child = self.writer
            done = child.result()
            if done is not None:
                self.written[name] = done
                self.writer = None
        needed = [row.network for row in self.waiting]
        wanted = next((name for name in needed if name not in self.written), None)
        ahead = [name for name in self.written if name not in self.begun]
        if wanted and not self.writer and len(ahead) < AHEAD:
            self.written[wanted] = None
            self.writer = (wanted, self._child(_write, wanted, self.teacher(wanted), self.plan))
        kept = {*needed, *(row.network for row in self.running)}
        for name in [name for name in self.written if name not in kept]:
            if self.written[name] is not None and self.teacher(name).exists():
                shutil.rmtree(self.teacher(name))
                del self.written[name]  # a later row would need it again

    def _count(self, over: bool) -> None:
        for row, child in list(self.counting.items()):
            if (done := ended(child, over)) is not None:
                self.counts[row] = done
                del self.counting[row]
        if not self.counts_by:
            return
        for row in [*self.found, *self.running, *self.waiting]:
            if row in self.counts or row in self.counting:
                continue
            if over:
                self.counts[row] = LATE
            elif len(self.counting) < COUNTS:
                place = self.place / f"count{self.rows.index(row)}"
                self.counting[row] = self._child(self.counts_by, self.plan, row, place)

    def _start(self) -> None:
        used = sum(row.need for row in self.running)
        for row in list(self.waiting):
            ready = self.written.get(row.network)
            if isinstance(ready, Failed):
                self.found[row] = ready
                self.waiting.remove(row)
            elif ready:
                fits = not self.running or used + row.need <= self.room
                if fits and len(self.running) < self.at_once:
                    place = self.place / f"row{self.rows.index(row)}"
                    given = (self.plan, row, self.teacher(row.network), place)
                    self.running[row] = self._child(self.work, *given)
                    self.begun.add(row.network)
                    self.waiting.remove(row)
                return

    def _collect(self, over: bool) -> None:
        for row, child in list(self.running.items()):
            if (done := ended(child, over)) is not None:
                self.found[row] = done
                del self.running[row]

    def _complete(self) -> Iterator[tuple[Row, Any, Any]]:
        for row in list(self.found):
            if not self.counts_by or row in self.counts:
                yield row, self.counts.get(row), self.found.pop(row)


def ended(child: Child, over: bool) -> Any:
    """The result of this child, which is stopped if all is over; None while it may go on."""
    done = child.result()
    if done is None and over:
        child.stop()
        return LATE
    return done


def _write(name: str, folder: Path, plan: Any) -> bool:
    write(name, folder, full=plan.full)
    return True
