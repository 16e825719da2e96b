"""Does the discriminator of NitroFusion overfit without refresh? Logits on real samples that it
learns from and others.

    python experiments/nitrofusion_ablations/overfitting.py out.csv [any overrides of distill.run]
    python experiments/nitrofusion_ablations/overfitting.py out.csv trainer.max_steps=300 \
        data.path=runs/studies/nitrofusion_ablations/prepared/few_step # as the study's few_pictures

Trains as `distill.run method=nitrofusion method.real=null data.limit=512` does, on the first 512 of
the data, by default of the shipped latents; with `method.real` each step would have new ones. Every
EVERY iterations all heads of the pool, not only those drawn, judge 256 of these, the last 256 of
the data, which are new to them, and the student's from the noise of both, at each t*; a row says
the mean logits. If overfitted, they like what they have seen more than its like: the gap `seen -
held_out` grows.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir

from distill.config import build
from distill.config.compose import shipped
from distill.config.location import CONF_DIR
from distill.data.datasets import LatentShards
from distill.machine.hardware import autocast

TRAINED, ASKED, EVERY = 512, 256, 50


class Ask(L.Callback):
    def __init__(
        self, path: str, held_out: dict[str, Any], seen: dict[str, Any], *, precision: str
    ):
        self.precision = precision
        self.path, self.sets = path, {"seen": seen, "held_out": held_out}
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, method: Any, *_: Any) -> None:
        iteration = method.loop.iteration
        if iteration % EVERY == 0:
            self.rows.append({"iteration": iteration, "step": method.step, **self.ask(method)})
            with open(self.path, "w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, list(self.rows[0]))
                table.writeheader()
                table.writerows(self.rows)

    @torch.no_grad()
    def ask(self, method: Any) -> dict[str, float]:
        means: dict[str, list[float]] = {"seen": [], "held_out": [], "fake": []}
        for level in range(len(method.heads.levels)):
            for name, samples in self.sets.items():
                batch = method.loop.prepare_batch(method, samples)
                means[name].append(self.judge(method, level, batch.x0, batch))
            with autocast(self.precision, batch.x0.device.type):
                x0_hat = method.student.x0(
                    batch.noise, torch.ones(len(batch), device=batch.x0.device), batch.cond
                )
            means["fake"].append(self.judge(method, level, x0_hat, batch))
        found = {name: sum(values) / len(values) for name, values in means.items()}
        return {
            **found,
            "seen - held_out": found["seen"] - found["held_out"],
            "seen - fake": found["seen"] - found["fake"],
        }

    def judge(self, method: Any, level: int, x0: torch.Tensor, batch: Any) -> float:
        """The mean logit of every head of this level, under one noise and one patch for all that
        are asked.
        """
        generator = torch.Generator(x0.device).manual_seed(level)
        t = torch.full((len(x0),), method.heads.levels[level], device=x0.device)
        x_t = method.teacher.process.diffuse(
            x0, torch.randn(x0.shape, generator=generator, device=x0.device), t
        )
        with autocast(self.precision, x0.device.type):
            maps = method.feature_network(x_t, t, batch.cond, generator)
            of_map = [list(method.heads.heads_of[level, name]) for name in method.heads.channels]
            rounds = range(max(map(len, of_map)))
            logits = [
                method.heads.logits_of([heads[k % len(heads)] for heads in of_map], maps)
                for k in rounds
            ]
        return float(
            torch.cat([part.float().flatten() for parts in logits for part in parts]).mean()
        )


def batch_of(data: LatentShards, rows: range) -> dict[str, Any]:
    items = [data[i] for i in rows]
    stacked = {key: torch.stack([item[key] for item in items]) for key in ("x0", "noise")}
    return {**stacked, "caption": [item["caption"] for item in items]}


def main() -> None:
    path, *overrides = sys.argv[1:]
    folder = tempfile.mkdtemp()
    with initialize_config_dir(config_dir=CONF_DIR, version_base="1.3"):
        keys = [
            "method=nitrofusion",
            f"data.limit={TRAINED}",
            "method.real=null",
            "~metrics",
            "~callbacks.progress",
            *overrides,
        ]
        cfg = compose("config", overrides=keys)
    source, method = build.build_training(cfg)
    data = LatentShards(shipped(cfg.data.path), seeded=True)
    seen, held_out = range(ASKED), range(len(data) - ASKED, len(data))
    trainer = build.trainer(cfg, Path(folder), {})
    sets = batch_of(data, held_out), batch_of(data, seen)
    trainer.callbacks.append(Ask(path, *sets, precision=cfg.trainer.precision))
    trainer.fit(method, source.loader(seed=cfg.seed))


if __name__ == "__main__":
    main()
