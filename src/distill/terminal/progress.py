"""Progress of long work: a bar on a terminal; elsewhere a line at its start, every 30 s, and at its
end.

    with stage("loading the teacher"):
        ...
    for item in track(items, "reading", unit="sample"):
        ...
    with Bar("training", total=1200, rate="images") as bar:
        bar.update(120, images=1920, said="g/adv 0.71")

    training: step 120 of 1200, 35.2 images/s, 0:04:10 left, g/adv 0.71
    training: still at step 120 of 1200, for 0:01:10

A thread prints the lines, so they also come during a step that lasts for hours. Work may be nested:
only the innermost prints lines, and a terminal shows all bars. The lines always go into the log of
the run.
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

FIRST = 5.0  # seconds until the first line of progress
EVERY = 25.0  # seconds between lines of progress; at most 30 with TICK and on a busy machine
TICK = 0.5  # seconds between checks of the thread
LONG = 3.0  # seconds after which uncounted work gets a line at its end
Item = TypeVar("Item")


class Bar:
    """Progress of the work `what`, of `total` units; None: not known.

    With `rate`, for example "images", the speed is printed. It counts `update(images=...)`, or else
    the units.
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
        self._started_at = self._updated_at = time.monotonic()
        self._start = (self._started_at, done, self._made)
        self._samples = deque([self._start], maxlen=5)  # (seconds, done, made) to compute speeds
        self._due = self._started_at + FIRST
        self._updates = self._printed_updates = 0  # number of updates now, and at the last line

    # -- called by the work ------------------------------------------------------------------------

    def __enter__(self) -> Bar:
        _heartbeat.write(self)
        if rank() == 0:
            console.note(self._first_line())
            _reporter.add(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if rank() == 0 and _reporter.remove(self):
            console.say(self._last_line(succeeded=kind is None))

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
        """Set the number of units that are done.

        `said` is a detail for the line, such as a loss. `place` replaces "step 3 of 9".
        """
        first = not self._updates or self.done == self._start[1] != done
        self.done, self._images, self._place = done, images, place
        if said is not None:
            self._said = said
        self._updated_at = time.monotonic()
        if first:  # the first unit is slower than the others: speeds are measured after it
            self._samples.clear()
            self._samples.append((self._updated_at, done, self._made))
        self._updates += 1
        _heartbeat.write(self)
        if rank() == 0:
            console.screen.resume()

    # -- text --------------------------------------------------------------------------------------

    @property
    def share(self) -> float | None:
        """The share that is done, in [0, 1]; None if `total` is not known."""
        return None if self.total is None else self.done / max(1, self.total)

    def tail(self) -> str:
        """Progress, speed, time left, and detail."""
        now = time.monotonic()
        if self.total is None:
            return f"{_clock(now - self._started_at)} so far"
        place = self._place or f"{self.unit} {self.done} of {self.total}"
        return ", ".join(filter(None, [place, self._speed(now), self._left(now), self._detail()]))

    def tick(self, now: float) -> None:
        """Print a line if it is time for one."""
        if now >= self._due:
            self._due = now + EVERY
            console.note(self._line(now))
            self._printed_updates = self._updates
            self._samples.append((now, self.done, self._made))

    def _line(self, now: float) -> str:
        if self.total is not None and self._updates == self._printed_updates:
            place = self._place or f"{self.unit} {self.done} of {self.total}"
            since = _clock(now - self._updated_at)
            text = f"still at {place}, for {since}" if self._updates else f"{place}, {since} so far"
            return ", ".join(filter(None, [f"{self.what}: {text}", self._detail()]))
        return f"{self.what}: {self.tail()}"

    def _first_line(self) -> str:
        if self.total is None:
            return self.what
        if self.done:
            return f"{self.what}: from {self.unit} {self.done} of {self.total}"
        return f"{self.what}: {_counted(self.total, self.unit)}"

    def _last_line(self, *, succeeded: bool) -> str:
        now = time.monotonic()
        duration = now - self._started_at
        took = _clock(duration)
        if self.total is None:
            return f"{self.what}: took {took}" if succeeded and duration >= LONG else ""
        if not succeeded or self.done < self.total:
            return f"{self.what}: stopped at {self.unit} {self.done} of {self.total} after {took}"
        detail = "" if callable(self._said) else self._said
        parts = [f"{self.what}: done in {took}", self._speed(now, self._start), detail]
        return ", ".join(filter(None, parts))

    def _detail(self) -> str:
        return self._said() if callable(self._said) else self._said

    @property
    def _made(self) -> int:
        return self.done if self._images is None else self._images

    def _speed(self, now: float, since: tuple[float, int, int] | None = None) -> str:
        then, _, made = since or self._samples[0]
        if self.rate is None or self._made <= made or now <= then:
            return ""
        speed = (self._made - made) / (now - then)
        digits = "{:.0f}" if speed >= 100 else "{:.1f}" if speed >= 1 else "{:.2g}"
        return f"{digits.format(speed)} {self.rate}/s"

    def _left(self, now: float) -> str:
        then, done, _ = self._samples[0]
        if self.done <= done or self.total is None or self.done >= self.total:
            return ""
        return f"{_clock((self.total - self.done) * (now - then) / (self.done - done))} left"


class Reporter:
    """The active bars, outermost first, and the thread that prints lines of the innermost."""

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
        """Remove a bar, and bars inside it that an exception left; returns whether it was there."""
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
    """A small file with the progress of this process, read if it dies: {"what", "unit", "done"}."""

    WIDTH = 1024  # bytes of every write, so that it overwrites a longer one

    def __init__(self) -> None:
        self._file: Any = None

    def open(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)

    def write(self, bar: Bar) -> None:
        """Write in place without flushing to disk: takes microseconds, and survives the process."""
        if self._file is None:
            return
        counted = {} if bar.total is None else {"unit": bar.unit, "done": bar.done}
        content = json.dumps({"what": bar.what[:100], **counted}).encode()
        with suppress(OSError):
            self._file.seek(0)
            self._file.write(content.ljust(self.WIDTH))


_heartbeat = Heartbeat()


def write_heartbeat(path: Path) -> None:
    """Write the progress of this process into this file from now on."""
    _heartbeat.open(path)


def last_heartbeat(path: Path) -> str:
    """The content of a file of `write_heartbeat` as the end of a sentence; "" if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if "done" not in content:
        return f"while {content['what']}"
    place = f"at {content['unit']} {content['done']:,}"
    return place if content["what"] == "training" else f"{place} of {content['what']}"


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Progress of work without units, such as reading a model."""
    with Bar(what):
        yield


def importing(library: str) -> AbstractContextManager[None]:
    """The stage of importing a slow library; does nothing if it is imported already."""
    return nullcontext() if library in sys.modules else stage(f"importing {library}")


def track(
    items: Iterable[Item],
    what: str,
    total: int | None = None,
    *,
    unit: str = "step",
    rate: str | None = None,
) -> Iterator[Item]:
    """Yield the items, and count each when it is done; `total` defaults to their length."""
    count = len(items) if total is None else total  # type: ignore[arg-type]
    with Bar(what, count, unit=unit, rate=rate) as bar:
        for item in items:
            yield item
            bar.advance()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _counted(count: int, unit: str) -> str:
    ending = "" if count == 1 else "es" if unit.endswith("ch") else "s"
    return f"{count} {unit}{ending}"
