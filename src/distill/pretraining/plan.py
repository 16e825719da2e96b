"""What a pretraining is asked to do, and the two small files that say how far it has come."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.pretraining.fit import Budget

NEEDS: dict[str, tuple[str, ...]] = {  # stage -> the stages whose results it reads, in the order in which they run
    "data": (),
    "clip": ("data",),
    "vae": ("data",),
    "latents": ("data", "vae"),
    "reader": ("data", "vae", "latents"),
    "vit": ("data",),
    "mmdit": ("data", "clip", "vae", "latents"),
    "unet": ("data", "clip", "vae", "latents"),
    "shards": ("data", "mmdit"),
}
MIN_PICTURES = 256  # CLIP holds 200 back
SHAPES_SIDE = 64  # what `shapes` are drawn at, and their reader reads


@dataclass(frozen=True, kw_only=True)
class Data:
    """At most `count` captioned pictures: shards, a folder with a .txt beside each, or (no path) scenes of `shapes`."""

    path: str | None
    size: int
    count: int
    seed: int

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 128 or self.size % 8:
            raise ValueError(f"data.size={self.size}: pictures may have 32 to 128 pixels a side, in multiples of 8")
        if self.path is None and self.size != SHAPES_SIDE:
            raise ValueError(
                f"data.size={self.size}: shapes have {SHAPES_SIDE} pixels a side; other sizes need data.path"
            )
        if self.count < MIN_PICTURES:
            raise ValueError(f"data.count={self.count}: at least {MIN_PICTURES} pictures are needed")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """What the reader learns from: the first `shared` scenes of the data, also autoencoded, and `fresh` ones."""

    shared: int
    fresh: int


@dataclass(frozen=True, kw_only=True)
class Shards:
    """How many latents the MMDiT makes for distillation, and how."""

    count: int
    guidance: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How the parts are judged: prompts of each sort, the teachers' steps and guidance. It changes no weight."""

    prompts: int
    steps: int
    guidance: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The configuration of `python -m distill.pretrain`, made into objects."""

    out: str
    seed: int
    stages: Sequence[str] | None
    text_length: int
    data: Data
    reader_scenes: Scenes
    shards: Shards
    scoring: Scoring
    clip: Budget
    vae: Budget
    reader: Budget
    vit: Budget
    mmdit: Budget
    unet: Budget

    def chosen(self) -> list[str]:
        """The stages asked for, in the order in which they run; without the reader where there is no ground truth."""
        asked = list(NEEDS) if self.stages is None else list(self.stages)
        for name in asked:
            if name not in NEEDS:
                near = difflib.get_close_matches(name, NEEDS, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"stages: no stage {name!r}; {hint}there are {', '.join(NEEDS)}")
        return [name for name in NEEDS if name in asked]

    def settings(self, stage: str) -> dict[str, Any]:
        """All that decides what `stage` makes, apart from what it reads: dotted name -> value."""
        names = ["seed", "text_length", "data", stage, *(["reader_scenes"] if stage == "reader" else [])]
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        nested = {name: v if isinstance(v, int) else asdict(v) for name, v in values.items()}
        return dict(_flat(nested))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


class Ledger:
    """`scores.json` (stage -> seconds, scores, finished) and `settings.json` (commands, and settings by stage).

    Read anew before every change, so that two commands may work on different stages of one folder at a time.
    """

    def __init__(self, out: Path):
        self.out = out

    def scores(self, stage: str) -> dict[str, Any]:
        return self._read("scores.json").get(stage, {})

    def settings(self) -> dict[str, Any]:
        return {"commands": [], "stages": {}} | self._read("settings.json")

    def finished(self, stage: str) -> bool:
        return bool(self.scores(stage).get("finished"))

    def note(self, stage: str, **values: Any) -> None:
        """Add to the scores of a stage."""
        scores = self._read("scores.json")
        self._write("scores.json", scores | {stage: scores.get(stage, {}) | values})

    def agree(self, stage: str, settings: dict[str, Any]) -> None:
        """Refuse to go on with a stage that was begun with other settings."""
        before = self.settings()["stages"].get(stage)
        if before is None:
            return
        changed = [f"{k}={settings[k]} (was {before.get(k)})" for k in settings if settings[k] != before.get(k)]
        if changed:
            raise ValueError(
                f"out={self.out}: its stage {stage} was begun with other settings, now {', '.join(changed)}; "
                "choose another out, or take them back"
            )

    def begin(self, stage: str, settings: dict[str, Any], command: str) -> None:
        known = self.settings()
        commands = list(dict.fromkeys([*known["commands"], command]))
        self._write("settings.json", {"commands": commands, "stages": known["stages"] | {stage: settings}})

    def _read(self, name: str) -> dict[str, Any]:
        path = self.out / name
        return json.loads(path.read_text()) if path.exists() else {}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.out / f"{name}.{os.getpid()}.part"
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(self.out / name)
