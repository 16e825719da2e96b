"""The configuration of a run that goes on: its own, with what the command line changes in it.
Nothing here imports torch.
"""

import contextlib
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from distill.config import paths, texts, trust, typed
from distill.config.compose import (
    FIXED_ON_RESUME,
    changes,
    folder_of,
    is_restarted,
    overrides,
    processes,
    read_unchecked,
    requeued,
)
from distill.config.paths import escaped
from distill.storage.bounded import mapping_of


def resumed_config(cfg: DictConfig) -> DictConfig:
    """The configuration of the run that is resumed, with what the command line changes in it.

    Raises ValueError if that would be another model or another order of the data, naming the keys.
    A path that is named anew is for `resuming` to judge.
    """
    file = folder_of(cfg.resume) / "config.yaml"
    said = trust.data(file)
    before = read_unchecked(file.parent)
    assert before is not None
    now = before.copy()
    OmegaConf.set_struct(now, False)
    several, replaced = [], set()
    for override in overrides():
        key = override.lstrip("+~").partition("=")[0].partition("@")[0]
        value, had = (OmegaConf.select(c, key, default=MISSING) for c in (cfg, now))
        if not MISSING == value == had:
            chosen = None if value == MISSING else _option_value(key, value, had)
            own_word = chosen is None or chosen is value
            chosen = escaped(chosen) if isinstance(chosen, str) else chosen
            OmegaConf.update(now, key, chosen, merge=False)
            if own_word:
                replaced.add(key)
        elif not (
            override.startswith("~")
            or is_restarted()
            or _was_given_at_start(override, folder_of(cfg.resume))
        ):
            # experiment= and the like
            several.append(f"{override} (many keys at once, for new runs alone; name the keys)")
    # A job that SLURM runs again finds what it wrote itself.
    again = requeued(cfg)
    own = again is not None and Path(again) == Path(cfg.resume)
    trust.check_file(said, file, replaced, own=own)
    if not own:
        texts.check_shown_paths(now, file, replaced)
    now.resume = escaped(cfg.resume)
    different = several + [
        said
        for key, said in changes(before, now).items()
        if key.startswith(FIXED_ON_RESUME) and not paths.is_path(key)
    ]
    batches = [
        c.data.batch_size * c.optimizer.get("accumulate", 1) * processes(c) for c in (before, now)
    ]
    if batches[0] != batches[1]:
        different.append(
            f"samples a step={batches[1]} (was {batches[0]}: batch_size x accumulate x devices x"
            " nodes)"
        )
    if different:
        raise ValueError(
            f"resume={cfg.resume}: {'; '.join(different)}: another run; take that back, or begin"
            " anew"
        )
    return now


def _was_given_at_start(override: str, folder: Path) -> bool:
    """Whether the run began with this option, so that its whole command may be given again."""
    with contextlib.suppress(OSError, ValueError):  # damaged, or none
        began = mapping_of(folder / "run.json").get("overrides")
        return typed.masked_override(override) in (began if isinstance(began, list) else ())
    return False


def _option_value(key: str, value: Any, had: Any) -> Any:
    """What an override means for a run that had `had`: of an option of the same class what its own
    file says alone.
    """
    if not all(isinstance(v, DictConfig) for v in (value, had)) or value.get("_target_") != had.get(
        "_target_"
    ):
        return value
    hydra = HydraConfig.get().runtime
    own = [
        Path(s.path) / key / f"{hydra.choices.get(key)}.yaml"
        for s in hydra.config_sources
        if s.schema == "file"
    ]
    said = {name for file in own if file.is_file() for name in OmegaConf.load(file)} & set(value)
    return OmegaConf.create({**(had if said else value), **{name: value[name] for name in said}})
