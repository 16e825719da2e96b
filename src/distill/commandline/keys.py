"""Values of a command's own keys, held against the kind of their defaults."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.commandline.texts import own
from distill.compose import dotted

NEEDED = "???"
KINDS: dict[type, tuple[Any, str]] = {  # of a default -> what a value must be, and in words
    bool: (bool, "true or false"),
    float: ((int, float), "a number"),
    str: (str, "a text"),
}


def check_own(cfg: DictConfig, config: str) -> None:
    """Raise ValueError for what the keys of the command's own file cannot be; those of groups have classes to ask.

    null is only what has it for a default. Whole numbers have a range besides, which their command knows.
    """
    for key, default in dotted(own(config)).items():
        value: Any = OmegaConf.select(cfg, key, throw_on_missing=False)
        if default is None or isinstance(default, dict) or OmegaConf.is_missing(cfg, key):
            continue
        if value is None and default == NEEDED:
            raise ValueError(f"{key}: not given; add {key}=... to the command")
        if value is None:
            raise ValueError(f"{key}=null: needs a value; leave it out for {default}")
        kind, words = KINDS.get(type(default), (object, ""))
        wrong = not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
        if wrong and default != NEEDED and words:
            raise ValueError(f"{key}={value}: must be {words}")
