"""Train a tiny teacher from scratch, with its autoencoder, text encoder and reader: on scenes of
`shapes`, or on your captioned pictures. Give a killed command again, and it continues.

    python -m distill.pretrain out=pretrained
    python -m distill.pretrain out=mine data.path=photos data.size=64 text_length=40
    python -m distill.pretrain out=mine stages=[clip,vae] data.path=photos
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config import paths, validate
from distill.config.compose import check_counts, shipped
from distill.config.errors import command
from distill.data.shards import check_pictures
from distill.machine.faults import RERUN
from distill.machine.hardware import check_precision
from distill.storage.locks import check_free, one_writer
from distill.teachers.loading.locate import check_pipeline
from distill.terminal.progress import importing
from distill.worlds.shapes.pretraining.asked import (
    ORDER,
    check_data,
    chosen,
    max_empty_share,
    trains,
)


def pretrain(cfg: DictConfig) -> Path:
    """Train all chosen stages; returns the folder of the models."""
    check(cfg)
    with importing("torch"):
        from distill.worlds.shapes.pretraining.stages import run

    asked: Any = OmegaConf.to_container(paths.absolute(cfg), resolve=True)
    with one_writer(Path(cfg.out), "out", deep=True):
        models = run(asked, command=" ".join(["python -m distill.pretrain", *sys.argv[1:]]))
    stages = chosen(cfg.stages)
    if "edits" in stages:
        print(f"edit pairs: {Path(cfg.out) / 'edits'}")
    if stages != ["edits"]:
        print(f"models: {models}")
    return models


def check(cfg: DictConfig) -> None:
    """Raise ValueError or OSError for wrong settings, before anything slow is imported."""
    check_counts(
        cfg, {"seed": 0, "data.size": 1, "data.count": 1, "data.seed": 0, "text_length": 3}
    )
    check_precision(cfg.precision)
    check_data(cfg.data.path, cfg.data.size, cfg.data.count)
    for name in chosen(cfg.stages):
        if trains(cfg, name):
            budget = OmegaConf.to_container(cfg[name], resolve=True)
            validate.check_taken(budget, "distill.worlds.shapes.pretraining.fit.Fit", f"{name}.")
        taught_by = cfg.networks.get(name, {}).get("taught_by")
        if taught_by is not None and taught_by not in ORDER:
            check_pipeline(shipped(str(taught_by)), f"networks.{name}.taught_by")
    if cfg.data.path is not None:
        check_pictures(cfg.data.path, max_empty_share=max_empty_share(cfg.stages))
    if cfg.parts is not None:
        check_pipeline(shipped(str(cfg.parts)), "parts")
    check_free(Path(cfg.out), "out")


@command("pretrain", hint=RERUN)
def main(cfg: DictConfig) -> None:
    pretrain(cfg)


if __name__ == "__main__":
    main()
