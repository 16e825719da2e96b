"""Replace secrets of the command line by environment variables, since Hydra saves its arguments.

Hydra writes every argument to multirun.yaml of a sweep, and to .hydra/ with `hydra.output_subdir`.
So it gets `${oc.env:DISTILL_TYPED_0}` in place of a secret. This process and its child processes
have the value in their environment.
"""

import os
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString

from distill.commandline.quoting import GROUPS
from distill.config.typed import parse_override
from distill.terminal import secret


def with_variables(arguments: list[str]) -> list[str]:
    """The arguments with a variable in place of each secret or text that holds one; sets the
    variables.

    Values with an interpolation stay, and arguments that Hydra cannot parse.
    """
    values: list[str] = []
    return [_replaced(argument, values) for argument in arguments]


def _replaced(argument: str, values: list[str]) -> str:
    """The argument without secrets, whose values are appended to `values`."""
    is_override = "=" in argument and not argument.startswith("-")
    found = parse_override(argument) if is_override else None
    key = found.key_or_group if found else ""
    if found is None or not found.value_type or key in GROUPS:
        return argument
    before = len(values)
    if isinstance(found._value, ChoiceSweep):
        found._value.list = [_without(value, key, values) for value in found._value.list]
    else:
        found._value = _without(found._value, key, values)
    if len(values) == before:
        return argument
    return f"{found.get_key_element()}={found.get_value_element_as_str()}"


def _without(value: Any, key: str, values: list[str]) -> Any:
    """The value at a dotted key, as Hydra has parsed it, with variables in place of secrets."""
    if isinstance(value, dict):
        return {name: _without(inner, f"{key}.{name}", values) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, f"{key}.{i}", values) for i, inner in enumerate(value)]
    plain = value.text if isinstance(value, QuotedString) else value
    if isinstance(plain, str) and ("${" in plain or not _is_secret(plain, key)):
        return value
    if not isinstance(plain, str) and secret.masked_tree(plain, key) == plain:
        return value
    variable = f"{secret.TYPED}{len(values)}"
    values.append(str(plain))
    os.environ[variable] = str(plain)
    reference = f"${{oc.env:{variable}}}"
    if not isinstance(plain, str):
        reference = f"${{oc.decode:{reference}}}"
    # In quotes, which a sweep keeps: Hydra would escape an unquoted text for every job.
    return QuotedString(text=reference, quote=Quote.single)


def _is_secret(text: str, key: str) -> bool:
    """Whether a text is a secret by its key, is a URL with a password, or is an override with a
    secret.
    """
    return secret.masked_tree(text, key) != text or bool(secret.secrets_in_arguments([text]))
