"""What long work says of itself: a bar on a terminal; elsewhere a line when it starts, every 30 s,
and when it ends.

    with stage("loading the teacher"):
        ...
    for item in track(items, "reading", unit="sample"):
        ...
    with Bar("training", total=1200, rate="images") as bar:
        bar.update(120, images=1920, said="g/adv 0.71")

    training: step 120 of 1200, 35.2 images/s, 0:04:10 left, g/adv 0.71
    training: still at step 120 of 1200, for 0:01:10

A thread keeps the time, so a single step may last for hours and something is said all the same.
Work may be nested: the innermost speaks, and a terminal shows all. The lines go into the log of the
run, whether there is a terminal or not.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from distill.machine.ranks import rank
from distill.terminal import console

FIRST = 5.0  # seconds until the first line that says how far the work is
EVERY = (
    25.0  # seconds between such lines: at most 30, the clock's own step and a busy machine included
)
TICK = 0.5  # seconds
LONG = 3.0  # seconds of uncounted work that are worth a line at its end
Item = TypeVar("Item")


class Bar:
    """Counted work `what`, of `total` units; None: nobody knows how much.

    `rate` names what is made, where its speed is to be said: "images". It is counted by
    `update(images=...)`, or is the unit itself.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        unit: str = "step",
        rate: str | None = None,
        done: int = 0,
        images: int | None = None,
    ):
        self.what, self.total, self.unit, self.rate = what, total, unit, rate
        self.done, self._images = done, images
        self._place: str | None = None
        self._said: str | Callable[[], str] = ""
        self._began = self._moved = time.monotonic()
        self._start = (self._began, done, self._made)
        self._marks = deque([self._start], maxlen=5)  # seconds, done, made: what speeds are of
        self._due = self._began + FIRST
        self._updates = self._seen = 0  # updates so far, and at the last line

    # -- what the work calls -----------------------------------------------------------------------

    def __enter__(self) -> Bar:
        _heartbeat.write(self)
        if rank() == 0:
            console.note(self._beginning())
            _reporter.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if rank() == 0 and _reporter.remove(self):
            console.say(self._ending(whole=kind is None))

    def advance(self, by: int = 1) -> None:
        self.update(self.done + by)

    def update(
        self,
        done: int,
        *,
        images: int | None = None,
        said: str | Callable[[], str] | None = None,
        place: str | None = None,
    ) -> None:
        """Say that so many units are done.

        `place` stands for "step 3 of 9" where that says too little.
        """
        first = not self._updates or self.done == self._start[1] != done
        self.done, self._images, self._place = done, images, place
        if said is not None:
            self._said = said
        self._moved = time.monotonic()
        if first:  # it is slow for reasons of its own, and what came before is another work
            self._marks.clear()
            self._marks.append((self._moved, done, self._made))
        self._updates += 1
        _heartbeat.write(self)
        if rank() == 0:
            console.screen.resume()

    # -- what it says ------------------------------------------------------------------------------

    @property
    def share(self) -> float | None:
        """How much of it is done, from 0 to 1."""
        return None if self.total is None else self.done / max(1, self.total)

    def tail(self) -> str:
        """How far it is, how fast, how long it will take, and what the work says of itself."""
        now = time.monotonic()
        if self.total is None:
            return f"{_clock(now - self._began)} so far"
        place = self._place or f"{self.unit} {self.done} of {self.total}"
        return ", ".join(filter(None, [place, self._speed(now), self._left(now), self._words()]))

    def tick(self, now: float) -> None:
        """Say a line if it is time for one."""
        if now >= self._due:
            self._due = now + EVERY
            console.note(self._line(now))
            self._seen = self._updates
            self._marks.append((now, self.done, self._made))

    def _line(self, now: float) -> str:
        if self.total is not None and self._updates == self._seen:
            place = self._place or f"{self.unit} {self.done} of {self.total}"
            since = _clock(now - self._moved)
            where = (
                f"still at {place}, for {since}" if self._updates else f"{place}, {since} so far"
            )
            return ", ".join(filter(None, [f"{self.what}: {where}", self._words()]))
        return f"{self.what}: {self.tail()}"

    def _beginning(self) -> str:
        if self.total is None:
            return self.what
        if self.done:
            return f"{self.what}: from {self.unit} {self.done} of {self.total}"
        return f"{self.what}: {_counted(self.total, self.unit)}"

    def _ending(self, *, whole: bool) -> str:
        now = time.monotonic()
        took = _clock(now - self._began)
        if self.total is None:
            return f"{self.what}: took {took}" if whole and now - self._began >= LONG else ""
        if not whole or self.done < self.total:
            return f"{self.what}: stopped at {self.unit} {self.done} of {self.total} after {took}"
        words = "" if callable(self._said) else self._said
        parts = [f"{self.what}: done in {took}", self._speed(now, self._start), words]
        return ", ".join(filter(None, parts))

    def _words(self) -> str:
        return self._said() if callable(self._said) else self._said

    @property
    def _made(self) -> int:
        return self.done if self._images is None else self._images

    def _speed(self, now: float, mark: tuple[float, int, int] | None = None) -> str:
        then, _, made = mark or self._marks[0]
        if self.rate is None or self._made <= made or now <= then:
            return ""
        speed = (self._made - made) / (now - then)
        digits = "{:.0f}" if speed >= 100 else "{:.1f}" if speed >= 1 else "{:.2g}"
        return f"{digits.format(speed)} {self.rate}/s"

    def _left(self, now: float) -> str:
        then, done, _ = self._marks[0]
        if self.done <= done or self.total is None or self.done >= self.total:
            return ""
        return f"{_clock((self.total - self.done) * (now - then) / (self.done - done))} left"


class Reporter:
    """The work that is under way, outermost first, and the thread that lets the innermost speak."""

    def __init__(self) -> None:
        self._bars: list[Bar] = []
        self._quit: threading.Event | None = None

    def add(self, bar: Bar) -> None:
        self._bars.append(bar)
        if console.is_terminal():
            console.screen.show(bar)
        if self._quit is None:
            self._quit = threading.Event()
            threading.Thread(target=self._run, args=(self._quit,), daemon=True).start()

    def remove(self, bar: Bar) -> bool:
        """Whether it was there; with it goes what an exception has left inside it."""
        if bar not in self._bars:
            return False
        while self._bars:
            last = self._bars.pop()
            console.screen.drop(last)
            if last is bar:
                break
        if not self._bars and self._quit:
            self._quit.set()
            self._quit = None
        return True

    def _run(self, quit: threading.Event) -> None:
        while not quit.wait(TICK):
            for bar in self._bars[-1:]:
                bar.tick(time.monotonic())


_reporter = Reporter()


class Heartbeat:
    """A small file that says where this process is, for whoever finds it dead: {"what", "unit",
    "done"}.
    """

    WIDTH = 1024  # bytes: always as many, so that none of a longer one stay behind

    def __init__(self) -> None:
        self._file: Any = None

    def open(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def write(self, bar: Bar) -> None:
        """Written in place and not flushed to disk: it costs microseconds, and outlives the
        process.
        """
        if self._file is None:
            return
        counted = {} if bar.total is None else {"unit": bar.unit, "done": bar.done}
        said = json.dumps({"what": bar.what[:100], **counted}).encode()
        with suppress(OSError):
            self._file.seek(0)
            self._file.write(said.ljust(self.WIDTH))


_heartbeat = Heartbeat()


def write_heartbeat(path: Path) -> None:
    """From now on note in this file where the work is."""
    _heartbeat.open(path)


def last_heartbeat(path: Path) -> str:
    """What `beat_into` has left in this file, as the end of a sentence; nothing if it left
    nothing.
    """
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if "done" not in said:
        return f"while {said['what']}"
    place = f"at {said['unit']} {said['done']:,}"
    return place if said["what"] == "training" else f"{place} of {said['what']}"


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Work that nobody can count: reading a model, say."""
    with Bar(what):
        yield


def importing(library: str) -> AbstractContextManager[None]:
    """The stage of importing a library that takes seconds; nothing where that is done."""
    return nullcontext() if library in sys.modules else stage(f"importing {library}")


def track(
    items: Iterable[Item],
    what: str,
    total: int | None = None,
    *,
    unit: str = "step",
    rate: str | None = None,
) -> Iterator[Item]:
    """The items, of which there are `total` or as many as they say themselves, each counted when it
    is done with.
    """
    with Bar(what, len(items) if total is None else total, unit=unit, rate=rate) as bar:  # type: ignore[arg-type]
        for item in items:
            yield item
            bar.advance()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _counted(count: int, unit: str) -> str:
    ending = "" if count == 1 else "es" if unit.endswith("ch") else "s"
    return f"{count} {unit}{ending}"
