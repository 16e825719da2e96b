"""What a pretraining is asked to do, checked, and the file that says how far it has come."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def check_data(path: str | None, size: int, count: int) -> None:
    """Refuse data that no stage could use; `path` None means scenes of `shapes`."""
    if not 32 <= size <= 128 or size % 8:
        raise ValueError(f"data.size={size}: pictures may have 32 to 128 pixels a side, in multiples of 8")
    if path is None and size != SHAPES_SIDE:
        raise ValueError(f"data.size={size}: shapes have {SHAPES_SIDE} pixels a side; other sizes need data.path")
    if count < MIN_PICTURES:
        raise ValueError(f"data.count={count}: at least {MIN_PICTURES} pictures are needed")


def chosen(stages: Sequence[str] | None) -> list[str]:
    """The stages asked for, or all, in the order in which they run."""
    for name in stages or ():
        if name not in NEEDS:
            near = difflib.get_close_matches(name, NEEDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"stages: no stage {name!r}; {hint}there are {', '.join(NEEDS)}")
    return [name for name in NEEDS if stages is None or name in stages]


class Ledger:
    """`pretraining.json`: the commands, and by stage its settings, seconds, scores and whether it is finished.

    Read anew before every change, so that two commands may work on different stages of one folder at a time.
    """

    def __init__(self, out: Path):
        self.path = out / "pretraining.json"

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"commands": [], "stages": {}}

    def stage(self, name: str) -> dict[str, Any]:
        return self.read()["stages"].get(name, {})

    def finished(self) -> list[str]:
        return [name for name, stage in self.read()["stages"].items() if stage.get("finished")]

    def note(self, stage: str, **values: Any) -> None:
        """Add to what is known of a stage."""
        known = self.read()
        known["stages"][stage] = known["stages"].get(stage, {}) | values
        self._write(known)

    def begin(self, stage: str, settings: Mapping[str, Any], command: str) -> None:
        """Write down the settings of a stage; refuse to go on with one that was begun with others."""
        before = self.stage(stage).get("settings", settings)
        if changed := [f"{k}={v} (was {before.get(k)})" for k, v in settings.items() if v != before.get(k)]:
            raise ValueError(
                f"out={self.path.parent}: its stage {stage} was begun with other settings, now {', '.join(changed)}; "
                "choose another out, or take them back"
            )
        self.note(stage, settings=dict(settings))
        known = self.read()
        self._write(known | {"commands": list(dict.fromkeys([*known["commands"], command]))})

    def _write(self, content: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=2) + "\n")
        part.replace(self.path)
