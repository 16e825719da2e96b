"""Secrets of the command line as names of variables, since Hydra writes down what it is given.

It keeps every word: in multirun.yaml of a sweep, and below .hydra/ where `hydra.output_subdir` asks
for that. So it is given `${oc.env:DISTILL_TYPED_0}` in place of a value, which this process and
those that it starts have in their environment.
"""

import os
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString

from distill.commandline.quoting import GROUPS
from distill.config.typed import parse_override
from distill.terminal import secret


def with_variables(words: list[str]) -> list[str]:
    """The words with a variable in place of each secret, or text that holds one; the variables are
    set.

    A value that has an interpolation in it already stays, and so does a word that Hydra cannot
    read.
    """
    given: list[str] = []
    return [_word(word, given) for word in words]


def _word(word: str, given: list[str]) -> str:
    found = None if word.startswith("-") or "=" not in word else parse_override(word)
    key = found.key_or_group if found else ""
    if found is None or not found.value_type or key in GROUPS:
        return word
    before = len(given)
    if isinstance(found._value, ChoiceSweep):
        found._value.list = [_without(value, key, given) for value in found._value.list]
    else:
        found._value = _without(found._value, key, given)
    if len(given) == before:
        return word
    return f"{found.get_key_element()}={found.get_value_element_as_str()}"


def _without(value: Any, key: str, given: list[str]) -> Any:
    """The value at a dotted key, as Hydra has read it, without what is secret in it."""
    if isinstance(value, dict):
        return {name: _without(inner, f"{key}.{name}", given) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, f"{key}.{i}", given) for i, inner in enumerate(value)]
    plain = value.text if isinstance(value, QuotedString) else value
    if isinstance(plain, str) and ("${" in plain or not _is_secret(plain, key)):
        return value
    if not isinstance(plain, str) and secret.masked_tree(plain, key) == plain:
        return value
    variable = f"{secret.TYPED}{len(given)}"
    given.append(str(plain))
    os.environ[variable] = str(plain)
    named = f"${{oc.env:{variable}}}"
    named = named if isinstance(plain, str) else f"${{oc.decode:{named}}}"
    # In quotes, which a sweep keeps: Hydra would escape it for every job.
    return QuotedString(text=named, quote=Quote.single)


def _is_secret(text: str, key: str) -> bool:
    """Whether a text is one by its key, by a password of a URL, or by what it says: a word of
    another command.
    """
    return secret.masked_tree(text, key) != text or bool(secret.secrets_in_arguments([text]))
