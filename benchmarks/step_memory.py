"""Memory of a training step: what is held between steps, and the peak within one.

    python benchmarks/step_memory.py [any overrides of distill.run]

Without `teacher=` it trains a UNet of SD 1.5's layout with 37.5 M random weights on latents of
4x16x16, 8 a step, by LADD without the distillation term. On a CPU, tensors are counted as the
allocator reports them to torch's profiler, and the process by its peak of resident memory, from
before anything was built. On a GPU the peak is that of torch's allocator.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import resident
import torch
from common import composed, fit, unet_overrides
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.config import build
from distill.machine.hardware import hardware

MIB = 2**20
STEPS = 4


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())


class Peak(L.Callback):
    """The bytes of tensors between two steps, and the most that the last step adds to them."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.added = 0
        self._profile: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, method: Any, *_: Any) -> None:
        if method.step == STEPS - 1:
            self.held = held(trainer, method)
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        self.added = max(0, *itertools.accumulate(e.nbytes() for e in changes))


def held(trainer: L.Trainer, method: Any) -> dict[str, int]:
    trained = [*method.student.parameters(), *method.heads.parameters()]
    moments = [v for o in trainer.optimizers for s in o.state.values() for v in s.values()]
    return {
        "teacher": size(method.teacher.parameters()),
        "student": size(method.student.parameters()),
        "heads": size(method.heads.parameters()),
        "moments": size(v for v in moments if isinstance(v, Tensor)),
        "average": size(method.ema.state_dict().values()),
        "gradients": size(p.grad for p in trained if p.grad is not None),
    }


def main() -> None:
    if not torch.cuda.is_available():
        resident.peak()  # a system that does not tell it ends here, before any work
    with tempfile.TemporaryDirectory() as folder:
        own = any(word.startswith("teacher=") for word in sys.argv[1:])
        given = [] if own else unet_overrides(Path(folder))
        cfg, peak = composed([*given, *sys.argv[1:]]), Peak()
        before = psutil.Process().memory_info().rss
        source, method = build.build_training(cfg)
        trainable = sum(p.numel() for p in method.student.parameters())
        fit(cfg, method, source, STEPS, *([] if torch.cuda.is_available() else [peak]))
    print(f"{hardware()}; {torch.get_num_threads()} threads, {cfg.trainer.precision}")
    print(f"torch {torch.__version__}, {trainable / 1e6:.1f} M parameters trained by the student")
    if torch.cuda.is_available():
        print(f"{torch.cuda.max_memory_allocated() / MIB:8.0f} MiB  peak of the allocator")
        return
    for name, count in peak.held.items():
        print(f"{count / MIB:8.0f} MiB  {name}")
    print(f"{peak.added / MIB:8.0f} MiB  at most within a step, on top")
    print(f"{(sum(peak.held.values()) + peak.added) / MIB:8.0f} MiB  tensors at the peak")
    added = resident.peak() - before
    print(f"{added / MIB:8.0f} MiB  peak of the process, over what it had before")


if __name__ == "__main__":
    main()
