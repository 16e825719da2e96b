"""Check the folder that --config-dir gives Hydra: its files may not make Hydra call anything.

The `_target_`s of such files are checked like those of the command line. But Hydra itself
instantiates what is below the key `hydra`, before our checks run. So classes and factories are
allowed there only on the command line.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.config.trust import TRUST_RUN, is_trusted_run, plain, walk

FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")
CALLS = {"_target_", "()", "class"}  # with the last two `logging` builds handlers and formatters
INTO = re.compile(r"@package\s+hydra|@/?hydra|^\s*-.*@\s*:?\s*hydra", re.MULTILINE)


def folders(arguments: Sequence[str]) -> Iterator[Path]:
    """The folders that the arguments of a command give Hydra."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in FLAGS:
            yield from (Path(text) for text in ([value] if equals else arguments[i + 1 : i + 2]))


def check(arguments: Sequence[str]) -> None:
    """Raise ValueError, naming file and key, if a file of these folders makes Hydra call code."""
    for folder in folders(arguments):
        for file in sorted(folder.rglob("*.yaml")):
            if not is_trusted_run(file) and (key := called_by_hydra(file, folder)):
                hint = f"type it, or if you trust these files set {TRUST_RUN}={folder}"
                raise ValueError(
                    f"{file}: {key}: a file may not say what Hydra itself calls; {hint}"
                )


def called_by_hydra(file: Path, folder: Path) -> str | None:
    """The first key with which this file makes Hydra call code; None if there is none."""
    text = file.read_text(encoding="utf-8")
    below = file.relative_to(folder).parts[0] == "hydra"
    if "hydra" not in text and not below:
        return None
    if not below and INTO.search(text):
        return "@hydra"
    tree: dict[str, Any] = plain(file)
    for path, value in walk(tree, ""):
        inside = below or path.partition(".")[0] == "hydra"
        if inside and isinstance(value, dict) and (found := CALLS.intersection(map(str, value))):
            return f"{path}.{min(found)}".lstrip(".")
    return None
