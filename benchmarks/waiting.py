"""Where a training on a GPU waits for it, by place in the code.

    python benchmarks/waiting.py method=ladd                  # on shapes; any words of distill.run
    python benchmarks/waiting.py method=nitrofusion teacher=shapes_unet trainer.precision=bf16-mixed

CUDA itself reports every call that waits for queued work (`set_sync_debug_mode`). Prints how often
each place waited in each of the steps; places that wait now and then (the start, the end, logged
rows) come last. tests/test_waiting.py counts without a GPU what Python reads.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import traceback
import warnings
from collections import Counter

import torch

STEPS = 40
FEW = [
    f"trainer.max_steps={STEPS}",
    "trainer.accelerator=gpu",
    "trainer.log_every_n_steps=1000",
    "+callbacks.health.every=1000",
    "callbacks.samples.every=1000",
    "callbacks.checkpoint.every=1000",
    "~metrics",
]


def count(words: list[str]) -> Counter[str]:
    """Waits of a training by place: the innermost lines of distill and of what it called."""
    found: Counter[str] = Counter()

    def note(message: object, *_: object, **__: object) -> None:
        if "synchronizing" not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "warnings.py" not in f.filename]
        own = [f for f in frames if "/distill/" in f.filename]
        lines = [f"{f.filename}:{f.lineno} {f.name}" for f in (own[-1:] + frames[-1:])]
        found[" <- ".join(dict.fromkeys(lines))] += 1

    arguments, before = sys.argv, torch.cuda.get_sync_debug_mode()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        try:
            sys.argv = ["distill.run", *FEW, *words, f"run_dir={folder}/run"]
            torch.cuda.set_sync_debug_mode("warn")
            importlib.import_module("distill.run").main()
        finally:
            sys.argv = arguments
            torch.cuda.set_sync_debug_mode(before)
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("waiting.py: needs an NVIDIA GPU; without one run pytest tests/test_waiting.py")
    found = count(sys.argv[1:])
    often = {place: n for place, n in found.items() if n >= STEPS / 2}
    print(f"{sum(often.values()) / STEPS:.1f} waits in a step")
    for place, n in Counter(often).most_common():
        print(f"{n / STEPS:6.2f}  {place}")
    print(f"{sum(found.values()) - sum(often.values())} waits now and then, in {STEPS} steps")
    for place, n in (found - Counter(often)).most_common(20):
        print(f"{n:6d}  {place}")


if __name__ == "__main__":
    main()
