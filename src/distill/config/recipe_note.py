"""The note at the start of a run: which values a recipe sets in place of the paper's.

Nothing here imports torch.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.config.compose import PAPER, dotted

GROUPS = ("recipe", "heads")
WIDTH = 100


def recipe_note(cfg: DictConfig) -> str | None:
    """A paragraph for each chosen option of `recipe` and `heads` other than `paper`, or None.

    It names the option and the keys that the option sets. Keys that an experiment or the command
    line changed again are left out.
    """
    if not HydraConfig.initialized():
        return None
    choices = HydraConfig.get().runtime.choices
    notes = [_note(cfg, group, str(choices.get(group))) for group in GROUPS]
    return "\n".join(note for note in notes if note) or None


def _note(cfg: DictConfig, group: str, option: str) -> str | None:
    of_paper = (PAPER, str(HydraConfig.get().runtime.choices.get("method")))
    if option in (*of_paper, "None"):
        return None
    values = [f"{key}={_compact(value)}" for key, value in _values(cfg, group, option)]
    if not values:
        return None
    start = f"{group}={option} sets beyond the paper ({group}={PAPER} does not): "
    return textwrap.fill(
        start + ", ".join(values),
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _values(cfg: DictConfig, group: str, option: str) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each setting in the option's file that the run still has."""
    for source in HydraConfig.get().runtime.config_sources:
        file = Path(source.path) / group / f"{option}.yaml"
        if source.schema != "file" or not file.is_file():
            continue
        tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for key, value in dotted(tree or {}).items():
            if not isinstance(value, dict) and OmegaConf.select(cfg, key) == value:
                yield key, value
        return


def _compact(value: Any) -> str:
    return str(value).replace(" ", "")
