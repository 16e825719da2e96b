"""One writer of a folder, or of a file, at a time.

    <folder>/.distill.lock      of a folder; it is there while somebody writes
    .<name>.distill.lock        of a file, or of a folder that appears only when whole: beside it

The system's own lock on that file decides: it ends with the process that holds it, however that
ends. What the file says is for words: machine, process, when that began, since when, which command.
Where a file system has no locks, its words decide: a process of this machine that has ended holds
nothing. Another machine's lock is never taken, for nobody here can know whether its process runs.

Processes that a launcher starts are given its lock. Of several that torchrun or SLURM start the
first one takes it.
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
from distill.storage.safe_paths import check_regular_file, check_written_paths, open_regular_file
from distill.terminal.console import note
from distill.terminal.secret import redacted

NAME = ".distill.lock"
SHORT_WAIT = 1.0  # ours: seconds in which whoever only asks for a lock has let go of it
EXIT_WAIT = (
    15.0  # ours: seconds in which what a killed process had started ends: loaders look every 5
)
SHARED_LOCKS = (
    "DISTILL_LOCKS"  # the open files of locks, in the environment of what a launcher starts
)
LOCKED_BYTE = 2**30  # on Windows, where nobody may read a byte that is locked


@dataclass(frozen=True)
class Holder:
    """Who writes: the process, and since when."""

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
        """Whether the process runs still; of another machine it is taken to."""
        return not self.here or alive(self.pid, self.started)


_held_locks: dict[Path, int] = {}  # the file of each lock that this process holds, opened
_inherited: list[int] = []  # those of its launcher


@contextmanager
def one_writer(folder: Path, key: str, *, deep: bool = False) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if need be, and goes again if it
    stays empty.

    What killed writers have left in it goes, with `deep` below it too. A process that holds the
    lock, and any but the first of several, passes at once. Raises BlockingIOError, which begins
    with `key`, if another one holds it, and ValueError for a folder in which what is written would
    land elsewhere.
    """
    if rank() != 0:
        yield
        return
    check_written_paths(folder, key)
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / NAME, f"{key}={folder}"):
            remove_leftovers(folder, deep=deep)
            yield
    finally:
        if fresh:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


@contextmanager
def one_writer_of(path: Path, key: str) -> Iterator[None]:
    """As `one_writer`, for a file or folder that is there only when whole: nobody else makes it at
    the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(_lock_beside(path), f"{key}={path}"):
        remove_leftovers(path.parent, of=path.name)
        yield


def holder_of(folder: Path) -> Holder | None:
    """Who writes into this folder, or makes this file, now; None if nobody does."""
    for path in (folder / NAME, _lock_beside(folder)):
        if who := _current_holder(path):
            return who
    return None


def check_free(folder: Path, key: str) -> None:
    """Raise BlockingIOError, which begins with `key`, if another process writes there: said before
    anything is read.
    """
    if rank() != 0:
        return
    check_written_paths(folder, key)
    places = (folder / NAME, _lock_beside(folder))
    for path in places:
        check_regular_file(path, f"{key}={folder}")
    there = [path for path in places if path.exists()]
    for path in (path for path in there if path.absolute() not in _held_locks):
        deadline = time.monotonic() + SHORT_WAIT  # it may only have been asked for
        while who := _current_holder(path):
            if time.monotonic() > deadline or not who.here:
                if who.runs and not _same_job(who):
                    raise BlockingIOError(_refusal(f"{key}={folder}", who, path))
                break  # its last processes are ending: whoever takes the lock waits for them
            time.sleep(0.05)
        else:
            with suppress(OSError), _locked(path, f"{key}={folder}"):
                pass  # a killed command's: it goes, whatever becomes of this one


def share_locks(environment: MutableMapping[str, str]) -> dict[str, Any]:
    """Options of `Popen` with which what is started shares the locks of this process, and so
    outlives none of them.
    """
    if sys.platform == "win32" or not _held_locks:
        return {}
    environment[SHARED_LOCKS] = ",".join(map(str, _held_locks.values()))
    return {"pass_fds": tuple(_held_locks.values())}


def adopt() -> None:
    """In a process that a launcher has started: keep its locks as long as this one lives, and hand
    them to nobody.
    """
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
        if path in _held_locks:  # not so in a process that was forked off
            _release(path, _held_locks.pop(path))


def _acquire(path: Path, what: str) -> int:
    """The file of the lock, opened and locked, with words of this process in it."""
    began = time.monotonic()
    while True:
        file = open_regular_file(path, what, os.O_CREAT)
        got, who = _try_lock(file), _read(path)
        ours = got and _is_same_file(file, path)
        if got is None:  # no locks here: the words decide
            ours = who is None or not who.runs
        foreign = who is not None and not who.here and not _same_job(who)
        if ours and not foreign:
            break
        os.close(file)
        waiting = time.monotonic() - began
        ending = who is not None and (not who.runs or _same_job(who))
        patience = EXIT_WAIT if ending else SHORT_WAIT
        if who is not None and (foreign or waiting > patience):
            raise BlockingIOError(_refusal(what, who, path))
        if waiting > patience:
            raise BlockingIOError(f"{what}: another process writes there; wait for its end")
        time.sleep(0.05)
    if who is not None:
        note(f"{what}: {who} has ended before its end; going on in its place")
    me = _this_process()
    with suppress(OSError):  # a full disk: the lock holds without words
        if got is None:
            return _acquire_without_locks(file, path, me, what)
        os.ftruncate(file, 0)
        os.pwrite(file, _serialized(me), 0) if hasattr(os, "pwrite") else os.write(
            file, _serialized(me)
        )
    return file


def _acquire_without_locks(file: int, path: Path, me: Holder, what: str) -> int:
    """Where there are no locks: say who writes, and look whether another one has said so in the
    same moment.
    """
    os.close(file)
    write_atomic(path, _serialized(me))
    time.sleep(0.2)
    who = _read(path)
    if who != me and who is not None:
        raise BlockingIOError(_refusal(what, who, path))
    return open_regular_file(path, what)


def _this_process() -> Holder:
    now = datetime.now(UTC).astimezone().isoformat(" ", "seconds")
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    begins = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    command = shlex.join([*begins, *redacted(sys.argv[1:])])
    pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID")
    return Holder(host(), pid, start_time(pid), now, command[:300], job)


def _serialized(who: Holder) -> bytes:
    return json.dumps(asdict(who)).encode() + b"\n"


def _read(path: Path) -> Holder | None:
    """What a lock says; None of one that says nothing (yet)."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        said = mapping_of(path)
        texts = {key: str(said[key])[:300] for key in ("host", "since", "command")}
        began, job = (None if said[key] is None else str(said[key]) for key in ("started", "job"))
        return Holder(pid=int(said["pid"]), started=began, job=job, **texts)
    return None


def _current_holder(path: Path) -> Holder | None:
    """Who holds this lock, by asking for it; whoever takes it in this moment asks again."""
    if path.absolute() in _held_locks:
        return _read(path)
    try:
        file = open_regular_file(path, str(path))
    except (OSError, ValueError):  # there is none, or what nobody has locked
        return None
    try:
        got, who = _try_lock(file, shared=True), _read(path)
    finally:
        os.close(file)
    if got is False:
        return who or Holder("this machine or another", 0)
    return who if who is not None and (who.runs if got is None else not who.here) else None


def _same_job(who: Holder) -> bool:
    """SLURM runs a job again only when it has ended, be it on another machine."""
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return restarted and who.job is not None and who.job == os.environ.get("SLURM_JOB_ID")


def _refusal(what: str, who: Holder, path: Path) -> str:
    if not who.here and who.pid:
        way = f"wait for it; if it has ended, remove {path}"
    elif who.runs or not who.pid:
        way = f"wait for it, or name another {what.partition('=')[0]}="
    else:
        return (
            f"{what}: {who} has ended, but what it had started still writes there; end that first"
        )
    return f"{what}: {who} writes there, and only one may; {way}"


def _is_same_file(file: int, path: Path) -> bool:
    """Whether the opened file is the one of this name: whoever held it has removed it in the
    end.
    """
    with suppress(OSError):
        return os.path.samestat(os.fstat(file), os.stat(path))
    return False


def _try_lock(file: int, *, shared: bool = False) -> bool | None:
    """Lock an opened file: whether that went, and None where files cannot be locked."""
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
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it looks for its name
        os.close(file)
        return
    os.close(file)
    with suppress(OSError):  # Windows keeps what another one has opened
        path.unlink()


def _forked() -> None:
    """A worker of a loader holds nothing: it may outlive for a moment who started it."""
    for file in (*_held_locks.values(), *_inherited):
        with suppress(OSError):
            os.close(file)
    _held_locks.clear()
    _inherited.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
