"""Whether a process still runs. The system reuses process ids, so start times are compared too."""

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path


def host() -> str:
    """The network name of this machine."""
    return platform.node() or "localhost"


def host_hash() -> str:
    """Four hex digits that identify this machine in file names."""
    return hashlib.sha256(host().encode()).hexdigest()[:4]


def start_time(pid: int) -> str | None:
    """The start time of a process as text of the system; None if it is not known.

    Two processes with the same id have different start times.
    """
    if sys.platform == "linux":
        fields = _stat(pid)
        return fields[19] if fields else None  # clock ticks since boot
    if sys.platform == "win32":
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["ps", "-o", "lstart=", "-p", str(pid)]
        output = subprocess.run(command, capture_output=True, timeout=10, check=False).stdout
        return output.decode("utf-8", "replace").strip() or None
    return None


def alive(pid: int, began: str | None = None) -> bool:
    """Whether a process with this id runs here and, if both are known, has this start time."""
    if pid <= 0 or not _runs(pid):
        return False
    now = start_time(pid) if began is not None else None
    return now is None or now == began


def _runs(pid: int) -> bool:
    if sys.platform == "win32":
        return _runs_on_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return isinstance(pid, int) and pid < 2**31
    fields = _stat(pid)
    return not fields or fields[0] != "Z"  # a zombie has ended


def _stat(pid: int) -> list[str]:
    """The fields of Linux's /proc/<pid>/stat after the name; [] on other systems."""
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(errors="replace", encoding="utf-8")
            .rpartition(")")[2]
            .split()
        )
    return []


def _runs_on_windows(pid: int) -> bool:
    """For Windows, where `os.kill` would end the process."""
    if sys.platform != "win32":
        return False
    import ctypes

    synchronize, timed_out = 0x00100000, 0x00000102
    kernel = ctypes.windll.kernel32
    process = kernel.OpenProcess(synchronize, False, pid)
    if not process:
        return False
    try:
        return kernel.WaitForSingleObject(process, 0) == timed_out
    finally:
        kernel.CloseHandle(process)
