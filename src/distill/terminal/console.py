"""Output of a command: to the terminal above progress bars, and to the log of its run.

    with record_output():                # around a command: captures everything that is printed
        log_to(folder / "run.log", ...)  # write the log there, with what was printed before
        say("run folder: ...")           # print above any bar, and log
        note("training: step 3 of 9")    # print without a terminal; log (a terminal has a bar)

Warnings, logging and `print` take the same path. With several processes only rank 0 prints and
logs. The others log the exception that ends them, and may warn on stderr.
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

EARLY = 1000  # lines that are kept until the log file is known
# Importing these where torchao is installed warns of its own future and of what we do not use.
CHATTY = ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
_lock = threading.RLock()


class Log:
    """The log of a run: lines are kept until the file is known, then appended with one write."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._early: deque[str] = deque(maxlen=EARLY)

    def open(self, path: Path, heading: str) -> None:
        """Append to this file from now on, starting with the heading and the kept lines."""
        early, self._early = list(self._early), deque(maxlen=EARLY)
        self.path = path
        if heading:
            now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            early.insert(0, f"== {now} {heading}")
        if early:
            self.write("\n".join(early))

    def write(self, text: str, *, any_rank: bool = False) -> None:
        """Append lines; only from rank 0 unless `any_rank`. Errors of writing are ignored."""
        if rank() != 0 and not any_rank:
            return
        if self.path is None:
            self._early.append(text)
            return
        content = (without_registered(text).rstrip("\n") + "\n").encode("utf-8", "backslashreplace")
        with suppress(OSError), self.path.open("ab", buffering=0) as file:
            file.write(content)

    def log_failure(self, error: BaseException) -> None:
        """Append the traceback of the exception that ends the command."""
        prefix = f"process {rank()}: " if rank() else ""
        self.write(prefix + masked("".join(traceback.format_exception(error))), any_rank=True)


class Stream:
    """Replaces stdout or stderr: complete lines go above the bars and into the log.

    Other attributes are those of the stream.
    """

    def __init__(self, stream: TextIO, log: Log):
        self.stream, self._log = stream, log
        self._line = ""  # the start of an unfinished line, for the log
        self._held = ""  # the same, not shown yet

    def write(self, text: str) -> int:
        length, text = len(text), printed(text)
        with _lock:
            if "\r" in text.replace("\r\n", "\n") or "\x1b[A" in text:
                screen.pause()  # a library shows its own bar, for example of a download
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                self._log.write(line.rstrip("\r").rpartition("\r")[2])
            self._show(text)
        return length

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
        except BrokenPipeError:  # the reader has closed the pipe: the work continues
            discard_output(self.stream)
        except OSError as error:  # the terminal was closed, or the disk is full
            if self._log.path is None:
                raise OSError(error.errno, error.strerror, "the output") from None
            discard_output(self.stream)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        """Leave the stream open: log handlers of libraries close what they were given."""

    def end(self) -> None:
        """Log and show the last line, if it has no line end."""
        with _lock, suppress(OSError, ValueError):
            self._show("")
            if self._line:
                self._log.write(self._line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def discard_output(stream: TextIO) -> None:
    """Redirect the stream to the null device."""
    with suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def open_standard_streams() -> None:
    """Open closed standard streams on the null device: else the next opened file would get their
    number.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            mode = "r" if name == "stdin" else "w"
            os.set_inheritable(nowhere, nowhere < 3)
            stream = open(nowhere, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


@contextmanager
def tolerate_closed_pipes() -> Iterator[None]:
    """Around a whole command: a closed pipe (`| head`) or stream (`>&-`) is no error.

    Output that cannot be written is dropped.
    """
    open_standard_streams()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output(sys.stdout)


class Screen:
    """The progress bars at the bottom of a terminal, shown by rich."""

    def __init__(self) -> None:
        self.live: Any = None  # rich's display while it is shown
        self._rows: list[Any] = []

    def show(self, row: Any) -> None:
        """Add a bar: an object with `what`, `share` (None: unknown) and `tail()`."""
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
        """Remove all bars."""
        with _lock:
            self.pause()
            self._rows.clear()

    def resume(self) -> None:
        """Show the bars again after a library's own bar."""
        if self._rows and not self.live:
            with _lock:
                self._draw()

    def pause(self) -> None:
        live, self.live = self.live, None
        if live:
            with suppress(OSError):  # the terminal was closed
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
        """In a forked process: the terminal belongs to the parent."""
        self.live, self._rows = None, []


screen = Screen()
_log = Log()
_on_stderr = False


def stream() -> TextIO:
    """The stream for output: stdout, or stderr within `print_to_stderr`."""
    return sys.stderr if _on_stderr else sys.stdout


def is_terminal() -> bool:
    """Whether the output stream can show bars."""
    return stream().isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


@contextmanager
def print_to_stderr() -> Iterator[None]:
    """Print to stderr: for a command whose stdout is read by other programs."""
    global _on_stderr
    before, _on_stderr = _on_stderr, True
    try:
        yield
    finally:
        _on_stderr = before


def say(text: str) -> None:
    """Print and log a line; an empty text does nothing."""
    if rank() != 0 or not text:
        return
    text = in_lines(text)
    with _lock, suppress(OSError, ValueError):  # a closed pipe must not end the run
        if isinstance(stream(), Stream) or not screen.live:
            stream().write(f"{text}\n")  # one write, so that it fails completely or not at all
            stream().flush()
        else:
            screen.print(text)


def note(text: str) -> None:
    """A line of progress: only logged if a terminal shows a bar, else printed too."""
    if is_terminal():
        with _lock:
            _log.write(text)
    else:
        say(text)


def log_to(path: Path, heading: str = "") -> None:
    """Write the log of this command to a file, starting with what was printed before."""
    with _lock:
        if _log.path != path:
            _log.open(path, heading)


def log_failure(error: BaseException) -> None:
    """Log the traceback of the exception that ends the command."""
    with _lock:
        _log.log_failure(error)


@contextmanager
def record_output() -> Iterator[None]:
    """Send everything that is printed inside above the bars and into the log, on rank 0."""
    global _log
    before, _log = _log, Log()
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(lambda *args, **keys: _escape_arguments(factory(*args, **keys)))
    try:
        with _replaced(_log), _only_errors_of(CHATTY):
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
        logging.setLogRecordFactory(factory)


@contextmanager
def _only_errors_of(names: tuple[str, ...]) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _escape_arguments(record: logging.LogRecord) -> logging.LogRecord:
    """Escape texts, paths and errors in the arguments of a log record, as one line each."""
    if isinstance(record.args, tuple):
        values = (str, Path, BaseException)
        record.args = tuple(shown(x) if isinstance(x, values) else x for x in record.args)
    return record


@contextmanager
def _replaced(log: Log) -> Iterator[None]:
    """Replace stdout and stderr, also in logging handlers, by objects of `Stream`."""
    stdout, stderr = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        silent = rank() > 0  # as in distill.training.launch
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
    """Log the traceback of an exception in a thread of a library, and print one line."""
    error = of.exc_value
    if error is not None and not isinstance(error, SystemExit):
        log_failure(error)
        say(f"a thread has ended ({type(error).__name__}: {error})")


def _rebind(streams: dict[Any, Any]) -> None:
    """Replace these streams (old -> new) in all logging handlers."""
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
    """In a forked DataLoader worker: its lock may be held by a thread that was not forked."""
    global _lock
    _lock = threading.RLock()
    screen.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
