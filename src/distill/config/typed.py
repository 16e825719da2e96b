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


def note(words: Sequence[str]) -> None:
    """Have the secrets in these words left out of what this process says, and the words shown
    without them.
    """
    for word in words:
        shown, values = _looked_at(word)
        secret.note({str(i): value for i, value in enumerate(values)})
        secret.note_word(word, shown)


def note_all(cfg: DictConfig) -> None:
    """Have the secrets of a configuration left out of what this process says."""
    asked = secret.found(OmegaConf.to_container(cfg, resolve=False))
    secret.note({key: OmegaConf.select(cfg, key) for key in asked})
    with suppress(OmegaConfBaseException):  # what cannot be resolved is said by who wants it
        secret.note(secret.found(OmegaConf.to_container(cfg, resolve=True)))


def as_said(word: str) -> str:
    """The word with *** in place of its secrets."""
    return _looked_at(word)[0]


def _looked_at(word: str) -> tuple[str, list[Any]]:
    """The word as it may be shown, and the values of its secrets."""
    word = secret.restored(word)
    begins, sign, raw = word.partition("=")
    key = begins.lstrip("+~")
    if not sign or NAMED.fullmatch(raw):
        return word, []
    override = parsed(word)
    if secret.is_secret(key):
        value = _value(override) if override else None
        bare = raw.strip("'\"[]{} ")
        return f"{begins}={secret.HIDDEN}", [raw, bare, *_leaves(value)]
    found = list(secret.in_words([word]).values())
    value = _value(override) if override else raw
    hidden, values = _without(value, key)
    if not values:
        return secret.masked(word), found
    if isinstance(value, str):
        return secret.masked(word.replace(value, hidden)), [*values, *found]
    sweeps = override is None or isinstance(override._value, Sweep)
    text = secret.HIDDEN if sweeps else Override._get_value_element_as_str(hidden)
    return f"{begins}={text}", [*values, *found]


def parsed(word: str) -> Override | None:
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


def _without(value: Any, key: str) -> tuple[Any, list[Any]]:
    """The value without its secrets, and those; a text in a list may be a word itself, as in
    `search run=`.
    """
    if isinstance(value, Mapping):
        pairs = {name: _without(inner, f"{key}.{name}") for name, inner in value.items()}
        kept = {name: shown for name, (shown, _) in pairs.items()}
        return kept, [each for _, found in pairs.values() for each in found]
    if isinstance(value, list):
        several = [_without(inner, f"{key}.{i}") for i, inner in enumerate(value)]
        return [shown for shown, _ in several], [each for _, found in several for each in found]
    hidden = secret.hidden(value, key)
    if hidden != value:
        return hidden, [value]
    if isinstance(value, str) and "=" in value and not value.startswith("-"):
        return _looked_at(value)
    return value, []


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, bool):
        yield value
