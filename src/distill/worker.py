"""`python -m distill.worker <run folder>`: one of several processes of a run, started by `distill.launch`."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from distill.errors import said_plainly
from distill.run import train

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with said_plainly():
        sys.exit(train(OmegaConf.load(folder / "config.yaml"), folder))
