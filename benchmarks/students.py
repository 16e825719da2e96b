"""Memory of a LADD step with a student of its own weights and with adapters on the teacher's.

    python benchmarks/students.py [any overrides of distill.run]
    python benchmarks/students.py teacher=sdxl trainer.precision=bf16-mixed data=images
        data.path=... data.size=512

Each student is trained for a few steps in a process of its own. On any machine: bytes of the two
networks, of the student's gradient, of its optimiser's moments and of its average. On a GPU also
the peak of what was allocated, which has text encoders, autoencoder, heads and activations in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable

import torch
from common import composed, fit
from torch import Tensor

from distill.config import build

STEPS = 3
STUDENTS = {
    "full copy": ["student=full"],
    "LoRA, rank 64": ["student=lora"],
    "LoRA, rank 64, checkpointing": ["student=lora", "student.checkpointing=true"],
}


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def measure(overrides: list[str]) -> dict[str, int]:
    """Train, and say what was held."""
    source, method = build.build_training(cfg := composed(overrides))
    trainer = fit(cfg, method, source, STEPS)
    student = list(method.student.parameters())
    moments = trainer.strategy.optimizers[0].state.values()
    found = {
        "networks": size([*method.teacher.network.parameters(), *student]),
        "gradient": size(student),
        "moments": size(v for state in moments for v in state.values() if isinstance(v, Tensor)),
        "average": size(method.ema.state_dict().values()),
    }
    found["together"] = sum(found.values())
    if torch.cuda.is_available():
        found["peak on the GPU"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2:])))
        return
    rows = {}
    for name, overrides in STUDENTS.items():
        command = [sys.executable, __file__, "--one", *overrides, *sys.argv[1:]]
        rows[name] = json.loads(
            subprocess.run(
                command, check=True, capture_output=True, text=True, encoding="utf-8"
            ).stdout.splitlines()[-1]
        )
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    print(f"MiB on {where}, torch {torch.__version__}")
    columns = list(next(iter(rows.values())))
    print(f"{'':30}" + "".join(f"{name:>17}" for name in columns))
    for name, row in rows.items():
        print(f"{name:30}" + "".join(f"{row[column] / 2**20:17.1f}" for column in columns))


if __name__ == "__main__":
    main()
