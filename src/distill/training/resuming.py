"""Checks of a resumed run: its checkpoint, models and data must be those that it started with.

A run keeps its configuration and a fingerprint of each local model in run.json and in every
checkpoint. Nothing here imports torch.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config import paths, texts
from distill.config.compose import (
    dotted,
    folder_of,
    is_fixed_on_resume,
    is_restarted,
    overrides,
    shipped,
)
from distill.storage import fingerprints as content
from distill.storage.renames import renamed
from distill.teachers.loading.locate import pipeline_folder

SHOWN = 3  # differences named in an error
ANEW = "start a new run, perhaps from this student by student.init=<run folder>"

log = logging.getLogger(__name__)


def model_fingerprints(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> fingerprint, of every local model of the run."""
    found = {}
    for key, value in paths.input_paths(cfg).items():
        fingerprint = _fingerprint(value) if is_fixed_on_resume(key) else None
        if fingerprint is not None:
            found[key] = fingerprint
    return found


def text_fingerprints(cfg: DictConfig) -> dict[str, str]:
    """Dotted key -> fingerprint, of every text that the run shows; see `texts`."""
    return texts.text_hashes(dotted(OmegaConf.to_container(cfg, resolve=True)))


def _fingerprint(value: str) -> str | None:
    return content.path_fingerprint(pipeline_folder(Path(shipped(value))))


def check_folder(cfg: DictConfig) -> None:
    """Raise ValueError for a `run_dir` beside `resume` that is another folder."""
    folder = folder_of(cfg.resume)
    typed = any(word.lstrip("+").startswith("run_dir=") for word in overrides())
    if not typed or not cfg.run_dir or is_restarted():
        return
    if Path(cfg.run_dir).resolve() != folder.resolve():
        what = f"resume={cfg.resume} continues in its own folder"
        way = "leave run_dir= out, or copy the run there and resume the copy"
        raise ValueError(f"run_dir={cfg.run_dir}: {what}; {way}")


def check_checkpoint(about: Any, now: DictConfig, path: Path, key: str = "resume") -> None:
    """Raise ValueError, naming what differs, if another run made the checkpoint at `path`.

    `about` is the checkpoint's description of itself. Without one only names and shapes of tensors
    are checked, elsewhere. A model at another path counts as the same if its fingerprint is equal.
    """
    config = about.get("config") if isinstance(about, Mapping) else None
    if not config or not isinstance(config, Mapping):
        return
    kept = _fixed_values(renamed(config))
    own = _fixed_values(OmegaConf.to_container(now, resolve=True))
    found = [name for name in {**kept, **own} if kept.get(name) != own.get(name)]
    different = [name for name in found if not paths.is_path(name)]
    had, here = about.get("content"), model_fingerprints(now)
    for name in filter(paths.is_path, found):
        known = had.get(name) if isinstance(had, Mapping) else None
        if known is not None and name in here and known != here[name]:
            different.append(name)
    if not different:
        return
    # Classes first, then their arguments.
    different.sort(key=lambda name: not name.endswith("_target_"))
    said = [f"{name}={kept.get(name)}, here {own.get(name)}" for name in different[:SHOWN]]
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    raise ValueError(
        f"{key}={path}: another run made this checkpoint ({'; '.join(said)}{more}); name one of"
        " this run's own"
    )


def _fixed_values(config: Any) -> dict[str, Any]:
    leaves = {key: value for key, value in dotted(config).items() if not isinstance(value, dict)}
    return {key: value for key, value in leaves.items() if is_fixed_on_resume(key)}


def check_moved(before: DictConfig, now: DictConfig, facts: Mapping[str, Any]) -> None:
    """Raise ValueError for a model at a new path, `data.path` aside, that is not the run's own.

    `facts` are those of run.json. A model that has changed at its old path gives a warning.
    """
    known = facts.get("content", {}).get("models", {})
    old, new = (dotted(OmegaConf.to_container(cfg, resolve=True)) for cfg in (before, now))
    for key in filter(is_fixed_on_resume, filter(paths.is_path, {**old, **new})):
        was, value = old.get(key), new.get(key)
        if content.same_path(was, value):
            _say_changed(key, value, known.get(key))
            continue
        had = known.get(key) or (_fingerprint(was) if isinstance(was, str) else None)
        fingerprint = _fingerprint(value) if isinstance(value, str) else None
        if fingerprint is None or (had is not None and fingerprint != had):
            what = f"is not the model of this run, {key}={was}"
            raise ValueError(f"{key}={value}: {what}; give that one, or {ANEW}")
        if had is None:
            log.warning(
                "%s=%s: assumed to be %s, of which no fingerprint is known", key, value, was
            )


def _say_changed(key: str, value: Any, known: str | None) -> None:
    if known is None or not isinstance(value, str):
        return
    fingerprint = _fingerprint(value)
    if fingerprint is not None and fingerprint != known:
        what = "its files have changed since the start: the resumed run will not be bit-identical"
        log.warning("%s=%s: %s", key, value, what)


def data_fingerprint(dataset: Any) -> dict[str, Any]:
    """Number of samples of the data, and a hash of them. Generated data have the number alone."""
    shards = getattr(dataset, "shards", None)
    digest = shards.digest() if hasattr(shards, "digest") else None
    made = getattr(dataset, "made", {}).get("sha256")
    return {"samples": len(shards if digest else dataset), "digest": digest, "manifest": made}


def check_data(
    before: DictConfig, now: DictConfig, facts: Mapping[str, Any], fingerprint: Mapping[str, Any]
) -> None:
    """Compare the data with those at the start. Raises ValueError for other data at a new path.

    Other data at the same path give a warning.
    """
    known = facts.get("content", {}).get("data")
    if not known or known == fingerprint:
        return
    was, path = before.data.get("path"), now.data.get("path")
    counts = f"{fingerprint['samples']} samples, and the run started with {known['samples']}"
    if known["samples"] == fingerprint["samples"]:
        counts = "other samples than the run started with"
    if not content.same_path(was, path):
        what = f"holds {counts}, data.path={was}"
        raise ValueError(f"data.path={path}: {what}; name those, or {ANEW}")
    log.warning("data.path=%s: holds %s: the resumed run will not be bit-identical", path, counts)
