"""Locks: one writer of a folder or file at a time.

    <folder>/.distill.lock      in a folder, while a process writes there
    .<name>.distill.lock        beside a file or folder that is written atomically

The file is locked by the system, which releases it when the process ends. Its content is for
messages: machine, process, start times, command. On a file system without locks the content
decides: a process of this machine that has ended holds nothing. A lock of another machine is never
taken, since its process may still run.

Processes of our launcher inherit its lock. Of processes that torchrun or SLURM start, rank 0 takes
it.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.machine.alive import alive, host, start_time
from distill.machine.ranks import rank
from distill.storage.atomic import remove_leftovers, write_atomic
from distill.storage.bounded import mapping_of
from distill.storage.safe_paths import (
    check_can_be_written,
    check_regular_file,
    check_written_paths,
    open_regular_file,
    separate_hard_links,
)
from distill.terminal.console import note
from distill.terminal.secret import redacted

NAME = ".distill.lock"
SHORT_WAIT = 1.0  # ours: seconds after which a process that only tests a lock has released it
EXIT_WAIT = 15.0  # ours: seconds in which children of a killed process end: loaders check every 5
SHARED_LOCKS = "DISTILL_LOCKS"  # variable with the file descriptors of inherited locks
LOCKED_BYTE = 2**30  # the locked byte on Windows, where a locked byte cannot be read


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    started: str | None = None
    since: str = "?"
    command: str = ""
    job: str | None = None  # SLURM's

    def __str__(self) -> str:
        what = f" ({self.command})" if self.command else ""
        return f"process {self.pid} on {self.host} since {self.since}{what}"

    @property
    def here(self) -> bool:
        return self.host == host()

    @property
    def runs(self) -> bool:
        """Whether the process still runs; True for a process of another machine."""
        return not self.here or alive(self.pid, self.started)


_held_locks: dict[Path, int] = {}  # path -> file descriptor of the locks of this process
_inherited: list[int] = []  # file descriptors of the launcher's locks


@contextmanager
def one_writer(folder: Path, key: str, *, deep: bool = False) -> Iterator[None]:
    """Lock a folder for writing. It is created if needed, and removed again if it stays empty.

    Leftovers of killed writers are removed, with `deep` also in subfolders. A process that holds
    the lock already, and ranks other than 0, continue without locking. Raises BlockingIOError,
    starting with `key`, if another process holds the lock, and ValueError for a folder with unsafe
    links.
    """
    if rank() != 0:
        yield
        return
    check_can_be_written(folder, key)
    check_written_paths(folder, key)
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / NAME, f"{key}={folder}"):
            remove_leftovers(folder, deep=deep)
            separate_hard_links(folder)
            yield
    finally:
        if fresh:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def one_writer_of(path: Path, key: str) -> Iterator[None]:
    """As `one_writer`, for a file or folder that is written atomically."""
    check_can_be_written(path.parent, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_lock_beside(path), f"{key}={path}"):
        remove_leftovers(path.parent, of=path.name)
        yield


def holder_of(folder: Path) -> Holder | None:
    """The process that writes into this folder or to this file; None if there is none."""
    for path in (folder / NAME, _lock_beside(folder)):
        if holder := _current_holder(path):
            return holder
    return None


def check_free(folder: Path, key: str) -> None:
    """Raise BlockingIOError, starting with `key`, if another process writes there.

    Called before models and data are read.
    """
    if rank() != 0:
        return
    check_can_be_written(folder.parent if folder.is_file() else folder, key)
    check_written_paths(folder, key)
    places = (folder / NAME, _lock_beside(folder))
    for path in places:
        check_regular_file(path, f"{key}={folder}", one_name=True)
    there = [path for path in places if path.exists()]
    for path in (path for path in there if path.absolute() not in _held_locks):
        deadline = time.monotonic() + SHORT_WAIT  # the other process may only test the lock
        while holder := _current_holder(path):
            if time.monotonic() > deadline or not holder.here:
                if holder.runs and not _same_job(holder):
                    raise BlockingIOError(_refusal(f"{key}={folder}", holder, path))
                break  # its last processes are ending: `one_writer` waits for them
            time.sleep(0.05)
        else:
            with suppress(OSError), _locked(path, f"{key}={folder}"):
                pass  # removes the lock file of a killed command


def share_locks(environment: MutableMapping[str, str]) -> dict[str, Any]:
    """Options of `Popen` that pass the locks of this process to a child: they are held until both
    have ended.
    """
    if sys.platform == "win32" or not _held_locks:
        return {}
    environment[SHARED_LOCKS] = ",".join(map(str, _held_locks.values()))
    return {"pass_fds": tuple(_held_locks.values())}


def adopt() -> None:
    """Keep the locks of the launcher while this process lives; its children do not inherit them."""
    for number in os.environ.pop(SHARED_LOCKS, "").split(","):
        with suppress(OSError, ValueError):
            os.set_inheritable(int(number), False)
            _inherited.append(int(number))


def _lock_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{NAME}")


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    path = path.absolute()
    if path in _held_locks:
        yield
        return
    _held_locks[path] = _acquire(path, what)
    try:
        yield
    finally:
        if path in _held_locks:  # not in a forked process
            _release(path, _held_locks.pop(path))


def _acquire(path: Path, what: str) -> int:
    """Lock the file and write this process into it; returns the file descriptor."""
    start = time.monotonic()
    while True:
        file = open_regular_file(path, what, os.O_CREAT)
        got, holder = _try_lock(file), _read(path)
        ours = got and _is_same_file(file, path)
        if got is None:  # a file system without locks: the content decides
            ours = holder is None or not holder.runs
        foreign = holder is not None and not holder.here and not _same_job(holder)
        if ours and not foreign:
            break
        os.close(file)
        waiting = time.monotonic() - start
        ending = holder is not None and (not holder.runs or _same_job(holder))
        patience = EXIT_WAIT if ending else SHORT_WAIT
        if holder is not None and (foreign or waiting > patience):
            raise BlockingIOError(_refusal(what, holder, path))
        if waiting > patience:
            raise BlockingIOError(f"{what}: another process writes there; wait for its end")
        time.sleep(0.05)
    if holder is not None:
        note(f"{what}: {holder} was killed; taking its place")
    me = _this_process()
    with suppress(OSError):  # on a full disk the lock holds without content
        if got is None:
            return _acquire_without_locks(file, path, me, what)
        os.ftruncate(file, 0)
        os.pwrite(file, _serialized(me), 0) if hasattr(os, "pwrite") else os.write(
            file, _serialized(me)
        )
    return file


def _acquire_without_locks(file: int, path: Path, me: Holder, what: str) -> int:
    """Without file locks: write this process into the file, and check that no other did so too."""
    os.close(file)
    write_atomic(path, _serialized(me))
    time.sleep(0.2)
    holder = _read(path)
    if holder != me and holder is not None:
        raise BlockingIOError(_refusal(what, holder, path))
    return open_regular_file(path, what)


def _this_process() -> Holder:
    now = datetime.now(UTC).astimezone().isoformat(" ", "seconds")
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    prefix = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    command = shlex.join([*prefix, *redacted(sys.argv[1:])])
    pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID")
    return Holder(host(), pid, start_time(pid), now, command[:300], job)


def _serialized(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode() + b"\n"


def _read(path: Path) -> Holder | None:
    """The content of a lock file; None if it is empty or damaged."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = mapping_of(path)
        texts = {key: str(content[key])[:300] for key in ("host", "since", "command")}
        optional = {key: content[key] for key in ("started", "job")}
        optional = {key: None if x is None else str(x) for key, x in optional.items()}
        return Holder(pid=int(content["pid"]), **optional, **texts)
    return None


def _current_holder(path: Path) -> Holder | None:
    """The holder of this lock, found by trying to lock it; a process that takes it now retries."""
    if path.absolute() in _held_locks:
        return _read(path)
    try:
        file = open_regular_file(path, str(path))
    except (OSError, ValueError):  # there is no file, or not a regular one
        return None
    try:
        got, holder = _try_lock(file, shared=True), _read(path)
    finally:
        os.close(file)
    if got is False:
        return holder or Holder("this machine or another", 0)
    return (
        holder if holder is not None and (holder.runs if got is None else not holder.here) else None
    )


def _same_job(holder: Holder) -> bool:
    """Whether the holder is the same SLURM job before a requeue: it has ended on every machine."""
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return restarted and holder.job is not None and holder.job == os.environ.get("SLURM_JOB_ID")


def _refusal(what: str, holder: Holder, path: Path) -> str:
    if not holder.here and holder.pid:
        hint = f"wait for it; if it has ended, remove {path}"
    elif holder.runs or not holder.pid:
        hint = f"wait for it, or name another {what.partition('=')[0]}="
    else:
        return (
            f"{what}: {holder} has ended, but its child processes still write there; end them first"
        )
    return f"{what}: {holder} writes there, and only one process may; {hint}"


def _is_same_file(file: int, path: Path) -> bool:
    """Whether the opened file still has this name: the previous holder may have removed it."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def _try_lock(file: int, *, shared: bool = False) -> bool | None:
    """Lock an opened file; returns whether it worked, or None if files cannot be locked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError):  # a file system without locks, a system without the module
        return None
    return True


def _release(path: Path, file: int) -> None:
    if os.name == "posix":
        path.unlink(missing_ok=True)  # while it is locked: waiting processes check its name
        os.close(file)
        return
    os.close(file)
    with suppress(OSError):  # Windows keeps a file that another process has opened
        path.unlink()


def _forked() -> None:
    """In a forked DataLoader worker: hold no locks, since it may briefly outlive its parent."""
    for file in (*_held_locks.values(), *_inherited):
        with suppress(OSError):
            os.close(file)
    _held_locks.clear()
    _inherited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
