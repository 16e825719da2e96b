"""`python -m distill.pretrain out=pretrained`: tiny teachers, their parts and a judge, trained from nothing.

On scenes of `shapes`, or with `data.path=...` on any captioned pictures. Killed and started again, it goes on.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import hydra

from distill._conf import CONF_DIR
from distill.errors import said_plainly

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


@hydra.main(config_path=CONF_DIR, config_name="pretrain", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with said_plainly():
        pretrain(cfg)


if __name__ == "__main__":
    main()
