"""What a large pool of heads costs, against one that holds no more heads than are drawn.

    python benchmarks/pool.py [any overrides of distill.run]

The whole iteration of NitroFusion as the loop makes it (student, both players, clipping, AdamW,
refresh), timed for pools of several sizes in turn, so that a machine whose speed drifts is alike to
all. Median of REPEATS. Megabytes are those of the heads, and of their optimiser after so many
iterations.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from common import composed

from distill.config import build

SIZES, REPEATS = (1, 480, 1920), 30  # 1: as many as there are places, so that nothing is chosen


class Player:
    """One module with its optimiser."""

    def __init__(self, module: torch.nn.Module, optimizer: Any):
        self.module, self.optimizer = module, optimizer

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
        self.optimizer.step()


def players(method: Any) -> tuple[Player, Player]:
    make = method.loop.factories
    student = Player(method.student, make.student(method.student.parameters()))
    return student, Player(method.heads, make.discriminator(method.heads.parameters()))


def iteration(
    method: Any, batch: Any, student: Player, heads: Player, cast: torch.autocast
) -> float:
    """Seconds that the heads' own work took, of a whole iteration."""
    streams = method.loop.streams(method)
    with cast:
        draws = method.draw(batch, streams)
        sample = method.student_sample(batch, draws)
    began = time.perf_counter()
    method.heads.requires_grad_(True)
    heads.optimizer.zero_grad(set_to_none=True)
    with cast:
        loss = sum(method.discriminator_loss(batch, draws, sample).terms.values())
    heads.update(loss)
    method.heads.requires_grad_(False)
    for parameter in method.heads.refresh(streams.common("refresh")):
        heads.optimizer.state.pop(parameter, None)
    own = time.perf_counter() - began
    student.optimizer.zero_grad(set_to_none=True)
    with cast:
        loss = sum(method.student_loss(batch, draws, sample).terms.values())
    student.update(loss)
    method.loop.iteration += 1
    return own


def megabytes(heads: Player) -> tuple[float, float]:
    moments = sum(v.numel() * 4 for state in heads.optimizer.state.values() for v in state.values())
    return sum(p.numel() * 4 for p in heads.module.parameters()) / 1e6, moments / 1e6


def main() -> None:
    made = []
    for size in SIZES:
        cfg = composed(
            [
                "method=nitrofusion",
                "method.warm_start=0",
                *sys.argv[1:],
                f"discriminator.heads.size={size}",
            ]
        )
        source, method = build.build_training(cfg)
        batch = method.loop.prepare_batch(method, next(iter(source.loader(seed=cfg.seed))))
        made.append((method, batch, *players(method)))
    cast = torch.autocast(
        batch.x0.device.type, torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"
    )
    whole: list[list[float]] = [[] for _ in SIZES]
    own: list[list[float]] = [[] for _ in SIZES]
    for repeat in range(REPEATS + 3):
        for i, parts in enumerate(made):
            began = time.perf_counter()
            alone = iteration(*parts, cast)
            if repeat >= 3:
                whole[i].append(time.perf_counter() - began)
                own[i].append(alone)
    print(f"{torch.get_num_threads()} threads, {len(batch)} pictures, {cfg.trainer.precision}")
    print("heads in all   iteration, ms   its discriminator phase, ms   heads, MB   optimiser, MB")
    for (method, _, _, heads), a, b in zip(made, whole, own, strict=True):
        row = (
            len(method.heads.heads),
            1e3 * statistics.median(a),
            1e3 * statistics.median(b),
            *megabytes(heads),
        )
        print("{:>12}   {:>13.1f}   {:>27.1f}   {:>9.1f}   {:>13.1f}".format(*row))


if __name__ == "__main__":
    main()
