"""`run.json`: how a run was made, so that its results can be trusted later."""

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

from distill.machine.hardware import cpu, hardware
from distill.storage.atomic import write_atomic
from distill.storage.bounded import is_number, mapping_of

log = logging.getLogger("distill.training.run_metadata")
PACKAGES = (
    "distill",
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "hydra-core",
    "webdataset",
)


class RunMetadata:
    """Facts of a run, written when it starts or resumes, after training and at its end."""

    def __init__(self, folder: Path):
        self._path = folder / "run.json"
        self.facts: dict[str, Any] = {}
        if self._path.is_file():
            try:
                self.facts = _sound(mapping_of(self._path))
            except ValueError:  # a damaged file must not stop the run
                log.warning("%s cannot be read, and is started anew", self._path)

    def start(
        self,
        command: str,
        name: str,
        overrides: Sequence[str] = (),
        precision: Mapping[str, str] | None = None,
        train_seconds: float | None = None,
        anew: bool = False,
    ) -> None:
        """Write the facts of the start of a run, or of its resumption.

        precision: its name, and why it was chosen. train_seconds: seconds of training up to the
        checkpoint that is resumed; None for a checkpoint that does not know them. anew: ignore
        facts of an earlier run in this folder.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        if self.facts and not anew:
            self.facts["resumed"] = [
                *self.facts.get("resumed", []),
                {"command": command, "at": now},
            ]
            if train_seconds is not None:
                self.facts["train_seconds"] = train_seconds
            self.facts.setdefault("train_seconds", 0.0)
        else:
            self.facts = {"name": name, "command": command, "started": now, "train_seconds": 0.0}
            self.facts["overrides"] = list(overrides)
        machine = {"commit": _commit(), "hardware": hardware(), "versions": versions()}
        machine |= {"cpu": cpu(), "precision": dict(precision or {})}
        folder = str(self._path.parent.resolve())  # for `paths.located`, if the run is moved
        self._write(status="stopped", began=time.time(), folder=folder, **machine)

    def record_inputs(
        self, models: Mapping[str, str], data: Mapping[str, Any], texts: Mapping[str, str]
    ) -> None:
        """Write fingerprints of the run's models and data, as they were at its start; see
        `resuming`.

        Also those of the `texts` that it shows now.
        """
        known = self.facts.get("content", {})
        models = {**models, **known.get("models", {})}  # fingerprints of the start take precedence
        content = {"models": models, "data": known.get("data") or dict(data)}
        self._write(content={**content, "texts": dict(texts)})

    def record_iterations(self, iterations: int) -> None:
        """Write how many iterations a run made that ended with an error."""
        self._write(iterations=iterations)

    def train_seconds(self) -> float | None:
        """Seconds of training until now, summed over resumptions; None for a run without
        metadata.
        """
        if "began" not in self.facts:
            return None
        return round(self.facts["train_seconds"] + time.time() - self.facts["began"], 1)

    def pause(self, seconds: float) -> None:
        """Leave these seconds, of work beside training, out of the training's."""
        if "began" in self.facts:
            self._write(began=self.facts["began"] + seconds)

    def record_training(self, method: Any) -> None:
        """Write step counts, and the seconds of training, summed over resumptions."""
        seconds = self.train_seconds()
        names = {"method": type(method).__name__, "teacher": type(method.teacher).__name__}
        counts = {
            "steps": method.step,
            "iterations": method.loop.iteration,
            "images_seen": method.loop.images_seen,
            "skipped": method.loop.skipped,
        }
        if torch.cuda.is_available():
            counts["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self._write(train_seconds=seconds, trained=time.time(), **names, **counts)

    def finish(self) -> None:
        seconds = self.facts["train_seconds"] + time.time() - self.facts["trained"]
        self._write(status="finished", wall_seconds=round(seconds, 1))

    def _write(self, **more: Any) -> None:
        self.facts |= more
        write_atomic(self._path, json.dumps(self.facts, indent=2).encode() + b"\n")


def _sound(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that have the expected type. Others are dropped."""
    numbers = ("train_seconds", "began", "trained", "wall_seconds")
    kept = {k: v for k, v in facts.items() if k not in numbers or is_number(v)}
    if not isinstance(kept.get("resumed", []), list):
        del kept["resumed"]
    if "content" in kept:
        kept["content"] = _sound_content(kept["content"])
    return kept


def _sound_content(content: Any) -> dict[str, Any]:
    """The fingerprints of models, texts and data that have the expected type."""
    if not isinstance(content, dict):
        return {}
    kept: dict[str, Any] = {}
    for name in ("models", "texts"):
        marks = content.get(name)
        if isinstance(marks, dict):
            kept[name] = {key: mark for key, mark in marks.items() if isinstance(mark, str)}
    data = content.get("data")
    if isinstance(data, dict) and type(data.get("samples")) is int:
        hashes = (data.get("digest"), data.get("manifest"))
        if all(isinstance(value, str | None) for value in hashes):
            kept["data"] = data
    return kept


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
    """Versions of Python and of the packages that influence results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
