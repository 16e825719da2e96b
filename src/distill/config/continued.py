"""The configuration of a resumed run: its own, with the overrides of the command line.

Nothing here imports torch.
"""

import contextlib
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from distill.config import paths, texts, trust, typed
from distill.config.compose import (
    changes,
    folder_of,
    is_fixed_on_resume,
    is_restarted,
    overrides,
    processes,
    read_unchecked,
    requeued,
)
from distill.config.paths import escaped
from distill.storage.bounded import mapping_of


def resumed_config(cfg: DictConfig) -> DictConfig:
    """The configuration of the run to resume, with the overrides of the command line.

    Raises ValueError, naming the keys, if that would change the model or the order of the data.
    `resuming` checks paths that have changed.
    """
    file = folder_of(cfg.resume) / "config.yaml"
    content = trust.data(file)
    before = read_unchecked(file.parent)
    assert before is not None
    now = before.copy()
    OmegaConf.set_struct(now, False)
    several, replaced = [], set()
    for override in overrides():
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        value, had = (OmegaConf.select(c, key, default=MISSING) for c in (cfg, now))
        if not MISSING == value == had:
            _check_part(key, cfg, now)
            chosen = None if value == MISSING else _option_value(key, value, had)
            only_typed = chosen is None or chosen is value  # nothing of the file remains
            chosen = escaped(chosen) if isinstance(chosen, str) else chosen
            OmegaConf.update(now, key, chosen, merge=False)
            if only_typed:
                replaced.add(key)
        elif not (
            override.startswith("~")
            or is_restarted()
            or _was_given_at_start(override, folder_of(cfg.resume))
        ):
            # experiment= and the like
            several.append(f"{override} (sets many keys, only for new runs; name the keys)")
    # A requeued SLURM job reads the file that it wrote itself.
    requeued_run = requeued(cfg)
    trusted = requeued_run is not None and Path(requeued_run) == Path(cfg.resume)
    trust.check_file(content, file, replaced, trusted=trusted)
    if not trusted:
        texts.check_shown_paths(now, file, replaced)
    now.resume = escaped(cfg.resume)
    different = several + [
        change
        for key, change in changes(before, now).items()
        if is_fixed_on_resume(key) and not paths.is_path(key)
    ]
    batches = [
        c.data.batch_size * c.loop.get("accumulate", 1) * processes(c) for c in (before, now)
    ]
    if batches[0] != batches[1]:
        different.append(
            f"samples a step={batches[1]} (was {batches[0]}: batch_size x accumulate x devices x"
            " nodes)"
        )
    if different:
        raise ValueError(
            f"resume={cfg.resume}: {'; '.join(different)}: would be another run; take that back, or"
            " start a new run"
        )
    return now


def _check_part(key: str, cfg: DictConfig, run: DictConfig) -> None:
    """Raise ValueError for a key of a part that the run was started without, as `~metrics`."""
    part, dot, _ = key.partition(".")
    chosen, had = (OmegaConf.select(c, part) for c in (cfg, run))
    if dot and "_target_" in (chosen or {}) and "_target_" not in (had or {}):
        raise ValueError(f"{key}: the run has no {part}; add {part}=..., or leave this out")


def _was_given_at_start(override: str, folder: Path) -> bool:
    """Whether the run was started with this option: its whole command may be given again."""
    with contextlib.suppress(OSError, ValueError):  # the file is damaged or missing
        first = mapping_of(folder / "run.json").get("overrides")
        return typed.masked_override(override) in (first if isinstance(first, list) else ())
    return False


def _same_class(value: Any, had: Any) -> bool:
    """Whether both are nodes of one class, or of none."""
    nodes = isinstance(value, DictConfig) and isinstance(had, DictConfig)
    return nodes and value.get("_target_") == had.get("_target_")


def _option_value(key: str, value: Any, had: Any) -> Any:
    """The new value of an override, where the run had `had`.

    An option of the same class changes only the keys in its own file, and parts of other classes.
    """
    if not _same_class(value, had):
        return value
    hydra = HydraConfig.get().runtime
    files = [
        Path(s.path) / key / f"{hydra.choices.get(key)}.yaml"
        for s in hydra.config_sources
        if s.schema == "file"
    ]
    names = {name for file in files if file.is_file() for name in OmegaConf.load(file)}
    names &= set(value)
    nodes = {name: (value._get_node(name), had._get_node(name)) for name in set(value) & set(had)}
    names |= {
        name for name, (new, old) in nodes.items()
        if isinstance(new, DictConfig) and not _same_class(new, old)
    }  # fmt: skip
    return OmegaConf.create({**(had if names else value), **{name: value[name] for name in names}})
