"""Text files that a run shows: prompts, which stand below its pictures. A stranger's is not any
file of this machine.

A run keeps a hash of each such file in its run.json. Who wrote that hash knew the text, so that it
gives nothing away; of any other file outside of the run's folder the user must say themselves that
it is meant. Nothing here imports a library that takes long.
"""

import hashlib
import os
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config import trust
from distill.storage.bounded import LINES, mapping_of
from distill.storage.safe_paths import TRUST_RUN, is_trusted_run

# Keys at which a plain file is read as lines of text.
SHOWN = re.compile(r"callbacks\.[^.]+\.prompts|metrics\.(?:path|prompts)")
DATA, OF_LINES = "data.path", "distill.data.source.prompts"
# What the system says of processes and devices. Below /dev/shm lie ordinary files.
SYSTEM = ("/proc", "/sys", "/dev")
ORDINARY = "/dev/shm"


def check_shown_paths(cfg: DictConfig, file: Path, but: Container[str] = ()) -> None:
    """Raise ValueError, naming file and key, for a path in a stranger's file that gives away what
    it leads to.

    That is: what the system says of processes, their environment among it, and a text that is
    shown, unless `is_known`. `cfg` has the paths as they are read, moved or not. The keys in `but`
    are not looked at.
    """
    if is_trusted_run(file):
        return
    tree = trust.without(OmegaConf.to_container(cfg, resolve=True), but)
    values = dict(trust.walk(tree, ""))
    way = f"if you trust this run, set {TRUST_RUN}={file.parent}"
    for key, value in values.items():
        words = trust.TEXTS.fullmatch(key) or not isinstance(value, str)
        if not words and is_system_path(value):
            what = "is no file, but what the system says of processes and devices"
            raise ValueError(f"{file}: {key}={value}: {what}; {way}")
    for key, value in shown_texts(values):
        if not is_known(key, value, file.parent):
            what = "is a text that would be shown, and not known for the run's own"
            raise ValueError(f"{file}: {key}={value}: {what}; type {key}=... yourself, or {way}")


def shown_texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted key and path of each text file that a configuration of these dotted keys has read and
    shown.
    """
    for key, value in values.items():
        lines = key == DATA and values.get("data._target_") == OF_LINES
        if isinstance(value, str) and (lines or SHOWN.fullmatch(key)) and _is_file(value):
            yield key, value


def text_hashes(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> SHA-256 of its text, to be kept."""
    found = {key: _sha256(Path(value)) for key, value in shown_texts(values)}
    return {key: mark for key, mark in found.items() if mark is not None}


def is_known(key: str, path: str, folder: Path) -> bool:
    """Whether the file at a key of the run in `folder` lies there, or is the very text that the run
    was made with.
    """
    file = Path(path)
    if file.resolve().is_relative_to(folder.resolve()):
        return True
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = mapping_of(folder / "run.json")["content"]["texts"][key]
        return isinstance(kept, str) and kept == _sha256(file)
    return False


def is_system_path(path: str) -> bool:
    """Whether this is a place that the system makes up, of processes and devices."""
    places = [os.path.abspath(path)]
    with suppress(OSError, ValueError):  # a text too long for a name, or with a zero in it
        places.append(os.path.realpath(path))
    return any(_below(place, SYSTEM) and not _below(place, (ORDINARY,)) for place in places)


def _below(place: str, roots: tuple[str, ...]) -> bool:
    return any(place == root or place.startswith(f"{root}/") for root in roots)


def _is_file(path: str) -> bool:
    with suppress(OSError, ValueError):
        return os.path.isfile(path)
    return False


def _sha256(file: Path) -> str | None:
    with suppress(OSError):
        if file.stat().st_size <= LINES:
            with file.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
    return None
