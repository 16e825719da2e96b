"""How long a newcomer waits: a fresh clone, `make run`, and when each thing is there for the first
time.

    python benchmarks/first_mile.py [any overrides of distill.run]
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/first_mile.py

The clone is of the last commit and lies in a temporary folder, with an environment of its own.
The second command imitates a CPU without AVX-512: torch's own kernels and oneDNN's then use AVX2,
bfloat16 is emulated, and float32 is about as fast as before. The clock rate, the caches and the
memory stay those of the machine, and MKL chooses its kernels by the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKS = {  # what is waited for -> a file of the clone that then exists
    "installed": ".venv/.setup",
    "first picture": "runs/*/samples/step_*.png",
    "trained": "runs/*/student/model_index.json",
    "evaluated": "runs/*/evaluation.json",
    "report": "runs/*/report.html",
}


def watch(clone: Path, began: float, found: dict[str, float], ended: threading.Event) -> None:
    """Note when each file appears, to half a second."""
    while not ended.wait(0.5):
        for name, pattern in MARKS.items():
            if name not in found and any(clone.glob(pattern)):
                found[name] = time.monotonic() - began


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "distill"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        found: dict[str, float] = {}
        ended, began = threading.Event(), time.monotonic()
        watcher = threading.Thread(target=watch, args=(clone, began, found, ended))
        watcher.start()
        command = ["make", "run", f"ARGS={' '.join(sys.argv[1:])}"]
        environment = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
        with subprocess.Popen(
            command, cwd=clone, env=environment, stdout=subprocess.PIPE, encoding="utf-8"
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if "installed" in found or (clone / MARKS["installed"]).exists():
                    found.setdefault("first line", time.monotonic() - began)
        found["end"] = time.monotonic() - began
        ended.set()
        watcher.join()
        print("\nseconds since `make run` was typed")
        for name, seconds in sorted(found.items(), key=lambda item: item[1]):
            print(f"{seconds:7.1f}  {name}")
        for run in clone.glob("runs/*"):
            facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
            shown = ("train_seconds", "wall_seconds", "hardware", "cpu", "precision", "commit")
            print("\n".join(f"{key}: {facts.get(key)}" for key in shown))
            rows = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["rows"]
            for row in rows:
                keys = ("who", "steps", "prompt_accuracy", "frechet", "diversity")
                print("  ".join(f"{key} {row[key]}" for key in keys if key in row))
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
