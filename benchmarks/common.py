"""What the benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from hydra import compose, initialize_config_dir

from distill.config.build import settle_precision
from distill.config.location import CONF_DIR


def composed(overrides: Sequence[str]) -> Any:
    """The configuration of a run, without a head start: every step is a whole one."""
    with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, "loop.head_start=0"])
    settle_precision(cfg)
    return cfg


def fit(cfg: Any, method: Any, source: Any, steps: int, *callbacks: L.Callback) -> L.Trainer:
    """Train on one device and leave nothing behind."""
    bare = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    given = {
        "accelerator": cfg.trainer.accelerator,
        "precision": cfg.trainer.precision,
        "callbacks": list(callbacks),
    }
    trainer = L.Trainer(max_steps=steps, max_epochs=-1, devices=1, **bare, **given)
    trainer.fit(method, source.loader(seed=cfg.seed))
    return trainer
