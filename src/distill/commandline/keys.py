"""Check the keys of a command, and that their values have the type of their defaults."""

import re
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.commandline.quoting import LISTS, groups, is_text, own_keys
from distill.config import paths, trust
from distill.config.compose import dotted, nearest, shipped

NEEDED = "???"
KINDS: dict[type, tuple[Any, str]] = {  # type of a default -> allowed types, and their name
    bool: (bool, "true or false"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
}
# Last parts of keys that may name what is shipped: all paths but those of which nothing is.
SHIPPED = {"run", *paths.READ, *paths.WRITTEN} - {"image", "lora", "mask", "parts", "prompts"}


def check_composed(cfg: DictConfig, config: str) -> None:
    """Raise ValueError for keys that are missing, that nothing reads, or whose value is wrong."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ValueError(f"{', '.join(missing)}: not given; add {missing[0]}=... to the command")
    check_known(cfg, config)
    check_own_keys(cfg, config)
    check_shipped(cfg)


def check_shipped(cfg: DictConfig) -> None:
    """Raise FileNotFoundError, with its key, for a name after `shapes:` that is not shipped."""
    for key, value in trust.walk(OmegaConf.to_container(cfg, resolve=False), ""):
        if isinstance(value, str) and key.rpartition(".")[2] in SHIPPED:
            try:
                shipped(value)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{key}={error}") from None


def check_known(cfg: DictConfig, config: str) -> None:
    """Raise ValueError for a top-level key that nothing reads, which a file or `+key=` has added.

    A key in a reference `${key}` is read.
    """
    known = {*own_keys(config), *groups(config)}
    for key in [key for key in map(str, cfg) if key not in known]:
        reference = rf"\$\{{\s*{re.escape(key)}\b"
        if not re.search(reference, OmegaConf.to_yaml(cfg, resolve=False)):
            near = nearest(key, known)
            raise ValueError(f"{key}: nothing reads this key{near}; leave it out")


def check_own_keys(cfg: DictConfig, config: str) -> None:
    """Raise ValueError for a wrong value of a key in the command's own file.

    Keys of groups are checked against their classes. null is only allowed if it is the default. The
    command checks the range of whole numbers.
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
        kind, name = KINDS.get(type(default), (object, ""))
        wrong = not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        if wrong and default != NEEDED and name:
            raise ValueError(f"{key}={value}: must be {name}")
