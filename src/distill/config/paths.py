"""Paths in a configuration: absolute where it is kept, so that a run is found from every working
folder.

A value is taken for a path if its key may hold one and something lies there; a hub id, a word or a
shipped name (`shapes:mmdit`) stays as it is.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.storage.bounded import mapping_of

# Last parts of the keys that name something which is read.
READ = {"path", "weights", "vae", "config", "init", "pretrained", "processor", "reference"}
READ |= {"prompts", "image", "base", "parts"}
WRITTEN = {"dirpath", "save_dir"}  # and what is written: there need not be anything yet
ONE_FILE = ("pretrained", "prompts", "image")  # what may also be a tag or a text
# Values of student.init that begin as the teacher does, or know nothing: of a LoRA those of its
# adapters. They are no paths, whatever lies here.
TEACHERS_OWN = ("teacher", "random", "kaiming", "gaussian")
SHIPPED = "shapes:"
IN_FOLDER = "local-dir:"  # open_clip's, before a folder
NAMED = "OpenClip"  # whose `path` and `name` are those of an architecture
PATTERN = "{*?["


def is_path(key: str) -> bool:
    """Whether this dotted key may hold a path."""
    return key.rpartition(".")[2] in READ | WRITTEN


def absolute(cfg: DictConfig) -> DictConfig:
    """The configuration with its paths absolute, as seen from the working folder."""
    made = cfg.copy()
    for node, key, name in list(_places(made)):
        node[key] = escaped(_absolute(node, name, str(node[key])))
    return made


def located(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration of the run in `folder`, with paths that are gone where they moved along
    with it.

    A run that was moved or copied together with what it reads finds that at the same place relative
    to itself; anything else stays, and is missed by who wants it.
    """
    began = _began_in(folder)
    here = folder.resolve()
    if began is None or began == here:
        return cfg
    for node, key, name in list(_places(cfg)):
        value = str(node[key])
        if name in WRITTEN or not os.path.isabs(value) or _there(value, name):
            continue
        with suppress(ValueError):  # of another drive
            moved = os.path.normpath(here / os.path.relpath(value, began))
            if _there(moved, name):
                node[key] = escaped(moved)
    return cfg


def escaped(value: Any) -> Any:
    """With a backslash before every `${`; OmegaConf halves those before that, so they are
    doubled.
    """
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def verbatim(tree: Any) -> dict[str, Any]:
    """Of a plain node the texts, and lists of them, that OmegaConf would take for
    interpolations.
    """

    def refers(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(refers, value))
        return isinstance(value, str) and "${" in value

    items = tree.items() if isinstance(tree, dict) else ()
    return {name: value for name, value in items if refers(value)}


def read_ones(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> value, for every path that is read and lies on this machine."""
    found: dict[str, str] = {}

    def note(node: Any, key: Any, name: str) -> None:
        value = str(node[key])
        if name in READ and not value.startswith(SHIPPED) and _there(value, name):
            found[str(node._get_full_key(key))] = value

    _walk(cfg, note)
    return found


def _began_in(folder: Path) -> Path | None:
    """Where the run lay when it last went on, as its run.json says."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return Path(mapping_of(folder / "run.json")["folder"])
    return None


def _places(cfg: DictConfig) -> Iterator[tuple[Any, Any, str]]:
    """Each (node, key, last part of the key) that holds a text which may be a path."""
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
    return f"{prefix}{os.path.abspath(place)}" if _there(place, name) else value


def _there(value: str, name: str) -> bool:
    """Whether something lies at this path, or where a pattern of shards begins."""
    place = value.removeprefix(IN_FOLDER)
    try:
        if name in ONE_FILE:
            return os.path.isfile(place)
        if os.path.exists(place):
            return bool(place)
    except (OSError, ValueError):  # a text too long for a name, or with a zero in it
        return False
    cut = min((place.find(mark) for mark in PATTERN if mark in place), default=-1)
    return name == "path" and cut >= 0 and os.path.isdir(os.path.dirname(place[:cut]) or ".")
