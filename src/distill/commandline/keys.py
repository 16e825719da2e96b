"""Values of a command's own keys, held against the kind of their defaults."""

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.commandline.quoting import LISTS, groups, is_text, own_keys
from distill.config.compose import dotted, nearest

NEEDED = "???"
KINDS: dict[type, tuple[Any, str]] = {  # of a default -> what a value must be, and in words
    bool: (bool, "true or false"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
}


def check_known(cfg: DictConfig, config: str) -> None:
    """Raise ValueError for a key at the top that nothing reads, though no file and no `+key=` was
    kept from adding it.

    One that another key refers to by `${key}` is read.
    """
    known = {*own_keys(config), *groups(config)}
    for key in [key for key in map(str, cfg) if key not in known]:
        reference = rf"\$\{{\s*{re.escape(key)}\b"
        if not re.search(reference, OmegaConf.to_yaml(cfg, resolve=False)):
            near = nearest(key, known)
            raise ValueError(f"{key}: nothing reads this key{near}; leave it out")


def check_own_keys(cfg: DictConfig, config: str) -> None:
    """Raise ValueError for what the keys of the command's own file cannot be; those of groups have
    classes to ask.

    null is only what has it for a default. Whole numbers have a range besides, which their command
    knows.
    """
    for key, default in dotted(own_keys(config)).items():
        value: Any = OmegaConf.select(cfg, key, throw_on_missing=False)
        if isinstance(default, dict) or OmegaConf.is_missing(cfg, key):
            continue
        several = key in LISTS and isinstance(value, ListConfig)
        if is_text(key, config) and not isinstance(value, str | None) and not several:
            raise ValueError(f"{key}={value}: must be a text")
        if default is None:
            continue
        if value is None and default == NEEDED:
            raise ValueError(f"{key}: not given; add {key}=... to the command")
        if value is None:
            raise ValueError(f"{key}=null: needs a value; leave it out for {default}")
        kind, words = KINDS.get(type(default), (object, ""))
        wrong = not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        if wrong and default != NEEDED and words:
            raise ValueError(f"{key}={value}: must be {words}")
