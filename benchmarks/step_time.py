"""Time of one training step against the network passes that it cannot avoid.

    python benchmarks/step_time.py [unet] [any overrides of distill.run] [steps=30]

`unet` stands for a UNet of SD 1.5's layout with 37.5 M random weights. Without it and without
`teacher=` it is the default run, on `shapes`.

The passes of a method are those of its own `student_sample` (the student; the frozen network on the
fake), the backward pass through them to the student's weights, the frozen network on the real
sample, and the teacher's estimate for the distillation term. All else is overhead: captions, heads,
losses, optimisers, EMA, clipping, logging, Lightning's loop and the loader.

Passes and steps take turns under the real trainer, so that a busy or throttled machine slows both.
Each number is the median, with the 10th and 90th percentile. After a pass the student's gradients
are cleared, as in a step. On a GPU the peak of the allocator is printed too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import composed, fit, unet_overrides
from torch.utils.flop_counter import FlopCounterMode

from distill.config import build
from distill.machine.hardware import autocast, hardware

WARM_UP = 3  # steps that are not counted


class Turns(L.Callback):
    """Times a step, then each of the passes, and so on."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.passes: dict[str, Callable[[], None]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.batch, self.operations = 0, 0  # pictures of a step, operations of its passes
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, method: Any, batch: Any, *_: Any) -> None:
        if not self.passes:  # only now is everything on its device
            prepared = method.loop.prepare_batch(method, batch)
            self.batch = len(prepared)
            self.passes = passes_of(method, prepared, self.precision)
            # Eager: a counter sees nothing within a compiled block.
            with (
                torch.compiler.set_stance("force_eager"),
                FlopCounterMode(display=False) as counter,
            ):
                for run in self.passes.values():
                    run()
            self.operations = counter.get_total_flops()
            self.seconds = {name: [] for name in ("step", *self.passes)}
            self._began = now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds["step"].append(now() - self._began)
        for name, run in self.passes.items():
            began = now()
            run()
            self.seconds[name].append(now() - began)
        self._began = now()

    def counted(self, name: str) -> list[float]:
        return self.seconds[name][WARM_UP:]


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def passes_of(method: Any, batch: Any, precision: str) -> dict[str, Callable[[], None]]:
    """The passes of the method on this batch, each with its own draws."""
    draws = method.draw(batch, method.loop.streams(method))

    def sample_and_backward() -> None:
        with autocast(precision, method.device.type):
            sample = method.student_sample(batch, draws)
            outputs = [sample.x0_hat, *getattr(sample, "fake_features", ())]
            loss = sum(x.float().square().mean() for x in outputs)
        loss.backward()
        method.student.zero_grad(set_to_none=True)

    @torch.no_grad()
    def estimate() -> None:
        with autocast(precision, method.device.type):
            method.distill(method.teacher, batch.x0, batch.cond, draws.distill)

    @torch.no_grad()
    def real_features() -> None:
        t = torch.full((len(batch),), 0.5, device=batch.x0.device)
        noise, patches = torch.randn_like(batch.x0), torch.Generator(batch.x0.device)
        with autocast(precision, method.device.type):
            method.critic_features(batch.x0, t, noise, batch, patches)

    found = {"networks, forward and backward": sample_and_backward}
    with torch.no_grad(), autocast(precision, method.device.type):
        sample = method.student_sample(batch, draws)
    if getattr(sample, "real_features", batch) is None:  # then each update makes its own
        found["frozen network on the real sample"] = real_features
    if getattr(draws, "distill", None) is not None:
        found["teacher's estimate for the distillation term"] = estimate
    return found


@dataclass(frozen=True)
class Measured:
    """What `measure` found: seconds of each turn, and the peak of a GPU's allocator in bytes."""

    turns: Turns
    peak: int | None

    @property
    def step(self) -> float:
        return statistics.median(self.turns.counted("step"))

    @property
    def unavoidable(self) -> float:
        return sum(statistics.median(self.turns.counted(name)) for name in self.turns.passes)


def measure(words: list[str], steps: int) -> Measured:
    """Train by this configuration, and time its steps and passes in turns."""
    cfg = composed(words)
    torch.manual_seed(cfg.seed)
    source, method = build.build_training(cfg)
    turns = Turns(cfg.trainer.precision)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    fit(cfg, method, source, steps + WARM_UP, turns)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return Measured(turns, peak)


def shown(seconds: list[float]) -> str:
    tenths = statistics.quantiles(seconds, n=10)
    median, low, high = (1000 * x for x in (statistics.median(seconds), tenths[0], tenths[-1]))
    return f"{median:8.1f} ms ({low:.1f} to {high:.1f})"


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "unet" and not word.startswith("steps=")]
    steps = next((int(w.partition("=")[2]) for w in sys.argv[1:] if w.startswith("steps=")), 30)
    with tempfile.TemporaryDirectory() as folder:
        given = unet_overrides(Path(folder)) if "unet" in sys.argv else []
        found = measure([*given, *words], steps)
    print(f"{hardware()}; {torch.get_num_threads()} threads, {found.turns.precision}")
    print(f"torch {torch.__version__}, batch {found.turns.batch}, {steps} steps")
    for name in found.turns.passes:
        print(f"{shown(found.turns.counted(name))}  {name}")
    ratio = found.step / found.unavoidable
    print(f"{shown(found.turns.counted('step'))}  training step: {ratio:.2f} of its passes")
    if found.peak is not None:
        print(f"{found.peak / 2**20:8.0f} MiB  peak, passes included")


if __name__ == "__main__":
    main()
