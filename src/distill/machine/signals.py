"""The signals by which a command is asked to stop, and what ends when something else does.

    with heard():              # around a command: the first signal raises Stopped where the work is
        ...                    # a second Ctrl-C ends the process at once

An exception out of nowhere is not safe everywhere: inside an import or OmegaConf's own work it
leaves them half done, and C code and destructors drop it. There the signal is only noted, and it is
sent again until `Stopped` has reached who waits for it.

Training has a handler of its own: it saves first. Of several processes only the launcher is told by
a terminal, and hands it on. A process that was started by another one of ours ends with it, by
`end_with_parent`.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from _thread import start_new_thread  # takes no lock: a signal handler may call it
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from distill.machine.faults import HINT

REQUEUE = getattr(signal, "SIGUSR1", None)  # by which SLURM announces the end of a job
HANGUP = getattr(signal, "SIGHUP", None)  # of a terminal that was closed
BREAK = getattr(signal, "SIGBREAK", None)  # on Windows the one that can be sent to a process
INTERRUPTS = tuple(number for number in (signal.SIGINT, BREAK) if number is not None)
STOPPING = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGINT, REQUEUE, HANGUP, BREAK)
    if number is not None
)
PARENT = "DISTILL_PARENT"  # in the environment of a process that is to end with this one
TORCHRUN = "TORCHELASTIC_RUN_ID"  # likewise, of one that torchrun has started
DEATH = 1  # prctl's PR_SET_PDEATHSIG
SAVE_TIME = 60.0  # ours: seconds to save in, once the parent is gone
PATIENCE = (
    5.0  # ours: seconds after which a second signal of any kind ends what has not heeded the first
)

RESEND = 0.05  # ours: seconds after which a signal that nobody has heeded is sent again
# Packages in whose own frames a signal is not raised: they would be left half done.
UNSAFE = {"hydra", "omegaconf", "antlr4", "logging"}

_received: signal.Signals | None = None  # what this command was asked to stop by
_received_at = 0.0
_pending = False  # it is to end the work by `Stopped`, which has not arrived yet
_in_flight: "weakref.ref[Stopped] | None" = None  # gone again where somebody has dropped it
_resending = False  # the signal that comes next was sent by `_reminder`
_import_depth = 0  # how deep in imports the command began
_handlers_lock = threading.Lock()  # held while a reminder is sent, and while the handlers go


class Stopped(BaseException):
    """A signal has asked the command to stop. No `except Exception` takes it for a fault."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = signal.Signals(number)


def received() -> signal.Signals | None:
    """The signal that this command was asked to stop by, if any."""
    return _received


def mark_handled(number: int) -> None:
    """Note that this signal has come, for who asks later; a second Ctrl-C ends the process.

    Who calls this has heeded the signal: nothing is raised any more.
    """
    global _pending
    _pending = False
    _note(number)


def is_second_interrupt(number: int) -> bool:
    """Whether this signal is the second Ctrl-C, which wants the end at once."""
    return not _resending and _received in INTERRUPTS and number in INTERRUPTS


def _note(number: int) -> None:
    global _received, _received_at, _resending
    late = _received is not None and time.monotonic() - _received_at > PATIENCE
    if is_second_interrupt(number) or (late and not _resending):
        end_now(number)
    _resending = False
    if _received is None:
        _received, _received_at = signal.Signals(number), time.monotonic()


def check(error: BaseException | None = None) -> None:
    """Raise `Stopped` if a signal has come and nobody has heeded it yet, in the place of `error`.

    What the signal has met in the middle of something may raise anything.
    """
    if _pending and _received is not None:
        stop = _stopped()
        if hasattr(error, HINT):
            setattr(stop, HINT, getattr(error, HINT))
        raise stop from None


def end_now(number: int) -> None:
    """End this process, nothing saved and nothing said; the cursor, which bars hide, comes back."""
    with suppress(OSError, ValueError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")
    os._exit(128 + number)


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """Have a signal raise `Stopped` inside; what handled it before does so again afterwards."""
    global _received, _pending, _in_flight, _import_depth
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    _received, _pending, _in_flight, _import_depth = (
        None,
        False,
        None,
        _count_imports(sys._getframe()),
    )
    hook, sys.unraisablehook = sys.unraisablehook, _unraisable
    before = set_handlers(_stop)
    try:
        yield
        check()
    except Exception as error:
        check(error)
        raise
    finally:
        with _handlers_lock:
            _pending = False
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def set_handlers(handler: Any) -> dict[int, Any]:
    """Set the handler of every stopping signal; returns those before. nohup's stays ignored."""
    numbers = [n for n in STOPPING if n != HANGUP or signal.getsignal(n) != signal.SIG_IGN]
    # None: set by something that is not Python, and cannot be put back.
    return {n: signal.signal(n, handler) or signal.SIG_DFL for n in numbers}


def _stopped() -> Stopped:
    """The exception by which the signal ends the work, on its way from now on."""
    global _in_flight
    stop = Stopped(_received or signal.SIGTERM)
    _in_flight = weakref.ref(stop)
    return stop


def _stop(number: int, frame: FrameType | None) -> None:
    global _pending
    first, again = _received is None, _resending and _pending
    _note(number)
    if first:
        _pending = True
        start_new_thread(_resend, (number,))
    if (first or again) and not _is_unsafe(frame):
        raise _stopped()


def _resend(number: int) -> None:
    """Send the signal again as long as it is due and no `Stopped` is on its way."""
    global _resending
    while True:
        time.sleep(RESEND)
        with _handlers_lock:
            if not _pending:
                return
            if _in_flight is None or _in_flight() is None:
                _resending = True
                _send(number)


def _send(number: int) -> None:
    """To the main thread, which may be waiting for something."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def _is_unsafe(frame: FrameType | None) -> bool:
    """Whether an exception in this frame would leave something half done, or be dropped."""
    if frame is None or frame.f_globals.get("__name__") == "contextlib":  # before its clean-up
        return True
    if _count_imports(frame) > _import_depth:
        return True
    inner: FrameType | None = frame
    while inner is not None:
        name = str(inner.f_globals.get("__name__")).partition(".")[0]
        if name in UNSAFE or inner.f_code.co_name == "__del__":
            return True
        if name not in sys.stdlib_module_names and name != "yaml":
            return False
        inner = inner.f_back
    return False


def _count_imports(frame: FrameType | None) -> int:
    """How many frames of imports there are from this one outwards."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


def _unraisable(found: Any) -> None:
    """A `Stopped` that a destructor or C code has dropped comes again: nothing is said of it."""
    if not isinstance(found.exc_value, Stopped):
        sys.__unraisablehook__(found)


def requeue() -> bool:
    """Ask SLURM to run this job again, by its first process; returns whether there is a job."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get("SLURM_PROCID", "0") == "0":
        with suppress(OSError):  # no scontrol here
            subprocess.run(["scontrol", "requeue", job], check=False)
    return bool(job)


# -- several processes -----------------------------------------------------------------------------


def new_session() -> dict[str, Any]:
    """Options of `Popen`: a Ctrl-C reaches the launcher alone, which hands it on once."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def forward(number: int, process: subprocess.Popen) -> None:
    """Send a signal that this process has got to one that was started `apart`, if it still runs."""
    if process.poll() is None:
        process.send_signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else number)


def child_environment() -> dict[str, str]:
    """The environment of a process that ends when this one does: it calls `end_with_parent`."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Have this process asked to stop (SIGTERM) when its launcher dies: ours, or torchrun.

    It has LAST seconds to save in. Linux sends the signal itself; elsewhere, and should the
    launcher have died before that was asked for, a thread looks for it every second. Without a
    launcher nothing happens.
    """
    parent = int(os.environ.pop(PARENT, 0)) or (os.getppid() if TORCHRUN in os.environ else 0)
    if parent:
        _die_with_parent(signal.SIGTERM)
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while is_parent(parent):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_TIME)
    os._exit(128 + signal.SIGTERM)


def is_parent(number: int) -> bool:
    """Whether the process that has started this one is there, and has this id."""
    if sys.platform != "win32":  # an orphan gets another parent
        return os.getppid() == number
    import psutil

    return psutil.pid_exists(number)


def _die_with_parent(number: int) -> None:
    """Have Linux send this signal to this process when its parent dies; elsewhere nothing."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it: there is the thread
            ctypes.CDLL(None).prctl(DEATH, int(number), 0, 0, 0)


def init_loader_worker(_worker: int) -> None:
    """First thing in a worker of a DataLoader: it dies with its parent, who heeds signals."""
    for number in (signal.SIGINT, REQUEUE, HANGUP):  # SIGTERM is torch's: by it the parent ends it
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if hasattr(signal, "SIGKILL"):
        _die_with_parent(signal.SIGKILL)
    if parent is not None and sys.platform != "win32" and os.getppid() != parent.pid:
        os._exit(1)  # it died before that was asked for
