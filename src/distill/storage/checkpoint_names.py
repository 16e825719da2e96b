"""File names of checkpoints and sample pictures in a run folder.

Nothing here imports torch.
"""

import os
import re
from pathlib import Path


def steps_in(folder: Path, suffix: str) -> dict[int, Path]:
    """Step -> file of the files `step_000250<suffix>` in a folder, sorted by step.

    Files with other names belong to the user, and are ignored.
    """
    pattern = re.compile(rf"step_(\d{{6,}}){re.escape(suffix)}")
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(match[1]): folder / name for name in names if (match := pattern.fullmatch(name))}
    return dict(sorted(found.items()))


def checkpoints_at(path: Path, key: str = "resume") -> list[Path]:
    """The checkpoints to resume from, newest first: `path` and earlier ones, or all of a run.

    Raises FileNotFoundError, naming `key`, if there is none.
    """
    named = path.name.endswith(".ckpt")
    steps = steps_in(path.parent if named else path / "checkpoints", ".ckpt")
    found = [steps[step] for step in sorted(steps, reverse=True)]
    if named:
        numbered = re.match(r"step_(\d+)", path.name)  # a copy may have another name
        step = int(numbered[1]) if numbered else 0
        found = [path, *(steps[other] for other in sorted(steps, reverse=True) if other < step)]
    if not found or not path.exists():
        raise FileNotFoundError(f"{key}={path}: has no checkpoint to resume from")
    return found
