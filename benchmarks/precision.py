"""What bfloat16 and float32 cost on this machine: products, convolutions, and a step of the default
run.

    python benchmarks/precision.py
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/precision.py

The second command imitates a CPU without bfloat16; see benchmarks/first_mile.py for what that
changes and what it does not. Products and convolutions are on one thread, steps on all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import composed
from step_time import step_time

from distill.config import build
from distill.machine.hardware import hardware

SIDE = 512  # of the matrices
CHANNELS, PIXELS, BATCH = 64, 32, 8  # of the convolution
DTYPES = (torch.float32, torch.bfloat16)


def best(run: Callable[[], object], tries: int = 4) -> float:
    """Seconds of the fastest of several calls, after one that prepares the kernels."""
    run()
    found = []
    for _ in range(tries):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def product(dtype: torch.dtype) -> float:
    """GFLOP/s of a product of matrices."""
    x = torch.randn(SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / best(lambda: x @ x) / 1e9


def convolution(dtype: torch.dtype) -> float:
    """GFLOP/s of a 3x3 convolution."""
    x = torch.randn(BATCH, CHANNELS, PIXELS, PIXELS, dtype=dtype)
    kernel = torch.randn(CHANNELS, CHANNELS, 3, 3, dtype=dtype)
    operations = 2 * 9 * CHANNELS**2 * PIXELS**2 * BATCH
    return operations / best(lambda: F.conv2d(x, kernel, padding=1)) / 1e9


def step(precision: str) -> float:
    """Seconds of a step of the default run."""
    cfg = composed([f"trainer.precision={precision}"])
    source, method = build.build_training(cfg)
    return step_time(cfg, method, source)


def main() -> None:
    print(hardware())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, measure in {"product": product, "3x3 convolution": convolution}.items():
        values = [measure(dtype) for dtype in DTYPES]
        print(f"{name}: float32 {values[0]:.1f} GFLOP/s, bfloat16 {values[1]:.1f}", flush=True)
    torch.set_num_threads(threads)
    for precision in ("32-true", "bf16-mixed"):
        print(f"step of the default run, {precision}: {step(precision):.3f} s", flush=True)


if __name__ == "__main__":
    main()
