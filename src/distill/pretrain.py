"""`python -m distill.pretrain out=pretrained`: tiny teachers, their parts and a judge, trained from nothing.

On scenes of `shapes`, or with `data.path=...` on any captioned pictures. Killed and started again, it goes on.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from distill.errors import command

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig


def pretrain(cfg: DictConfig) -> Path:
    """All stages asked for; returns the folder of the models."""
    from omegaconf import OmegaConf

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
