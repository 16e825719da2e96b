"""`run.json`: how a run was made, so that its numbers can be trusted later."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("distill", "torch", "lightning", "diffusers", "transformers", "hydra-core", "webdataset")


class RunRecord:
    """Facts of a run, written at its start, after training and at its end."""

    def __init__(self, folder: Path, *, command: str, name: str):
        self._path, self._began = folder / "run.json", time.monotonic()
        self.facts: dict[str, Any] = {
            "name": name,
            "command": command,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "status": "stopped",
            "commit": _commit(),
            "hardware": hardware(),
            "versions": {"python": platform.python_version(), **_versions()},
        }
        self._write()

    def trained(self, method: Any) -> None:
        seconds = round(time.monotonic() - self._began, 1)
        self.facts |= {"train_seconds": seconds, "steps": method.step, "images_seen": method.images_seen}
        self.facts |= {"method": type(method).__name__, "teacher": type(method.teacher).__name__}
        self._write()

    def finished(self) -> None:
        self.facts |= {"status": "finished", "wall_seconds": round(time.monotonic() - self._began, 1)}
        self._write()

    def _write(self) -> None:
        self._path.write_text(json.dumps(self.facts, indent=2) + "\n")


def hardware() -> str:
    """In plain words: '2 CPU cores', 'one NVIDIA H200'."""
    count = torch.cuda.device_count()
    if count:
        return f"{'one' if count == 1 else count} {torch.cuda.get_device_name(0)}"
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores"


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
