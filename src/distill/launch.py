"""Several processes on one machine, each running `distill.run` on the configuration that the first one has resolved.

Lightning would start the command line again in every process, which under Hydra makes each compose, and sweep, anew.
torchrun and SLURM start the processes themselves; then this module has nothing to do.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STARTED_ELSEWHERE = ("LOCAL_RANK", "SLURM_PROCID")
GRACE = 20.0  # seconds for the other workers to stop by themselves once one has failed


def needed(processes: int, nodes: int) -> bool:
    """Whether this process must start the others. Raises ValueError for several nodes without a launcher."""
    if processes == 1 or any(name in os.environ for name in STARTED_ELSEWHERE):
        return False
    if nodes > 1:
        raise ValueError(f"trainer.num_nodes={nodes}: start the command by torchrun on every node, or by srun")
    return True


def launch(folder: Path, processes: int) -> int:
    """Run the worker `processes` times on the run folder; returns the exit code of the first that fails, or 0.

    Signals are handed on, so that the workers can save; when one worker dies, the others are ended.
    """
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    command = [sys.executable, "-m", "distill.worker", str(folder)]
    workers = []
    for rank in range(processes):
        own = {"LOCAL_RANK": str(rank), "RANK": str(rank), "NODE_RANK": "0"}
        output = None if rank == 0 else subprocess.DEVNULL
        # A group of their own: a Ctrl-C in the terminal reaches this process alone, which hands it on once.
        workers.append(
            subprocess.Popen(command, env={**os.environ, **shared, **own}, stdout=output, start_new_session=True)
        )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda n, _: [w.send_signal(n) for w in workers if w.poll() is None])
    while any(w.poll() is None for w in workers):
        if any(w.poll() not in (None, 0) for w in workers):
            _end(workers)
        time.sleep(0.2)
    return next((w.returncode for w in workers if w.returncode), 0)


def _end(workers: list[subprocess.Popen]) -> None:
    """Give the others time to stop by themselves, then end them."""
    deadline = time.monotonic() + GRACE
    while any(w.poll() is None for w in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    for worker in workers:
        worker.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
