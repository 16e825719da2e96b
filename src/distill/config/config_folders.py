"""What a folder of options that one gives Hydra, by --config-dir, may say of Hydra itself.

A recipe of somebody else's is read like a command line: its `_target_`s are checked as those that
are typed. But what stands below `hydra` Hydra calls by itself, before anything of ours has a word,
so classes and factories are left to the command line there.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.config.trust import TRUST_RUN, is_trusted_run, plain, walk

FLAGS = ("--config-dir", "-cd", "--config-path", "-cp")
CALLS = {"_target_", "()", "class"}  # by the last two logging makes handlers and formatters
INTO = re.compile(r"@package\s+hydra|@/?hydra|^\s*-.*@\s*:?\s*hydra", re.MULTILINE)


def folders(words: Sequence[str]) -> Iterator[Path]:
    """The folders that the words of a command give Hydra."""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            yield from (Path(text) for text in ([value] if equals else words[i + 1 : i + 2]))


def check(words: Sequence[str]) -> None:
    """Raise ValueError, naming file and key, where a folder of options has Hydra call something."""
    for folder in folders(words):
        for file in sorted(folder.rglob("*.yaml")):
            if not is_trusted_run(file) and (key := called_by_hydra(file, folder)):
                ways = f"type it, or if you trust these files set {TRUST_RUN}={folder}"
                raise ValueError(
                    f"{file}: {key}: a file may not say what Hydra itself calls; {ways}"
                )


def called_by_hydra(file: Path, folder: Path) -> str | None:
    """The first key by which this file has Hydra itself call something; None if there is none."""
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
