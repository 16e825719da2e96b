"""Paths in a configuration. They are saved absolute, so that a run works from every folder.

A value is a path if its key may hold one and the file exists. A hub id, an option or a shipped name
(`shapes:mmdit`) stays as it is.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.storage.bounded import mapping_of

# Last parts of keys whose paths are read.
READ = {"path", "weights", "vae", "config", "init", "pretrained", "processor", "reference"}
READ |= {"prompts", "image", "mask", "base", "parts", "lora"}
WRITTEN = {
    "cache_dir",
    "dirpath",
    "save_dir",
}  # of keys whose paths are written, and need not exist yet
ONE_FILE = ("pretrained", "prompts", "image")  # these may also be a tag or a text
# Values of student.init that start from the teacher's weights or at random; the last two are for
# the adapters of a LoRA. They are options, never paths.
TEACHERS_OWN = ("teacher", "random", "kaiming", "gaussian")
SHIPPED = "shapes:"  # before the name of a model or of shards inside the package
IN_FOLDER = "local-dir:"  # open_clip's, before a folder
NAMED = "OpenClip"  # of this class, `path` and `name` are the name of an architecture
PATTERN = "{*?["


def is_path(key: str) -> bool:
    """Whether this dotted key may hold a path."""
    return key.rpartition(".")[2] in READ | WRITTEN


def absolute(cfg: DictConfig) -> DictConfig:
    """A copy of the configuration with absolute paths, relative to the working folder."""
    copy = cfg.copy()
    for node, key, name in list(_places(copy)):
        node[key] = escaped(_absolute(node, name, str(node[key])))
    return copy


def relocated(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration of the run in `folder`, with corrected paths if the run was moved.

    A path that no longer exists is replaced by the same path relative to the run, if that exists.
    """
    recorded = _recorded_folder(folder)
    here = folder.resolve()
    if recorded is None or recorded == here:
        return cfg
    for node, key, name in list(_places(cfg)):
        value = str(node[key])
        if name in WRITTEN or not os.path.isabs(value) or _exists(value, name):
            continue
        with suppress(ValueError):  # on another drive
            moved = os.path.normpath(here / os.path.relpath(value, recorded))
            if _exists(moved, name):
                node[key] = escaped(moved)
    return cfg


def escaped(value: Any) -> Any:
    """With a backslash before every `${`. Backslashes before it are doubled, since OmegaConf halves
    them.
    """
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def verbatim(tree: Any) -> dict[str, Any]:
    """Texts of a plain node, and lists of them, that OmegaConf would read as interpolations."""

    def refers(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(refers, value))
        return isinstance(value, str) and "${" in value

    items = tree.items() if isinstance(tree, dict) else ()
    return {name: value for name, value in items if refers(value)}


def input_paths(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> value of every path that is read and exists."""
    found: dict[str, str] = {}

    def note(node: Any, key: Any, name: str) -> None:
        value = str(node[key])
        if name in READ and not value.startswith(SHIPPED) and _exists(value, name):
            found[str(node._get_full_key(key))] = value

    _walk(cfg, note)
    return found


def _recorded_folder(folder: Path) -> Path | None:
    """The folder of the run when it was last started or resumed, from its run.json."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Path(mapping_of(folder / "run.json")["folder"])
    return None


def _places(cfg: DictConfig) -> Iterator[tuple[Any, Any, str]]:
    """Each (node, key, last part of the key) whose text may be a path."""
    found: list[tuple[Any, Any, str]] = []
    _walk(cfg, lambda node, key, name: found.append((node, key, name)))
    yield from found


def _walk(node: Any, visit: Callable[[Any, Any, str], None]) -> None:
    keys = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        if OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            _walk(value, visit)
        elif isinstance(value, str) and isinstance(node, DictConfig) and is_path(str(key)):
            named = str(node.get("_target_")).rpartition(".")[2].startswith(NAMED)
            if not (named and key == "path" and not value.startswith(IN_FOLDER)):
                visit(node, key, str(key))


def _absolute(node: Any, name: str, value: str) -> str:
    prefix = IN_FOLDER if value.startswith(IN_FOLDER) else ""
    place = value.removeprefix(prefix)
    if name in WRITTEN:
        return value if "://" in value else os.path.abspath(os.path.expanduser(value))
    if value.startswith(SHIPPED) or (name == "init" and value in TEACHERS_OWN):
        return value
    if name == "path" and place.startswith("~"):
        place = os.path.expanduser(place)
    return f"{prefix}{os.path.abspath(place)}" if _exists(place, name) else value


def _exists(value: str, name: str) -> bool:
    """Whether this path exists, or the folder of a shard pattern."""
    place = value.removeprefix(IN_FOLDER)
    try:
        if name in ONE_FILE:
            return os.path.isfile(place)
        if os.path.exists(place):
            return bool(place)
    except (OSError, ValueError):  # too long for a file name, or with a null character
        return False
    cut = min((place.find(mark) for mark in PATTERN if mark in place), default=-1)
    return name == "path" and cut >= 0 and os.path.isdir(os.path.dirname(place[:cut]) or ".")
