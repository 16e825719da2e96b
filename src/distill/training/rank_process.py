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
from distill.storage.aside import put
from distill.storage.bounded import yaml_of
from distill.storage.locks import adopt
from distill.terminal import console, progress
from distill.terminal.secret import SECRETS, masked, note
from distill.training.launch import PROCESSES, way_on

# Command -> the function of its module, and where in the folder its configuration is.
TASKS = {
    "run": ("train", "config.yaml"),
    "cache": ("encode", "making.yaml"),
    "synthesize": ("draw", "making.yaml"),
    "evaluate": ("draw", "evaluation/asked.yaml"),
}


def configuration(file: Path) -> DictConfig:
    """What the command has written, with the values that it keeps out of files.

    It has been checked as what was typed, by the process that wrote it a moment ago.
    """
    cfg = OmegaConf.load(yaml_of(file))
    secrets = json.loads(os.environ.pop(SECRETS, "{}"))
    note(secrets)
    for key, value in secrets.items():
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def work(folder: Path, command: str) -> int:
    """This process's part of the command; returns the exit code, or that of a mistake."""
    notes = folder / PROCESSES
    _apart(notes / f"{rank()}.log")
    progress.beat_into(notes / f"{rank()}.beat")
    name, config = TASKS[command]
    try:
        with signals.heard(), console.recorded(), faults.goes_on(lambda: way_on(folder, command)):
            task = getattr(importlib.import_module(f"distill.{command}"), name)
            return task(configuration(folder / config), folder)
    except signals.Stopped as stop:
        _note(notes, stopped=int(stop.number))
        return 128 + stop.number
    except Exception as error:
        said, bug = errors.sentence(error), not errors.is_mistake(error)
        if bug:
            said = f"process {rank()}: {type(error).__name__}: {said}"
        _note(notes, sentence=masked(said), bug=bug, lost=faults.lost(error))
        traceback.print_exc(file=sys.__stderr__)
        if errors.all_asked_for():
            traceback.print_exc()
        return 1


def _note(notes: Path, **end: Any) -> None:
    put(notes / f"{rank()}.end", json.dumps({"at": time.time(), **end}).encode())


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
    errors.print_any_letter()
    sys.exit(work(Path(sys.argv[1]), sys.argv[2]))
