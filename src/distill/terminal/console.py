"""Where the words of a command go: to its terminal, above the bars, and to the log of its run.

    with recorded():                   # around a command: from here on nothing printed is lost
        keep(folder / "run.log", ...)  # of what was said so far, and all that follows
        say("run folder: ...")         # for people, above any bar
        note("training: step 3 of 9")  # on a terminal in the log alone: a bar shows it

Warnings, logging and `print` go the same way. Of several processes only the first one prints and
logs; another one logs the exception that ends it, and may still warn on stderr.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from distill.machine.ranks import rank
from distill.machine.signals import Stopped
from distill.terminal.secret import masked, without_registered
from distill.terminal.shown import in_lines, printed, shown

EARLY = 1000  # lines that are held back until there is a file for them
_lock = threading.RLock()


class Log:
    """Lines of a run, held back until there is a file, then appended, each in one write."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._early: deque[str] = deque(maxlen=EARLY)

    def open(self, path: Path, heading: str) -> None:
        """Append to the file from here on: first the heading and what was held back."""
        early, self._early = list(self._early), deque(maxlen=EARLY)
        self.path = path
        if heading:
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            early.insert(0, f"== {now} {heading}")
        if early:
            self.write("\n".join(early))

    def write(self, text: str, *, whoever: bool = False) -> None:
        """Add lines. A log that cannot be written ends no run.

        `whoever`: of other processes too.
        """
        if rank() != 0 and not whoever:
            return
        if self.path is None:
            self._early.append(text)
            return
        content = (without_registered(text).rstrip("\n") + "\n").encode("utf-8", "backslashreplace")
        with suppress(OSError), self.path.open("ab", buffering=0) as file:
            file.write(content)

    def log_failure(self, error: BaseException) -> None:
        """Add the traceback of what ends the command."""
        who = f"process {rank()}: " if rank() else ""
        self.write(who + masked("".join(traceback.format_exception(error))), whoever=True)


class Stream:
    """Stands for stdout or stderr: whole lines pass above the bars and into the log; all else is
    the stream's own.
    """

    def __init__(self, stream: TextIO, log: Log):
        self.stream, self._log = stream, log
        self._line = ""  # the beginning of a line, for the log
        self._held = ""  # the same, where it waits for its end before it is shown

    def write(self, text: str) -> int:
        given, text = len(text), printed(text)
        with _lock:
            if "\r" in text.replace("\r\n", "\n") or "\x1b[A" in text:
                screen.pause()  # a library draws a bar of its own, of a download say
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._log.write(line.rstrip("\r").rpartition("\r")[2])
            self._show(text)
        return given

    def _show(self, text: str) -> None:
        text, self._held = self._held + text, ""
        if screen.live and self.stream.isatty():
            *lines, self._held = text.split("\n")
            for line in lines:
                screen.print(line)
            return
        try:
            self.stream.write(text)
            if "\n" in text:
                self.stream.flush()
        except BrokenPipeError:  # the reader has seen enough: the work goes on
            discard_output(self.stream)
        except OSError as error:  # the terminal is gone, or a disk is full
            if self._log.path is None:
                raise OSError(error.errno, error.strerror, "what is printed") from None
            discard_output(self.stream)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self.stream.flush()

    def end(self) -> None:
        """Log and show a line that was never ended."""
        with _lock, suppress(OSError, ValueError):
            self._show("")
            if self._line:
                self._log.write(self._line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def discard_output(stream: TextIO) -> None:
    """Have the stream write to nowhere from now on."""
    with suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def open_standard_streams() -> None:
    """Have the standard streams that are closed lead nowhere: else the next file that is opened
    takes their place.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            mode = "r" if name == "stdin" else "w"
            os.set_inheritable(nowhere, nowhere < 3)
            stream = open(nowhere, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@contextmanager
def tolerate_closed_pipes() -> Iterator[None]:
    """Around all of a command: `| head` is no fault, and what was not read is lost without a word.

    Nor is a stream that the command was started without (`>&-`), as services are.
    """
    open_standard_streams()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)


class Screen:
    """The rows of bars at the bottom of a terminal, drawn by rich."""

    def __init__(self) -> None:
        self.live: Any = None  # rich's display while it is drawn
        self._rows: list[Any] = []

    def show(self, row: Any) -> None:
        """Add a row: an object with `what`, `share` (None: unknown) and `tail()`."""
        with _lock:
            self._rows.append(row)
            self._draw()

    def drop(self, row: Any) -> None:
        with _lock:
            if row in self._rows:
                self._rows.remove(row)
            self.pause()
            if self._rows:
                self._draw()

    def clear(self) -> None:
        """Leave the terminal as it was, whatever happened."""
        with _lock:
            self.pause()
            self._rows.clear()

    def resume(self) -> None:
        """Draw again, if a library's own bar had the place."""
        if self._rows and not self.live:
            with _lock:
                self._draw()

    def pause(self) -> None:
        live, self.live = self.live, None
        if live:
            with suppress(OSError):  # the terminal is gone
                live.stop()

    def print(self, line: str) -> None:
        from rich.text import Text

        self.live.console.print(Text.from_ansi(line), soft_wrap=True)

    def _draw(self) -> None:
        from rich.console import Console
        from rich.live import Live

        if not self.live:
            out = Console(file=_unwrapped(stream()), force_terminal=True, legacy_windows=False)
            self.live = Live(
                console=out, get_renderable=self._table, transient=True,
                redirect_stdout=False, redirect_stderr=False, refresh_per_second=4,
            )  # fmt: skip
            self.live.start(refresh=True)

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for row in list(self._rows):
            bar = ProgressBar(total=1, completed=row.share or 0, width=16, pulse=row.share is None)
            table.add_row(Text(shown(row.what)), bar, Text(shown(row.tail())))
        return table

    def forget(self) -> None:
        """In a process that was forked off: the terminal is the parent's."""
        self.live, self._rows = None, []


screen = Screen()
_log = Log()
_on_stderr = False


def stream() -> TextIO:
    """What the words are written to."""
    return sys.stderr if _on_stderr else sys.stdout


def is_terminal() -> bool:
    """Whether bars can be drawn there."""
    return stream().isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def print_to_stderr() -> Iterator[None]:
    """For a command whose stdout is for other programs."""
    global _on_stderr
    before, _on_stderr = _on_stderr, True
    try:
        yield
    finally:
        _on_stderr = before


def say(text: str) -> None:
    """A line for whoever watches, and for the log; nothing if there is nothing to say."""
    if rank() != 0 or not text:
        return
    text = in_lines(text)
    with _lock, suppress(OSError, ValueError):  # a pipe that nobody reads any more ends no run
        if isinstance(stream(), Stream) or not screen.live:
            stream().write(f"{text}\n")  # in one piece, should it fail
            stream().flush()
        else:
            screen.print(text)


def note(text: str) -> None:
    """A line of progress: on a terminal, where a bar says it, for the log alone."""
    if is_terminal():
        with _lock:
            _log.write(text)
    else:
        say(text)


def log_to(path: Path, heading: str = "") -> None:
    """Have the log of this command in a file from now on, which what was said already begins."""
    with _lock:
        if _log.path != path:
            _log.open(path, heading)


def log_failure(error: BaseException) -> None:
    """Put the traceback of an exception that ends the command into the log."""
    with _lock:
        _log.log_failure(error)


@contextmanager
def record_output() -> Iterator[None]:
    """Have all that is printed inside pass the bars and reach the log; of several processes, that
    of the first.
    """
    global _log
    before, _log = _log, Log()
    made = logging.getLogRecordFactory()
    logging.setLogRecordFactory(lambda *args, **keys: _as_text(made(*args, **keys)))
    try:
        with _replaced(_log):
            try:
                yield
            finally:
                screen.clear()
    except (SystemExit, Stopped):
        raise
    except BaseException as error:
        log_failure(error)
        raise
    finally:
        _log = before
        logging.setLogRecordFactory(made)


def _as_text(record: logging.LogRecord) -> logging.LogRecord:
    """With what is put into its message, a name or an error, as one line of text."""
    if isinstance(record.args, tuple):
        values = (str, Path, BaseException)
        record.args = tuple(shown(x) if isinstance(x, values) else x for x in record.args)
    return record


@contextmanager
def _replaced(log: Log) -> Iterator[None]:
    """Streams of ours in the place of stdout and stderr, and in the hands of the loggers."""
    stdout, stderr = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        silent = rank() > 0  # as distill.training.launch has it
        out, err = Stream(nowhere if silent else stdout, log), Stream(stderr, log)
        sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
        _rebind({stdout: err if silent else out, stderr: err})
        hook, threading.excepthook = threading.excepthook, _thread_failed
        try:
            yield
        finally:
            threading.excepthook = hook
            out.end()
            err.end()
            _rebind({out: stdout, err: stderr})
            sys.stdout, sys.stderr = stdout, stderr


def _thread_failed(of: threading.ExceptHookArgs) -> None:
    """A library's own thread has failed: the log has the traceback; who waits for the thread fails,
    and says so.
    """
    error = of.exc_value
    if error is not None and not isinstance(error, SystemExit):
        log_failure(error)
        say(f"a thread has ended ({type(error).__name__}: {error})")


def _rebind(streams: dict[Any, Any]) -> None:
    """Have the logging handlers that hold one of these streams write to the other."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                handler.setStream(streams[handler.stream])


def _unwrapped(found: Any) -> TextIO:
    while isinstance(found, Stream):
        found = found.stream
    return found


def _forked() -> None:
    """A worker of a loader: its lock may be held by a thread that it does not have."""
    global _lock
    _lock = threading.RLock()
    screen.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
