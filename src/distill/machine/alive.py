"""Which process a number means, and whether it still runs: a number is given again once its process
has ended.
"""

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path


def host() -> str:
    """The name of this machine, as its network has it."""
    return platform.node() or "localhost"


def host_hash() -> str:
    """Four hex digits that stand for this machine in the name of a file."""
    return hashlib.sha256(host().encode()).hexdigest()[:4]


def start_time(pid: int) -> str | None:
    """When the process began, in the system's own words; None where it does not say, or of no
    process.

    Two processes that have had one number differ in it.
    """
    if sys.platform == "linux":
        fields = _stat(pid)
        return fields[19] if fields else None  # clock ticks since the machine began
    if sys.platform == "win32":
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["ps", "-o", "lstart=", "-p", str(pid)]
        said = subprocess.run(asked, capture_output=True, timeout=10, check=False).stdout
        return said.decode("utf-8", "replace").strip() or None
    return None


def alive(pid: int, began: str | None = None) -> bool:
    """Whether the process of this number runs on this machine and, where both are known, began
    then.
    """
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
    return not fields or fields[0] != "Z"  # one that has ended, and whose parent has not asked yet


def _stat(pid: int) -> list[str]:
    """The fields of Linux's /proc/<pid>/stat that come after the name; nothing elsewhere."""
    with contextlib.suppress(OSError):
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(errors="replace", encoding="utf-8")
            .rpartition(")")[2]
            .split()
        )
    return []


def _runs_on_windows(pid: int) -> bool:
    """`os.kill` would end it there."""
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
