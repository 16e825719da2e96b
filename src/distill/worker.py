"""`python -m distill.worker <folder> <command>`: one of several processes of a command, started by `distill.launch`."""

import importlib
import sys
from pathlib import Path

from omegaconf import OmegaConf

from distill.bounded import yaml_of
from distill.console import recorded
from distill.errors import print_any_letter, said_plainly

# Command -> the function of its module, and where in the folder its configuration is.
TASKS = {
    "run": ("train", "config.yaml"),
    "cache": ("encode", "making.yaml"),
    "synthesize": ("draw", "making.yaml"),
    "evaluate": ("draw", "evaluation/asked.yaml"),
}

if __name__ == "__main__":
    folder, command = Path(sys.argv[1]), sys.argv[2]
    print_any_letter()
    with recorded(), said_plainly():
        name, config = TASKS[command]
        task = getattr(importlib.import_module(f"distill.{command}"), name)
        sys.exit(task(OmegaConf.load(yaml_of(folder / config)), folder))
