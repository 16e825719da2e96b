"""Which files of a run are its checkpoints and pictures, by their names.

Nothing here imports torch.
"""

import os
import re
from pathlib import Path


def steps_in(folder: Path, suffix: str) -> dict[int, Path]:
    """Step -> file, of those that a run names after its steps, `step_000250` and the suffix, in
    their order.

    A file of any other name is not the run's: somebody has put it there, and it stays.
    """
    pattern = re.compile(rf"step_(\d{{6,}}){re.escape(suffix)}")
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(match[1]): folder / name for name in names if (match := pattern.fullmatch(name))}
    return dict(sorted(found.items()))


def checkpoints_at(path: Path, key: str = "resume") -> list[Path]:
    """The checkpoints to go on from, newest first: `path` itself and those before it, or all of a
    run folder.

    Raises FileNotFoundError, naming `key`, if there is none.
    """
    named = path.name.endswith(".ckpt")
    steps = steps_in(path.parent if named else path / "checkpoints", ".ckpt")
    found = [steps[step] for step in sorted(steps, reverse=True)]
    if named:
        began = re.match(r"step_(\d+)", path.name)  # a copy may have a name of its own
        step = int(began[1]) if began else 0
        found = [path, *(steps[other] for other in sorted(steps, reverse=True) if other < step)]
    if not found or not path.exists():
        raise FileNotFoundError(f"{key}={path}: holds no checkpoint to go on from")
    return found
