"""`python -m distill.worker <folder> <command>`: one of several processes of a command, started by `distill.launch`."""

import importlib
import json
import os
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distill.bounded import yaml_of
from distill.console import recorded
from distill.errors import print_any_letter, said_plainly
from distill.locks import adopt
from distill.secret import SECRETS, note

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


if __name__ == "__main__":
    folder, command = Path(sys.argv[1]), sys.argv[2]
    print_any_letter()
    adopt()
    with recorded(), said_plainly():
        name, config = TASKS[command]
        task = getattr(importlib.import_module(f"distill.{command}"), name)
        sys.exit(task(configuration(folder / config), folder))
