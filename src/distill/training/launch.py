"""Several processes on one machine, each working on the configuration that the first one has
resolved.

Lightning would start the command line again in every process, which under Hydra makes each compose,
and sweep, anew. torchrun and SLURM start the processes themselves; then this module has nothing to
do.

<folder>/processes/0.log     what a process said last, and what its libraries write past Python
<folder>/processes/0.beat    where it is
<folder>/processes/0.end     why it ended

All of it goes when the processes have done their work.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.config.compose import world_size
from distill.data.shards import shards_in
from distill.machine import signals
from distill.machine.faults import RERUN, RESTART
from distill.machine.hardware import cores
from distill.storage.checkpoint_names import checkpoints_at
from distill.storage.locks import share_locks
from distill.terminal.console import say
from distill.terminal.progress import last_heartbeat
from distill.terminal.secret import SECRETS
from distill.terminal.shown import shown
from distill.training.run_folders import PROCESSES

GRACE = 20.0  # seconds for the other workers to stop by themselves once one has failed
KILLED = [-getattr(signal, name, 0) for name in ("SIGKILL", "SIGSEGV", "SIGBUS")]  # by someone else


def needed(processes: int, nodes: int) -> bool:
    """Whether this process must start the others.

    Raises ValueError for several nodes without a launcher.
    """
    if (
        processes == 1 or "LOCAL_RANK" in os.environ or world_size() > 1
    ):  # SLURM's one task, a shell say, starts nothing
        return False
    if nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={nodes}: start the command by torchrun on every node, or by srun"
        )
    return True


def launch(
    folder: Path, processes: int, command: str = "run", *, secrets: Mapping[str, Any] | None = None
) -> int:
    """Run the worker of a command `processes` times on its folder; returns the exit code of the
    first that fails, or 0.

    `secrets` are values that the configuration in the folder is without: the environment has them.

    Signals are handed on, so that the workers can save; when one worker dies, the others are
    ended, and why it died is said in one sentence. The workers end when this process does. Raises
    `Stopped` where a signal came before there was anything to save.
    """
    say(f"starting {processes} processes")
    notes = folder / PROCESSES
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    workers = _Workers(folder, processes, command, secrets or {})
    before = signals.set_handlers(workers.told)
    try:
        workers.wait()
    finally:
        workers.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not (code := workers.code()):
        shutil.rmtree(notes, ignore_errors=True)
    return code


def way_on(folder: Path, command: str = "run") -> str:
    """How to go on with what a command has made in its folder so far, as what one is told to do."""
    if command in ("cache", "synthesize"):
        count = len(shards_in(folder))
        return f"{RERUN} (whole: {count} shard{'s' * (count > 1)})" if count else RESTART
    if command != "run":
        return RERUN
    with suppress(FileNotFoundError):
        checkpoints_at(folder)
        return f"go on with: python -m distill.run resume={folder}"
    return f"remove {folder}, which has no checkpoint yet, and give the command again"


class _Workers:
    """The processes of a command, in the order of their ranks, and how they ended."""

    def __init__(self, folder: Path, processes: int, command: str, secrets: Mapping[str, Any]):
        self.folder, self.command, self.notes = folder, command, folder / PROCESSES
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(processes),
            "NODE_RANK": "0",
        }
        threads = str(max(1, cores() // processes))
        environment = {"OMP_NUM_THREADS": threads, **signals.child_environment(), **shared}
        environment.pop(
            "SLURM_NTASKS", None
        )  # by which Lightning would take SLURM's one task for all of them
        shared_locks = share_locks(environment)
        environment |= {SECRETS: json.dumps(dict(secrets))} if secrets else {}
        worker = [sys.executable, "-m", "distill.training.rank_process", str(folder), command]
        self._all = [
            subprocess.Popen(
                worker,
                env={**environment, "LOCAL_RANK": str(rank), "RANK": str(rank)},
                stdout=subprocess.DEVNULL if rank else None,
                **signals.new_session(),
                **shared_locks,
            )
            for rank in range(processes)
        ]
        self._failed: list[int] = []  # ranks, in the order in which they were seen to fail

    def told(self, number: int, _frame: Any) -> None:
        """Hand a signal on; a second Ctrl-C ends all at once."""
        twice = signals.is_second_interrupt(number)
        for worker in self._all:
            if twice:
                worker.kill()
            signals.forward(number, worker)
        signals.mark_handled(number)

    def wait(self) -> None:
        """Until all have ended; once one has failed, the others get GRACE seconds."""
        deadline = math.inf
        while any(worker.poll() is None for worker in self._all):
            self._look()
            if self._failed and deadline == math.inf:
                deadline = time.monotonic() + GRACE
            if time.monotonic() > deadline:
                return
            time.sleep(0.2)
        self._look()

    def kill(self) -> None:
        for worker in self._all:
            worker.kill()
            worker.wait()

    def _look(self) -> None:
        """Note who has failed by now; who is ended by `kill` has not."""
        for rank, worker in enumerate(self._all):
            if worker.poll() and rank not in self._failed:
                self._failed.append(rank)

    def code(self) -> int:
        """The exit code of the one that failed first, whose reason is said; 0 if none did."""
        if not self._failed:
            return 0
        first = self._first()
        code, end = self._all[first].returncode, self._end(first)
        if "stopped" in end and (number := signals.received()):
            self._forget()
            raise signals.Stopped(number)
        if code < 0:
            name = f"process {first} was killed by signal {-code}"
            at = last_heartbeat(self.notes / f"{first}.beat")
            self._say(f"{name} {at}".strip(), bug=True)
            return 128 - code
        if end or not signals.received():
            said = end.get("sentence", f"process {first} ended with exit code {code}")
            self._say(said, bug=end.get("bug", True))
        else:  # asked to, and with all saved
            self._forget()
        return code

    def _first(self) -> int:
        """The rank that failed for a reason of its own: those that lost it may have ended first."""
        ends = {rank: self._end(rank) for rank in self._failed}
        killed = [r for r in ends if self._all[r].returncode in KILLED]
        own = [rank for rank, end in ends.items() if end and not end.get("lost")]
        noted = sorted(own or [r for r in ends if ends[r]], key=lambda rank: ends[rank]["at"])
        died = [rank for rank in ends if self._all[rank].returncode < 0]
        return (killed or (noted if own else died) or noted or self._failed)[0]

    def _end(self, rank: int) -> dict[str, Any]:
        """What a process noted of its end: `at`, and `stopped` or `sentence`, `bug`, `lost`."""
        with suppress(OSError, ValueError):
            return json.loads((self.notes / f"{rank}.end").read_text(encoding="utf-8"))
        return {}

    def _say(self, sentence: str, *, bug: bool) -> None:
        """A mistake is said in its own words; of anything else the tracebacks stay."""
        if bug:
            way = way_on(self.folder, self.command)
            sentence = f"{sentence}; {way} (what each process said is in {self.notes})"
        else:
            self._forget()
        print(f"distill: {shown(sentence)}", file=sys.stderr)

    def _forget(self) -> None:
        shutil.rmtree(self.notes, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
