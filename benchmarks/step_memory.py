"""Memory of a training step: what is held between steps, the peak within one, and what
`python -m distill.doctor` predicts of both.

    python benchmarks/step_memory.py [any overrides of distill.run]
    python benchmarks/step_memory.py table [words of the rows to run]

Without `teacher=` it trains a UNet of SD 1.5's layout with 37.5 M random weights on latents of
4x16x16, 8 a step, by LADD without the distillation term. On a CPU, tensors are counted as the
allocator reports them to torch's profiler, and the process by its peak of resident memory, from
before anything was built. On a GPU the peak is that of torch's allocator. Optimisers have their
states from the first step on, as after many.

`table` does so for the methods and options that matter, each in a process of its own.
"""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import resident
import torch
from common import States, composed, fit, unet_overrides
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill.config import build, step_memory
from distill.machine.hardware import hardware

MIB = 2**20
STEPS = 3


class Peak(L.Callback):
    """The bytes of tensors between two steps, and the most that the last step adds to them.

    Args:
        data: whose tensors do not count.
    """

    def __init__(self, data: Any = None) -> None:
        self.held = self.added = 0
        self._data, self._profile = data, None

    def on_train_batch_start(self, trainer: L.Trainer, method: Any, *_: Any) -> None:
        if method.step == STEPS - 1:
            self.held = alive() - size(tensors_in(vars(self._data) if self._data else {}))
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        if self._profile is None:
            return
        self._profile.__exit__(None, None, None)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        self.added = max(0, *itertools.accumulate(e.nbytes() for e in changes))


def alive() -> int:
    """Bytes of all tensors of this process that Python knows."""
    gc.collect()
    return size(x for x in gc.get_objects() if isinstance(x, Tensor))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = (x.untyped_storage() for x in tensors if x.layout is torch.strided)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def tensors_in(values: dict[str, Any]) -> Iterable[Tensor]:
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(value)


# -- the table -------------------------------------------------------------------------------------

SHAPES = ["teacher=shapes", "data.batch_size=4", "data.num_workers=0", "~metrics"]
UNET = ["data.batch_size=2"]
ADD = [
    *("teacher=shapes_unet", "data=renders", "data.batch_size=4", "~metrics"),
]
OPTIONS = {
    "": [],
    "checkpointing": ["student.checkpointing=true"],
    "LoRA": ["student=lora"],
    "LoRA, checkpointing": ["student=lora", "student.checkpointing=true"],
    "LoRA, int8": ["student=lora", "teacher.quantize=int8"],
    "LoRA, nf4, adamw8bit": ["student=lora", "teacher.quantize=nf4", "optimizer=adamw8bit"],
}
PRECISIONS = ("32-true", "bf16-mixed")
RUNS = {
    "ladd, shapes": [*SHAPES, "method=ladd"],
    "nitrofusion, shapes": [*SHAPES, "method=nitrofusion"],
    "dmd2, shapes": [*SHAPES, "method=dmd2"],
    "add, shapes": [*SHAPES, "method=add", "data=renders", "data.size=64"],
    "ladd, UNet 37.5 M": [*UNET, "method=ladd"],
    "nitrofusion, UNet 37.5 M": [*UNET, "method=nitrofusion"],
    "dmd2, UNet 37.5 M": [*UNET, "method=dmd2"],
}


def rows() -> Iterable[tuple[str, list[str]]]:
    for run, words in RUNS.items():
        for option, more in OPTIONS.items():
            for precision in PRECISIONS:
                named = ", ".join(filter(None, (run, option, precision)))
                yield named, [*words, *more, f"trainer.precision={precision}"]


def table(wanted: list[str]) -> None:
    print("| run | held, counted | measured | peak, counted | measured | quotient |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, words in rows():
        if wanted and name not in wanted:
            continue
        command = [sys.executable, __file__, *words]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        found = [line.split() for line in done.stdout.splitlines() if "MiB" in line]
        if done.returncode or len(found) < 6:
            print(
                f"| {name} | failed: {(done.stderr.strip().splitlines() or [''])[-1]} |", flush=True
            )
            continue
        held, _, peak, counted_held, counted = (float(words[0]) for words in found[:5])
        numbers = f"{counted_held:.0f} | {held:.0f} | {counted:.0f} | {peak:.0f}"
        print(f"| {name} | {numbers} | {counted / peak:.3f} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        table(sys.argv[2:])
        return
    if not torch.cuda.is_available():
        resident.peak()  # a system that does not tell it ends here, before any work
    with tempfile.TemporaryDirectory() as folder:
        own = any(word.startswith("teacher=") for word in sys.argv[1:])
        given = [] if own else unet_overrides(Path(folder))
        cfg = composed([*given, *sys.argv[1:]])
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        counted = step_memory.of_step(cfg, kind)
        gc.collect()
        before = psutil.Process().memory_info().rss
        source, method = build.build_training(cfg)
        peak = Peak(source.dataset)
        trainable = sum(p.numel() for p in method.student.parameters())
        fit(cfg, method, source, STEPS, States(), *([] if torch.cuda.is_available() else [peak]))
    print(f"{hardware()}; {torch.get_num_threads()} threads, {cfg.trainer.precision}")
    print(f"torch {torch.__version__}, {trainable / 1e6:.1f} M parameters trained by the student")
    if torch.cuda.is_available():
        print(f"{torch.cuda.max_memory_allocated() / MIB:8.0f} MiB  peak of the allocator")
    else:
        print(f"{peak.held / MIB:8.0f} MiB  tensors between steps")
        print(f"{peak.added / MIB:8.0f} MiB  at most within a step, on top")
        print(f"{(peak.held + peak.added) / MIB:8.0f} MiB  tensors at the peak")
    print(f"{sum(counted.held.values()) / MIB:8.0f} MiB  between steps, as counted before")
    print(f"{counted.peak / MIB:8.0f} MiB  at the peak, as counted before")
    for name, count in counted.held.items():
        if count:
            print(f"{count / MIB:12.0f} MiB  {name}")
    if not torch.cuda.is_available():
        added = resident.peak() - before
        print(f"{added / MIB:8.0f} MiB  peak of the process, over what it had before")


if __name__ == "__main__":
    main()
