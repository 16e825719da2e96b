"""`python -m distill.training.rank_process <folder> <command>`: one of the processes of
`distill.training.launch`.

It says nothing of its own end: it notes why, and the launcher says the first such note of all.
"""

import importlib
import io
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config import errors
from distill.machine import faults, signals
from distill.machine.ranks import rank
from distill.storage.atomic import write_atomic
from distill.storage.bounded import yaml_of
from distill.storage.locks import adopt
from distill.terminal import console, progress
from distill.terminal.secret import SECRETS, masked, register
from distill.training.launch import PROCESSES, way_on

# Command -> the function of its module, and where in the folder its configuration is.
TASKS = {
    "run": ("train", "config.yaml"),
    "cache": ("encode", "making.yaml"),
    "synthesize": ("generate", "making.yaml"),
    "evaluate": ("generate", "evaluation/asked.yaml"),
}


def configuration(file: Path) -> DictConfig:
    """What the command has written, with the values that it keeps out of files.

    It has been checked as what was typed, by the process that wrote it a moment ago.
    """
    cfg = OmegaConf.load(yaml_of(file))
    secrets = json.loads(os.environ.pop(SECRETS, "{}"))
    register(secrets)
    for key, value in secrets.items():
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def work(folder: Path, command: str) -> int:
    """This process's part of the command; returns the exit code, or that of a mistake."""
    notes = folder / PROCESSES
    _apart(notes / f"{rank()}.log")
    progress.write_heartbeat(notes / f"{rank()}.beat")
    name, config = TASKS[command]
    try:
        with (
            signals.stop_on_signal(),
            console.record_output(),
            faults.hint_on_failure(lambda: way_on(folder, command)),
        ):
            task = getattr(importlib.import_module(f"distill.{command}"), name)
            return task(configuration(folder / config), folder)
    except signals.Stopped as stop:
        _note(notes, stopped=int(stop.number))
        return 128 + stop.number
    except Exception as error:
        said, bug = errors.sentence(error), not errors.is_mistake(error)
        if bug:
            said = f"process {rank()}: {type(error).__name__}: {said}"
        _note(notes, sentence=masked(said), bug=bug, lost=faults.is_peer_failure(error))
        traceback.print_exc(file=sys.__stderr__)
        if errors.wants_traceback():
            traceback.print_exc()
        return 1


def _note(notes: Path, **end: Any) -> None:
    write_atomic(notes / f"{rank()}.end", json.dumps({"at": time.time(), **end}).encode())


def _apart(log: Path) -> None:
    """Have what libraries write past Python, when another process dies say, go into a file.

    What Python writes goes where it went.
    """
    screen, file = os.dup(2), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 2)
    os.close(file)
    binary = os.fdopen(screen, "wb")
    how = {"errors": "backslashreplace", "line_buffering": True}
    sys.stderr = io.TextIOWrapper(binary, encoding=sys.stderr.encoding, **how)


if __name__ == "__main__":
    signals.end_with_parent()
    adopt()
    errors.escape_unprintable()
    sys.exit(work(Path(sys.argv[1]), sys.argv[2]))
