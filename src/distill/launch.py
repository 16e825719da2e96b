"""Several processes on one machine, each working on the configuration that the first one has resolved.

Lightning would start the command line again in every process, which under Hydra makes each compose, and sweep, anew.
torchrun and SLURM start the processes themselves; then this module has nothing to do.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.compose import world
from distill.console import say
from distill.hardware import cores
from distill.locks import pass_on
from distill.secret import SECRETS
from distill.signals import STOPPING, apart, hand_on

GRACE = 20.0  # seconds for the other workers to stop by themselves once one has failed


def needed(processes: int, nodes: int) -> bool:
    """Whether this process must start the others. Raises ValueError for several nodes without a launcher."""
    if (
        processes == 1 or "LOCAL_RANK" in os.environ or world() > 1
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
    """Run the worker of a command `processes` times on its folder; returns the exit code of the first that fails, or 0.

    `secrets` are values that the configuration in the folder is without: the environment has them.

    Signals are handed on, so that the workers can save; when one worker dies, the others are ended.
    """
    say(f"starting {processes} processes")
    threads = str(max(1, cores() // processes))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
    }
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared, "NODE_RANK": "0"}
    environment.pop(
        "SLURM_NTASKS", None
    )  # by which Lightning would take SLURM's one task for all of them
    shared_locks = pass_on(environment)
    environment |= {SECRETS: json.dumps(dict(secrets))} if secrets else {}
    worker = [sys.executable, "-m", "distill.worker", str(folder), command]
    workers = [
        subprocess.Popen(
            worker,
            env={**environment, "LOCAL_RANK": str(rank), "RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else None,
            **apart(),
            **shared_locks,
        )
        for rank in range(processes)
    ]
    for number in STOPPING:
        signal.signal(number, lambda n, _: [hand_on(n, worker) for worker in workers])
    deadline = math.inf
    while any(w.poll() is None for w in workers):
        if deadline == math.inf and any(w.poll() for w in workers):
            deadline = time.monotonic() + GRACE
        for worker in workers if time.monotonic() > deadline else ():
            worker.kill()
        time.sleep(0.2)
    return next((w.returncode for w in workers if w.returncode), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
