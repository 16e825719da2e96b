"""Several processes on one machine, all with the configuration that the first one resolved.

Lightning would run the command line again in every process, so Hydra would compose, and sweep,
again. torchrun and SLURM start the processes themselves; then this module does nothing.

<folder>/processes/0.log     last output of a rank's process, and what its libraries print
<folder>/processes/0.beat    its current step
<folder>/processes/0.end     why it ended

All of these are removed when the processes have finished.
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
from distill.data.named import shards_in
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

GRACE = 20.0  # seconds for the other ranks to stop by themselves after one has failed
KILLED = [-getattr(signal, name, 0) for name in ("SIGKILL", "SIGSEGV", "SIGBUS")]  # from outside


def needed(processes: int, nodes: int) -> bool:
    """Whether this process must start the others.

    Raises ValueError for several nodes without a launcher.
    """
    launched = (
        "LOCAL_RANK" in os.environ or world_size() > 1
    )  # a single task of SLURM is not launched
    if processes == 1 or launched:
        return False
    if nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={nodes}: start the command by torchrun on every node, or by srun"
        )
    return True


def launch(
    folder: Path, processes: int, command: str = "run", *, secrets: Mapping[str, Any] | None = None
) -> int:
    """Run a command in `processes` rank processes; returns the exit code of the first that fails,
    or 0.

    `secrets` are values that the configuration in the folder omits; the environment holds them.

    Signals are forwarded, so that the ranks can save. When one rank dies, the others are ended, and
    the reason is printed in one sentence. The ranks end when this process does. Raises `Stopped`
    for a signal before there was anything to save.
    """
    say(f"starting {processes} processes")
    notes = folder / PROCESSES
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True)
    ranks = _RankProcesses(folder, processes, command, secrets or {})
    before = signals.set_handlers(ranks.forward_signal)
    try:
        ranks.wait()
    finally:
        ranks.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    code = ranks.code()
    if not code:
        shutil.rmtree(notes, ignore_errors=True)
    return code


def way_on(folder: Path, command: str = "run") -> str:
    """How to continue what a command has made in its folder so far, as an instruction."""
    if command in ("cache", "synthesize"):
        count = len(shards_in(folder))
        return f"{RERUN} (whole: {count} shard{'s' * (count > 1)})" if count else RESTART
    if command != "run":
        return RERUN
    with suppress(FileNotFoundError):
        checkpoints_at(folder)
        return f"go on with: python -m distill.run resume={folder}"
    return f"remove {folder}, which has no checkpoint yet, and give the command again"


class _RankProcesses:
    """The rank processes of a command, in rank order, and how they ended."""

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
        # With SLURM_NTASKS=1 Lightning would assume a single process.
        environment.pop("SLURM_NTASKS", None)
        shared_locks = share_locks(environment)
        environment |= {SECRETS: json.dumps(dict(secrets))} if secrets else {}
        arguments = [sys.executable, "-m", "distill.training.rank_process", str(folder), command]
        self._all = [
            subprocess.Popen(
                arguments,
                env={**environment, "LOCAL_RANK": str(rank), "RANK": str(rank)},
                stdout=subprocess.DEVNULL if rank else None,
                **signals.new_session(),
                **shared_locks,
            )
            for rank in range(processes)
        ]
        self._failed: list[int] = []  # ranks in the order of their failures

    def forward_signal(self, number: int, _frame: Any) -> None:
        """Forward a signal; a second Ctrl-C kills all ranks."""
        twice = signals.is_second_interrupt(number)
        for process in self._all:
            if twice:
                process.kill()
            signals.forward(number, process)
        signals.mark_handled(number)

    def wait(self) -> None:
        """Wait until all have ended; after a failure the others get GRACE seconds."""
        deadline = math.inf
        while any(process.poll() is None for process in self._all):
            self._poll()
            if self._failed and deadline == math.inf:
                deadline = time.monotonic() + GRACE
            if time.monotonic() > deadline:
                return
            time.sleep(0.2)
        self._poll()

    def kill(self) -> None:
        for process in self._all:
            process.kill()
            process.wait()

    def _poll(self) -> None:
        """Note the ranks that have failed by now. Those that `kill` ends do not count."""
        for rank, process in enumerate(self._all):
            if process.poll() and rank not in self._failed:
                self._failed.append(rank)

    def code(self) -> int:
        """The exit code of the rank that failed first, whose reason is printed; 0 if none did."""
        if not self._failed:
            return 0
        first = self._first_failed()
        code, end = self._all[first].returncode, self._note_of(first)
        if "stopped" in end and (number := signals.received()):
            self._remove_notes()
            raise signals.Stopped(number)
        if code < 0:
            name = f"process {first} was killed by signal {-code}"
            at = last_heartbeat(self.notes / f"{first}.beat")
            self._print_reason(f"{name} {at}".strip(), bug=True)
            return 128 - code
        if end or not signals.received():
            said = end.get("sentence", f"process {first} ended with exit code {code}")
            self._print_reason(said, bug=end.get("bug", True))
        else:  # stopped by a signal, everything saved
            self._remove_notes()
        return code

    def _first_failed(self) -> int:
        """The rank that failed first by itself. Ranks that lost the connection to it may have ended
        before it.
        """
        ends = {rank: self._note_of(rank) for rank in self._failed}
        killed = [r for r in ends if self._all[r].returncode in KILLED]
        own = [rank for rank, end in ends.items() if end and not end.get("lost")]
        noted = sorted(own or [r for r in ends if ends[r]], key=lambda rank: ends[rank]["at"])
        died = [rank for rank in ends if self._all[rank].returncode < 0]
        return (killed or (noted if own else died) or noted or self._failed)[0]

    def _note_of(self, rank: int) -> dict[str, Any]:
        """What a rank noted at its end: `at`, and `stopped` or `sentence`, `bug`, `lost`."""
        with suppress(OSError, ValueError):
            return json.loads((self.notes / f"{rank}.end").read_text(encoding="utf-8"))
        return {}

    def _print_reason(self, sentence: str, *, bug: bool) -> None:
        """Print why a rank ended. A user's mistake removes the notes; for a bug the tracebacks
        stay.
        """
        if bug:
            way = way_on(self.folder, self.command)
            sentence = f"{sentence}; {way} (the output of each process is in {self.notes})"
        else:
            self._remove_notes()
        print(f"distill: {shown(sentence)}", file=sys.stderr)

    def _remove_notes(self) -> None:
        shutil.rmtree(self.notes, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
