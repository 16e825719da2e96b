"""Text files that a run shows, such as prompts below its pictures. An untrusted configuration must
not show other files of this machine.

run.json holds a hash of each such file. Whoever wrote the hash knew the text, so showing it reveals
nothing. Any other file outside the run's folder must be typed by the user. Nothing here imports a
slow library.
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
from distill.config.sources import PROMPTS
from distill.storage.bounded import LINES, mapping_of
from distill.storage.safe_paths import TRUST_RUN, is_trusted_run

# Keys of files that are read as lines of text.
SHOWN = re.compile(r"callbacks\.[^.]+\.prompts|metrics\.(?:path|prompts)")
DATA = "data.path"
# Files of the system about processes and devices. /dev/shm holds ordinary files.
SYSTEM = ("/proc", "/sys", "/dev")
ORDINARY = "/dev/shm"


def check_shown_paths(cfg: DictConfig, file: Path, ignored: Container[str] = ()) -> None:
    """Raise ValueError, naming file and key, for a path in an untrusted file that would reveal the
    content of a file.

    That is a file of the system about processes, for example their environment, and a text that is
    shown, unless `is_known`. `cfg` has the paths as they are read. The keys in `ignored` are
    skipped.
    """
    if is_trusted_run(file):
        return
    tree = trust.without(OmegaConf.to_container(cfg, resolve=True), ignored)
    values = dict(trust.walk(tree, ""))
    hint = f"if you trust this run, set {TRUST_RUN}={file.parent}"
    for key, value in values.items():
        is_text = trust.TEXTS.fullmatch(key) or not isinstance(value, str)
        if not is_text and is_system_path(value):
            what = "is a file of the system about processes and devices"
            raise ValueError(f"{file}: {key}={value}: {what}; {hint}")
    for key, value in shown_texts(values):
        if not is_known(key, value, file.parent):
            what = "is a text that would be shown, and run.json has no hash of it"
            raise ValueError(f"{file}: {key}={value}: {what}; type {key}=... yourself, or {hint}")


def shown_texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Dotted key and path of each text file that a run with these values reads and shows."""
    for key, value in values.items():
        is_lines = key == DATA and values.get("data._target_") == PROMPTS
        if isinstance(value, str) and (is_lines or SHOWN.fullmatch(key)) and _is_file(value):
            yield key, value


def text_hashes(values: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> SHA-256 of its text, for run.json."""
    found = {key: _sha256(Path(value)) for key, value in shown_texts(values)}
    return {key: digest for key, digest in found.items() if digest is not None}


def is_known(key: str, path: str, folder: Path) -> bool:
    """Whether the file at a key lies in the run's `folder`, or has the hash in its run.json."""
    file = Path(path)
    if file.resolve().is_relative_to(folder.resolve()):
        return True
    with suppress(OSError, ValueError, KeyError, TypeError):
        digest = mapping_of(folder / "run.json")["content"]["texts"][key]
        return isinstance(digest, str) and digest == _sha256(file)
    return False


def is_system_path(path: str) -> bool:
    """Whether this path lies in /proc, /sys or /dev, but not in /dev/shm."""
    places = [os.path.abspath(path)]
    with suppress(OSError, ValueError):  # too long for a file name, or with a null character
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
