"""Signals that stop a command, and processes that end with their parent.

    with stop_on_signal():     # around a command: the first signal raises Stopped in the work
        ...                    # a second Ctrl-C ends the process at once

An exception is not safe everywhere: inside an import or OmegaConf it would leave an inconsistent
state, and C code and destructors drop it. There the signal is only recorded, and sent again until
`Stopped` has reached `stop_on_signal`.

Training has its own handler, which saves first. With several processes only the launcher gets the
signal of a terminal, and forwards it. A process that another one of ours has started ends with it,
by `end_with_parent`.
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

REQUEUE = getattr(signal, "SIGUSR1", None)  # SLURM announces the end of a job by it
HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed
BREAK = getattr(signal, "SIGBREAK", None)  # the one that can be sent to a process on Windows
INTERRUPTS = tuple(number for number in (signal.SIGINT, BREAK) if number is not None)
STOPPING = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGINT, REQUEUE, HANGUP, BREAK)
    if number is not None
)
PARENT = "DISTILL_PARENT"  # variable of a child process that must end with this one
TORCHRUN = "TORCHELASTIC_RUN_ID"  # variable of a process that torchrun has started
DEATH = 1  # prctl's PR_SET_PDEATHSIG
SAVE_TIME = 60.0  # ours: seconds to save in, after the parent has ended
PATIENCE = 5.0  # ours: seconds after which a second signal of any kind ends the process at once
RESEND = 0.05  # ours: seconds after which an unhandled signal is sent again
# Packages in whose frames no exception is raised: they would be left in an inconsistent state.
UNSAFE = {"hydra", "omegaconf", "antlr4", "logging"}

_received: signal.Signals | None = None  # the first stopping signal of this command
_received_at = 0.0  # monotonic seconds
_pending = False  # whether `Stopped` must still reach `stop_on_signal`
_in_flight: "weakref.ref[Stopped] | None" = None  # gone again where somebody has dropped it
_resending = False  # the signal that comes next was sent by `_reminder`
_import_depth = 0  # how deep in imports the command began
_handlers_lock = threading.Lock()  # held while a reminder is sent, and while the handlers go


class Stopped(BaseException):
    """A signal asks the command to stop. It is no Exception, so `except Exception` ignores it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = signal.Signals(number)


def received() -> signal.Signals | None:
    """The first stopping signal that this command has received, or None."""
    return _received


def mark_handled(number: int) -> None:
    """Record a signal that the caller handles itself: nothing is raised for it.

    A second Ctrl-C ends the process.
    """
    global _pending
    _pending = False
    _note(number)


def is_second_interrupt(number: int) -> bool:
    """Whether this signal is a second Ctrl-C, which ends the process at once."""
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
    """Raise `Stopped` in place of `error` if an unhandled signal has been received.

    Interrupted code may raise any error.
    """
    if _pending and _received is not None:
        stop = _stopped()
        if hasattr(error, HINT):
            setattr(stop, HINT, getattr(error, HINT))
        raise stop from None


def end_now(number: int) -> None:
    """End this process without saving or printing; shows the cursor, which bars hide."""
    with suppress(OSError, ValueError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")
    os._exit(128 + number)


@contextmanager
def stop_on_signal() -> Iterator[None]:
    """Let a signal raise `Stopped` inside; restores the previous handlers afterwards."""
    global _received, _pending, _in_flight, _import_depth
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
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
    """Set the handler of every stopping signal; returns the previous ones.

    A SIGHUP that nohup ignores stays ignored.
    """
    numbers = [n for n in STOPPING if n != HANGUP or signal.getsignal(n) != signal.SIG_IGN]
    # None means a handler that was not set by Python, and cannot be restored.
    return {n: signal.signal(n, handler) or signal.SIG_DFL for n in numbers}


def _stopped() -> Stopped:
    """The exception that ends the work; a weak reference shows whether it was dropped."""
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
    """Send the signal again while it is pending and no `Stopped` is in flight."""
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
    """Send a signal to the main thread, to interrupt a wait there."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def _is_unsafe(frame: FrameType | None) -> bool:
    """Whether an exception in this frame would be dropped, or leave an inconsistent state."""
    if frame is None or frame.f_globals.get("__name__") == "contextlib":  # its clean-up comes later
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
    """The number of import frames from this frame outwards."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


def _unraisable(found: Any) -> None:
    """Ignore a `Stopped` that a destructor or C code has dropped: the signal is sent again."""
    if not isinstance(found.exc_value, Stopped):
        sys.__unraisablehook__(found)


def requeue() -> bool:
    """Requeue this SLURM job from its first process; returns whether there is a job."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ.get("SLURM_JOB_ID")
    if job and os.environ.get("SLURM_PROCID", "0") == "0":
        with suppress(OSError):  # scontrol is not installed
            subprocess.run(["scontrol", "requeue", job], check=False)
    return bool(job)


# -- several processes -----------------------------------------------------------------------------


def new_session() -> dict[str, Any]:
    """Options of `Popen` for a new session: Ctrl-C only reaches the launcher, which forwards it."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def forward(number: int, process: subprocess.Popen) -> None:
    """Forward a signal to a process of a `new_session`, if it still runs."""
    if process.poll() is None:
        process.send_signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else number)


def child_environment() -> dict[str, str]:
    """The environment of a child that calls `end_with_parent` to end with this process."""
    return {**os.environ, PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Send SIGTERM to this process when its launcher, ours or torchrun, has ended.

    The process then has SAVE_TIME seconds to save. Linux sends the signal itself. A thread also
    checks every second, for other systems and for a launcher that has ended before this call.
    Without a launcher nothing happens.
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
    """Whether the parent of this process still runs and has this id."""
    if sys.platform != "win32":  # an orphan gets another parent
        return os.getppid() == number
    import psutil

    return psutil.pid_exists(number)


def _die_with_parent(number: int) -> None:
    """Let Linux send this signal to this process when its parent dies; no effect elsewhere."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without prctl: the thread remains
            ctypes.CDLL(None).prctl(DEATH, int(number), 0, 0, 0)


def init_loader_worker(_worker: int) -> None:
    """The `worker_init_fn` of DataLoaders: a worker ends with its parent, which handles signals."""
    for number in (signal.SIGINT, REQUEUE, HANGUP):  # not SIGTERM, by which torch ends workers
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if hasattr(signal, "SIGKILL"):
        _die_with_parent(signal.SIGKILL)
    if parent is not None and sys.platform != "win32" and os.getppid() != parent.pid:
        os._exit(1)  # the parent ended before the call above
