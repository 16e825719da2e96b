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


class RunRecord:
    """Facts of a run: written when it begins or goes on, after training and at its end."""

    def __init__(self, folder: Path):
        self._path = folder / "run.json"
        self.facts: dict[str, Any] = {}
        if self._path.is_file():
            try:
                self.facts = _sound(mapping_of(self._path))
            except ValueError:  # damaged: its facts are lost, the run is not
                log.warning("%s cannot be read, and is begun anew", self._path)

    def begun(
        self,
        command: str,
        name: str,
        overrides: Sequence[str] = (),
        precision: Mapping[str, str] | None = None,
        train_seconds: float | None = None,
        anew: bool = False,
    ) -> None:
        """`precision`: its name, and why it was chosen.

        `train_seconds`: those up to the checkpoint that is gone on from. A part that was killed has
        not told its own; a checkpoint of before these were kept says None. `anew`: whatever began
        here before.
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
        folder = str(self._path.parent.resolve())  # for `paths.located`, should it be moved
        self._write(status="stopped", began=time.time(), folder=folder, **machine)

    def made_of(
        self, models: Mapping[str, str], data: Mapping[str, Any], texts: Mapping[str, str]
    ) -> None:
        """Keep marks of what the run was made of, as it was when it began; see `resuming`.

        And of the `texts` that it shows now.
        """
        known = self.facts.get("content", {})
        models = {**models, **known.get("models", {})}  # what is there is sound
        content = {"models": models, "data": known.get("data") or dict(data)}
        self._write(content={**content, "texts": dict(texts)})

    def came_to(self, iterations: int) -> None:
        """How far a run came that an error ended."""
        self._write(iterations=iterations)

    def trained_for(self) -> float | None:
        """Seconds of training until now, over all parts of the run; None of what has no record."""
        if "began" not in self.facts:
            return None
        return round(self.facts["train_seconds"] + time.time() - self.facts["began"], 1)

    def trained(self, method: Any) -> None:
        """The seconds of a run that was resumed add up over its parts."""
        seconds = self.trained_for()
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

    def finished(self) -> None:
        seconds = self.facts["train_seconds"] + time.time() - self.facts["trained"]
        self._write(status="finished", wall_seconds=round(seconds, 1))

    def _write(self, **more: Any) -> None:
        self.facts |= more
        write_atomic(self._path, json.dumps(self.facts, indent=2).encode() + b"\n")


def _sound(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that are of their kind. A damaged one is lost, as if it had not been kept."""
    numbers = ("train_seconds", "began", "trained", "wall_seconds")
    kept = {k: v for k, v in facts.items() if k not in numbers or is_number(v)}
    if not isinstance(kept.get("resumed", []), list):
        del kept["resumed"]
    if "content" in kept:
        kept["content"] = _sound_content(kept["content"])
    return kept


def _sound_content(content: Any) -> dict[str, Any]:
    """Of the marks of a run's models, texts and data those that could have been kept."""
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
    """Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
