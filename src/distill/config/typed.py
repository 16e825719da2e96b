"""Words of a command line without their secrets: Hydra's own parser says where a key and its value
end.

    note(["+logger.x.password='my own'"])     what is noted stands in no log, file or error
    as_said("+logger.x.password='my own'")       +logger.x.password=***

Nothing here imports torch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.terminal import secret

# What says no value: a variable of the environment, or another key.
NAMED = re.compile(r"([\'\"]?)\$\{(oc\.env:)?[\w.]+\}\1")


def register_secrets(words: Sequence[str]) -> None:
    """Have the secrets in these words left out of what this process says, and the words shown
    without them.
    """
    for word in words:
        shown, values = _redact(word)
        secret.register({str(i): value for i, value in enumerate(values)})
        secret.register_argument(word, shown)


def register_config_secrets(cfg: DictConfig) -> None:
    """Have the secrets of a configuration left out of what this process says."""
    asked = secret.secrets_in(OmegaConf.to_container(cfg, resolve=False))
    secret.register({key: OmegaConf.select(cfg, key) for key in asked})
    with suppress(OmegaConfBaseException):  # what cannot be resolved is said by who wants it
        secret.register(secret.secrets_in(OmegaConf.to_container(cfg, resolve=True)))


def masked_override(word: str) -> str:
    """The word with *** in place of its secrets."""
    return _redact(word)[0]


def _redact(word: str) -> tuple[str, list[Any]]:
    """The word as it may be shown, and the values of its secrets."""
    word = secret.resolved(word)
    begins, sign, raw = word.partition("=")
    key = begins.lstrip("+~")
    if not sign or NAMED.fullmatch(raw):
        return word, []
    override = parse_override(word)
    if secret.is_secret(key):
        value = _value(override) if override else None
        bare = raw.strip("'\"[]{} ")
        return f"{begins}={secret.MASK}", [raw, bare, *_leaves(value)]
    found = list(secret.secrets_in_arguments([word]).values())
    value = _value(override) if override else raw
    hidden, values = _without_secrets(value, key)
    if not values:
        return secret.masked(word), found
    if isinstance(value, str):
        return secret.masked(word.replace(value, hidden)), [*values, *found]
    sweeps = override is None or isinstance(override._value, Sweep)
    text = secret.MASK if sweeps else Override._get_value_element_as_str(hidden)
    return f"{begins}={text}", [*values, *found]


def parse_override(word: str) -> Override | None:
    """The word as Hydra reads it; None where it does not."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:  # a flag, or what Hydra refuses with words of its own
        return None


def _value(override: Override) -> Any:
    """What the word gives its key, plain; of a sweep all that it may give."""
    given = override._value
    if isinstance(given, ChoiceSweep):
        return [Override._convert_value(each) for each in given.list]
    return None if isinstance(given, Sweep) else override.value()


def _without_secrets(value: Any, key: str) -> tuple[Any, list[Any]]:
    """The value without its secrets, and those; a text in a list may be a word itself, as in
    `search run=`.
    """
    if isinstance(value, Mapping):
        pairs = {name: _without_secrets(inner, f"{key}.{name}") for name, inner in value.items()}
        kept = {name: shown for name, (shown, _) in pairs.items()}
        return kept, [each for _, found in pairs.values() for each in found]
    if isinstance(value, list):
        several = [_without_secrets(inner, f"{key}.{i}") for i, inner in enumerate(value)]
        return [shown for shown, _ in several], [each for _, found in several for each in found]
    hidden = secret.masked_tree(value, key)
    if hidden != value:
        return hidden, [value]
    if isinstance(value, str) and "=" in value and not value.startswith("-"):
        return _redact(value)
    return value, []


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, bool):
        yield value
