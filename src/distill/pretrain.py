"""`python -m distill.pretrain out=pretrained`: tiny teachers, their parts and a judge, trained from nothing.

On scenes of `shapes`, or with `data.path=...` on any captioned pictures. Killed and started again, it goes on.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.errors import command
from distill.progress import importing


def pretrain(cfg: DictConfig) -> Path:
    """All stages asked for; returns the folder of the models."""
    with importing("torch"):
        from distill.pretraining.stages import run

    asked: Any = OmegaConf.to_container(cfg, resolve=True)
    models = run(asked, command=" ".join(["python -m distill.pretrain", *sys.argv[1:]]))
    print(f"models: {models}")
    return models


@command("pretrain")
def main(cfg: DictConfig) -> None:
    pretrain(cfg)


if __name__ == "__main__":
    main()
