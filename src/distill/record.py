"""`run.json`: how a run was made, so that its numbers can be trusted later."""

import json
import logging
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from distill.files import put
from distill.hardware import cpu, hardware

log = logging.getLogger("distill.record")
PACKAGES = (
    "distill",
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "hydra-core",
    "webdataset",
)


class RunRecord:
    """Facts of a run: written when it begins or goes on, after training and at its end."""

    def __init__(self, folder: Path):
        self._path = folder / "run.json"
        self.facts: dict[str, Any] = {}
        if self._path.is_file():
            try:
                self.facts = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):  # damaged: its facts are lost, the run is not
                log.warning("%s cannot be read, and is begun anew", self._path)

    def begun(
        self,
        command: str,
        name: str,
        overrides: Sequence[str] = (),
        precision: Mapping[str, str] | None = None,
    ) -> None:
        """`precision`: its name, and the reason why it was chosen."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if self.facts:
            self.facts["resumed"] = [
                *self.facts.get("resumed", []),
                {"command": command, "at": now},
            ]
        else:
            self.facts = {"name": name, "command": command, "started": now, "train_seconds": 0.0}
            self.facts["overrides"] = list(overrides)
        machine = {"commit": _commit(), "hardware": hardware(), "versions": versions()}
        machine |= {"cpu": cpu(), "precision": dict(precision or {})}
        self._write(status="stopped", began=time.time(), **machine)

    def trained(self, method: Any) -> None:
        """The seconds of a run that was resumed add up over its parts."""
        seconds = round(self.facts["train_seconds"] + time.time() - self.facts["began"], 1)
        names = {"method": type(method).__name__, "teacher": type(method.teacher).__name__}
        counts = {
            "steps": method.step,
            "images_seen": method.images_seen,
            "skipped": method.skipped,
        }
        if torch.cuda.is_available():
            counts["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self._write(train_seconds=seconds, trained=time.time(), **names, **counts)

    def finished(self) -> None:
        seconds = self.facts["train_seconds"] + time.time() - self.facts["trained"]
        self._write(status="finished", wall_seconds=round(seconds, 1))

    def _write(self, **more: Any) -> None:
        self.facts |= more
        put(self._path, json.dumps(self.facts, indent=2).encode() + b"\n")


def _commit() -> str | None:
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            encoding="utf-8",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
