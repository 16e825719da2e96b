"""Going on: whether a checkpoint, the models and the data are those of the run that goes on by
them.

A run keeps in its run.json, and in every checkpoint, what it was made of: its configuration, and a
mark of each model that was read from this machine. Nothing here imports torch.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config import paths, texts
from distill.config.compose import (
    FIXED_ON_RESUME,
    dotted,
    folder_of,
    is_restarted,
    overrides,
    shipped,
)
from distill.storage import fingerprints as content
from distill.storage.renames import renamed
from distill.teachers.loading.locate import pipeline_folder

SHOWN = 3  # differences that one sentence names
ANEW = "begin anew, perhaps from its student by student.init=<run folder>"

log = logging.getLogger(__name__)


def fixed(key: str) -> bool:
    """Whether a run keeps the value of this dotted key for good."""
    return any(key == begins or key.startswith(f"{begins}.") for begins in FIXED_ON_RESUME)


def marks(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> mark, of every model of the run that lies on this machine."""
    found = {}
    for key, value in paths.input_paths(cfg).items():
        mark = _mark(value) if fixed(key) else None
        if mark is not None:
            found[key] = mark
    return found


def texts_of(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> mark, of every text that the run shows; see `texts`."""
    return texts.text_hashes(dotted(OmegaConf.to_container(cfg, resolve=True)))


def _mark(value: str) -> str | None:
    return content.path_fingerprint(pipeline_folder(Path(shipped(value))))


def check_folder(cfg: DictConfig) -> None:
    """Raise ValueError for a `run_dir` beside `resume` that is another folder: a run goes on where
    it is.
    """
    folder = folder_of(cfg.resume)
    typed = any(word.lstrip("+").startswith("run_dir=") for word in overrides())
    if not typed or not cfg.run_dir or is_restarted():
        return
    if Path(cfg.run_dir).resolve() != folder.resolve():
        what = f"resume={cfg.resume} goes on in its own folder"
        way = "leave run_dir= out, or copy the run there and resume the copy"
        raise ValueError(f"run_dir={cfg.run_dir}: {what}; {way}")


def check_checkpoint(about: Any, now: DictConfig, path: Path, key: str = "resume") -> None:
    """Raise ValueError if the checkpoint at `path` says that another run made it, naming what
    differs.

    `about` is what it says of itself; one that says nothing is held to the names and shapes of its
    tensors alone. A model at another path is the same one if its mark is.
    """
    config = about.get("config") if isinstance(about, Mapping) else None
    if not config or not isinstance(config, Mapping):
        return
    kept = _fixed_values(renamed(config))
    own = _fixed_values(OmegaConf.to_container(now, resolve=True))
    found = [name for name in {**kept, **own} if kept.get(name) != own.get(name)]
    different = [name for name in found if not paths.is_path(name)]
    had, here = about.get("content"), marks(now)
    for name in filter(paths.is_path, found):
        known = had.get(name) if isinstance(had, Mapping) else None
        if known is not None and name in here and known != here[name]:
            different.append(name)
    if not different:
        return
    # What it was made by comes first, then the numbers of it.
    different.sort(key=lambda name: not name.endswith("_target_"))
    said = [f"{name}={kept.get(name)}, here {own.get(name)}" for name in different[:SHOWN]]
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    raise ValueError(
        f"{key}={path}: another run made this checkpoint ({'; '.join(said)}{more}); name one of"
        " this run's own"
    )


def _fixed_values(config: Any) -> dict[str, Any]:
    leaves = {key: value for key, value in dotted(config).items() if not isinstance(value, dict)}
    return {key: value for key, value in leaves.items() if fixed(key)}


def check_moved(before: DictConfig, now: DictConfig, facts: Mapping[str, Any]) -> None:
    """Raise ValueError for a model that is named anew, `data.path` aside, and is not the one that
    the run had.

    `facts` are those of run.json. One that has changed at its old place is said.
    """
    known = facts.get("content", {}).get("models", {})
    old, new = (dotted(OmegaConf.to_container(cfg, resolve=True)) for cfg in (before, now))
    for key in filter(fixed, filter(paths.is_path, {**old, **new})):
        was, value = old.get(key), new.get(key)
        if content.same_path(was, value):
            _say_changed(key, value, known.get(key))
            continue
        had = known.get(key) or (_mark(was) if isinstance(was, str) else None)
        mark = _mark(value) if isinstance(value, str) else None
        if mark is None or (had is not None and mark != had):
            what = f"is not what the run was made with, {key}={was}"
            raise ValueError(f"{key}={value}: {what}; take that back, or {ANEW}")
        if had is None:
            log.warning("%s=%s: taken for %s, of which no mark was kept", key, value, was)


def _say_changed(key: str, value: Any, known: str | None) -> None:
    if known is None or not isinstance(value, str):
        return
    mark = _mark(value)
    if mark is not None and mark != known:
        what = "its files have changed since the run began: it does not go on bit for bit"
        log.warning("%s=%s: %s", key, value, what)


def data_mark(dataset: Any) -> dict[str, Any]:
    """How many samples the data of a run have, and a hash of what they are; of what is drawn the
    number alone.
    """
    shards = getattr(dataset, "shards", None)
    digest = shards.digest() if hasattr(shards, "digest") else None
    made = getattr(dataset, "made", {}).get("sha256")
    return {"samples": len(shards if digest else dataset), "digest": digest, "manifest": made}


def check_data(
    before: DictConfig, now: DictConfig, facts: Mapping[str, Any], mark: Mapping[str, Any]
) -> None:
    """Say that the data have changed since the run began; raise ValueError if they were named anew
    and are others.
    """
    known = facts.get("content", {}).get("data")
    if not known or known == mark:
        return
    was, path = before.data.get("path"), now.data.get("path")
    counts = f"{mark['samples']} samples, and the run began with {known['samples']}"
    if known["samples"] == mark["samples"]:
        counts = "other samples than the run began with"
    if not content.same_path(was, path):
        what = f"holds {counts}, data.path={was}"
        raise ValueError(f"data.path={path}: {what}; name those, or {ANEW}")
    log.warning("data.path=%s: holds %s: it does not go on bit for bit", path, counts)
