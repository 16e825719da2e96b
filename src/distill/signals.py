"""The signals by which a run is asked to save and stop. Windows lacks some of them and has one of its own."""

import signal
import subprocess
import sys
from typing import Any

REQUEUE = getattr(signal, "SIGUSR1", None)  # by which SLURM announces the end of a job
BREAK = getattr(signal, "SIGBREAK", None)  # on Windows the one that can be sent to a process
INTERRUPTS = tuple(number for number in (signal.SIGINT, BREAK) if number is not None)
STOPPING = tuple(
    number for number in (signal.SIGTERM, signal.SIGINT, REQUEUE, BREAK) if number is not None
)


def apart() -> dict[str, Any]:
    """Options of `Popen`: a Ctrl-C in the terminal reaches the launcher alone, which hands it on once."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def hand_on(number: int, process: subprocess.Popen) -> None:
    """Send a signal that this process has got to one that was started `apart`, if it still runs."""
    if process.poll() is None:
        process.send_signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else number)
