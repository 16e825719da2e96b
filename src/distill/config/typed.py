"""Overrides of the command line without their secrets. Hydra's parser finds key and value.

    register_secrets(["+logger.x.password='my own'"])  no log, file or error will show the value
    masked_override("+logger.x.password='my own'")     +logger.x.password=***

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

# A reference to a variable of the environment or another key, which holds no secret itself.
NAMED = re.compile(r"([\'\"]?)\$\{(oc\.env:)?[\w.]+\}\1")


def register_secrets(arguments: Sequence[str]) -> None:
    """Mask the secrets of these arguments in everything that this process prints or logs."""
    for argument in arguments:
        shown, values = _redact(argument)
        secret.register({str(i): value for i, value in enumerate(values)})
        secret.register_argument(argument, shown)


def register_config_secrets(cfg: DictConfig) -> None:
    """Mask the secrets of a configuration in everything that this process prints or logs."""
    keys = secret.secrets_in(OmegaConf.to_container(cfg, resolve=False))
    secret.register({key: OmegaConf.select(cfg, key) for key in keys})
    with suppress(OmegaConfBaseException):  # the code that uses the value reports the error
        secret.register(secret.secrets_in(OmegaConf.to_container(cfg, resolve=True)))


def masked_override(argument: str) -> str:
    """The argument with *** in place of its secrets."""
    return _redact(argument)[0]


def _redact(argument: str) -> tuple[str, list[Any]]:
    """The argument with masked secrets, and the values of its secrets."""
    argument = secret.resolved(argument)
    prefix, sign, raw = argument.partition("=")
    key = prefix.lstrip("+~")
    if not sign or NAMED.fullmatch(raw):
        return argument, []
    override = parse_override(argument)
    if secret.is_secret(key):
        value = _value(override) if override else None
        bare = raw.strip("'\"[]{} ")
        return f"{prefix}={secret.MASK}", [raw, bare, *_leaves(value)]
    found = list(secret.secrets_in_arguments([argument]).values())
    value = _value(override) if override else raw
    masked, values = _without_secrets(value, key)
    if not values:
        return secret.masked(argument), found
    if isinstance(value, str):
        return secret.masked(argument.replace(value, masked)), [*values, *found]
    sweeps = override is None or isinstance(override._value, Sweep)
    text = secret.MASK if sweeps else Override._get_value_element_as_str(masked)
    return f"{prefix}={text}", [*values, *found]


def parse_override(argument: str) -> Override | None:
    """The argument as Hydra parses it; None for a flag, or what Hydra cannot parse."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:  # Hydra itself reports it later
        return None


def _value(override: Override) -> Any:
    """The value of an override as plain data; for a choice sweep the list of its values."""
    value = override._value
    if isinstance(value, ChoiceSweep):
        return [Override._convert_value(each) for each in value.list]
    return None if isinstance(value, Sweep) else override.value()


def _without_secrets(value: Any, key: str) -> tuple[Any, list[Any]]:
    """The value with masked secrets, and the secrets.

    A text may be an override itself, as in `search run=[...]`.
    """
    if isinstance(value, Mapping):
        pairs = {name: _without_secrets(inner, f"{key}.{name}") for name, inner in value.items()}
        masked_node = {name: shown for name, (shown, _) in pairs.items()}
        return masked_node, [each for _, found in pairs.values() for each in found]
    if isinstance(value, list):
        several = [_without_secrets(inner, f"{key}.{i}") for i, inner in enumerate(value)]
        return [shown for shown, _ in several], [each for _, found in several for each in found]
    masked = secret.masked_tree(value, key)
    if masked != value:
        return masked, [value]
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
