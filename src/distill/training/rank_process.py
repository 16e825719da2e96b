"""`python -m distill.training.rank_process <folder> <command>`: one rank of
`distill.training.launch`.

It does not print why it ended. It writes a note, and the launcher prints the first note of all
ranks.
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

# Command -> the function in its module, and the file of its configuration in the folder.
TASKS = {
    "run": ("train", "config.yaml"),
    "cache": ("encode", "making.yaml"),
    "synthesize": ("generate", "making.yaml"),
    "evaluate": ("generate", "evaluation/asked.yaml"),
}


def configuration(file: Path) -> DictConfig:
    """The configuration that the command wrote, with the secrets that files omit.

    The process that wrote it a moment ago has validated it.
    """
    cfg = OmegaConf.load(yaml_of(file))
    secrets = json.loads(os.environ.pop(SECRETS, "{}"))
    register(secrets)
    for key, value in secrets.items():
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def work(folder: Path, command: str) -> int:
    """Run this rank's part of the command; returns its exit code."""
    notes = folder / PROCESSES
    _redirect_libraries(notes / f"{rank()}.log")
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
        _write_note(notes, stopped=int(stop.number))
        return 128 + stop.number
    except Exception as error:
        said, bug = errors.sentence(error), not errors.is_mistake(error)
        if bug:
            said = f"process {rank()}: {type(error).__name__}: {said}"
        _write_note(notes, sentence=masked(said), bug=bug, lost=faults.is_peer_failure(error))
        traceback.print_exc(file=sys.__stderr__)
        if errors.wants_traceback():
            traceback.print_exc()
        return 1


def _write_note(notes: Path, **end: Any) -> None:
    write_atomic(notes / f"{rank()}.end", json.dumps({"at": time.time(), **end}).encode())


def _redirect_libraries(log: Path) -> None:
    """Write what libraries print outside Python into a file, for example when another rank dies.

    Output of Python still goes to the terminal.
    """
    screen, file = os.dup(2), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 2)
    os.close(file)
    binary = os.fdopen(screen, "wb")
    options = {"errors": "backslashreplace", "line_buffering": True}
    sys.stderr = io.TextIOWrapper(binary, encoding=sys.stderr.encoding, **options)


if __name__ == "__main__":
    signals.end_with_parent()
    adopt()
    errors.escape_unprintable()
    sys.exit(work(Path(sys.argv[1]), sys.argv[2]))
