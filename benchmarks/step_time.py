"""Time of one training step against the network passes that it cannot avoid, in one process.

    python benchmarks/step_time.py [any overrides of distill.run]

Irreducible for LADD, per step: student forward and backward; frozen teacher on the fake, forward
and backward to its input; frozen teacher on the real, forward; where the distillation term counts,
the teacher's estimate, guided or not. All else (captions, heads, optimisers, noise, averaging,
logs) is overhead.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import lightning as L
import torch
from common import composed, fit

from distill.config import build
from distill.machine.hardware import autocast

REPEATS = 12


def seconds(run: Callable[[], None]) -> float:
    """Median over repeats, after two warm-ups."""
    times = []
    for _ in range(REPEATS + 2):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def main() -> None:
    cfg = composed(sys.argv[1:])
    torch.manual_seed(cfg.seed)
    source, method = build.build_training(cfg)
    teacher = method.teacher
    batch = method.loop.prepare_batch(method, next(iter(source.loader(seed=cfg.seed))))
    n, t = len(batch), torch.full((len(batch),), 0.5)
    noise = torch.randn_like(batch.x0)
    taps = list(teacher.blocks)

    def cast() -> AbstractContextManager[None]:
        """As the trainer does: autocast around the forward passes."""
        return autocast(cfg.trainer.precision, noise.device.type)

    def student_pass() -> None:
        with cast():
            loss = method.student.x0(noise, t, batch.cond).square().mean()
        loss.backward()

    def fake_pass() -> None:
        x = noise.clone().requires_grad_(True)
        with cast():
            loss = sum(m.square().mean() for m in teacher.features(x, t, batch.cond, taps))
        loss.backward()

    @torch.no_grad()
    def real_pass() -> None:
        with cast():
            teacher.features(noise, t, batch.cond, taps)

    @torch.no_grad()
    def estimate_pass() -> None:
        generator = torch.Generator(noise.device).manual_seed(0)
        with cast():
            method.distill(teacher, noise, batch.cond, method.distill.draw(noise, generator))

    parts = {
        "student, forward and backward": seconds(student_pass),
        "teacher on the fake, forward and backward to the input": seconds(fake_pass),
        "teacher on the real, forward": seconds(real_pass),
    }
    if method.distill_weight:
        parts["teacher's estimate for the distillation, forward"] = seconds(estimate_pass)
    whole = step_time(cfg, method, source)
    unavoidable = sum(parts.values())
    print(
        f"batch {n}, {torch.get_num_threads()} threads, {cfg.trainer.precision}, torch"
        f" {torch.__version__}"
    )
    for name, value in parts.items():
        print(f"{1000 * value:8.1f} ms  {name}")
    print(f"{1000 * unavoidable:8.1f} ms  sum of the passes that cannot be avoided")
    print(
        f"{1000 * whole:8.1f} ms  training step, all told: {100 * (whole / unavoidable - 1):.1f} %"
        " over that sum"
    )


def step_time(cfg: object, method: object, source: object) -> float:
    """Median seconds between the ends of consecutive steps under the real trainer."""

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: object) -> None:
            self.ends.append(time.perf_counter())

    clock = Clock()
    fit(cfg, method, source, REPEATS + 3, clock)
    gaps = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    return statistics.median(gaps[2:])


if __name__ == "__main__":
    main()
