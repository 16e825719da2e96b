"""Check the folder that --config-dir gives Hydra: its files may not make Hydra call anything.

The `_target_`s of such files are checked like those of the command line. But Hydra itself
instantiates what is below the key `hydra`, before our checks run. So classes and factories are
allowed there only on the command line.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.config.trust import TRUST_RUN, is_trusted_run, plain, walk
from distill.storage.bounded import text_of

FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")
MOST_LINKS = 3  # ours: links to folders in one path; the ways through many would not end
DEEPEST = 100  # ours: folders in each other
CALLS = {"_target_", "()", "class"}  # with the last two `logging` builds handlers and formatters
HEADER = re.compile(r"@package\s+\S*hydra")  # a comment of a file: where its content goes
INTO = re.compile(r"@.*(?:hydra|\$\{)", re.DOTALL)  # the same in a name of a defaults list


def folders(arguments: Sequence[str]) -> Iterator[Path]:
    """The folders that the arguments of a command give Hydra."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in FLAGS:
            yield from (Path(text) for text in ([value] if equals else arguments[i + 1 : i + 2]))


def check(arguments: Sequence[str]) -> None:
    """Raise ValueError, naming file and key, if a file of these folders makes Hydra call code."""
    for folder in folders(arguments):
        for file in _files(folder):
            if not is_trusted_run(file) and (key := called_by_hydra(file, folder)):
                hint = f"type it, or if you trust these files set {TRUST_RUN}={folder}"
                raise ValueError(
                    f"{file}: {key}: a file may not say what Hydra itself calls; {hint}"
                )


def _files(folder: Path, above: tuple[str, ...] = (), links: int = 0) -> Iterator[Path]:
    """All YAML files below a folder, behind links too, since Hydra follows them.

    A folder has a file under each of its names, as Hydra sees it. Folders that are linked into
    themselves are entered once.
    """
    place = os.path.realpath(folder)
    if place in above:
        return
    if links > MOST_LINKS or len(above) > DEEPEST:
        raise ValueError(f"{folder}: is too deep to be searched for recipes; remove it")
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            yield from _files(path, (*above, place), links + path.is_symlink())
        elif path.suffix == ".yaml":
            yield path


def called_by_hydra(file: Path, folder: Path) -> str | None:
    """The first key with which this file makes Hydra call code; None if there is none."""
    text = text_of(file)
    below = file.relative_to(folder).parts[0] == "hydra"
    if "hydra" not in text and "\\" not in text and not below:  # escapes may spell any name
        return None
    if not below and HEADER.search(text):
        return "@hydra"
    tree: dict[str, Any] = plain(file)
    if not below and any(map(INTO.search, _defaults(tree))):
        return "@hydra"
    for path, value in walk(tree, ""):
        inside = below or path.partition(".")[0] == "hydra"
        if inside and isinstance(value, dict) and (found := CALLS.intersection(map(str, value))):
            return f"{path}.{min(found)}".lstrip(".")
    return None


def _defaults(tree: dict[str, Any]) -> list[str]:
    """The names in the defaults list of a file: `group@package`."""
    listed = tree.get("defaults")
    entries = listed if isinstance(listed, list) else []
    return [
        str(name) for entry in entries for name in (entry if isinstance(entry, dict) else [entry])
    ]
