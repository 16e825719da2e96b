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
    """Facts of a run: written when it begins or goes on, after training and at its end."""

    def __init__(self, folder: Path):
        self._path = folder / "run.json"
        self.facts: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def begun(self, command: str, name: str) -> None:
        if self.facts:
            self.facts["resumed"] = [*self.facts.get("resumed", []), {"command": command, "at": _now()}]
        else:
            self.facts = {"name": name, "command": command, "started": _now(), "train_seconds": 0.0}
        self.facts |= {"status": "stopped", "commit": _commit(), "hardware": hardware()}
        self._write(began=time.time(), versions=versions())

    def trained(self, method: Any) -> None:
        """The seconds of a run that was resumed add up over its parts."""
        seconds = round(self.facts["train_seconds"] + time.time() - self.facts["began"], 1)
        names = {"method": type(method).__name__, "teacher": type(method.teacher).__name__}
        counts = {"steps": method.step, "images_seen": method.images_seen, "skipped": method.skipped}
        self._write(train_seconds=seconds, trained=time.time(), **names, **counts)

    def finished(self) -> None:
        seconds = self.facts["train_seconds"] + time.time() - self.facts["trained"]
        self._write(status="finished", wall_seconds=round(seconds, 1))

    def _write(self, **more: Any) -> None:
        self.facts |= more
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.facts, indent=2) + "\n")
        part.replace(self._path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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


def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
