"""Values that are nobody else's: which keys look as if they held one, and text without them.

    token  password  passphrase  secret  credential  auth  api_key  access_key ...

A command tells what it was given (`note`); from then on its log and its errors have *** in the
value's place, as every file has that it writes. A word of the command that names a variable of the
environment, `${oc.env:NAME}`, says no value and stays.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
SECRETS = "DISTILL_SECRETS"  # the variable by which a command hands them to its processes
_NAME = re.compile(
    r"(?:.*_)?(?:(?:api|access|secret|private|auth|account)_?key|token|auth"
    r"|(?:pass(?:word|wd|phrase)|secret|credential)s?)|key",
    re.IGNORECASE,
)
# `key=value` and `key: value`, but not where the value is `${...}` or begins a node or a list.
_ASSIGNED = re.compile(
    r"([\w./@+~-]+)(\s*[=:]\s*)(?!['\"]?\$\{)(\"[^\"]*\"|'[^']*'|[^\s,;'\"{}\[\]]+)"
)
_USER = re.compile(r"(\b[A-Za-z][\w+.-]*://)[^/\s@'\"]+@")  # `//name:password@` of a URL
TYPED = "DISTILL_TYPED_"  # begins variables that stand for what was typed: commandline/private.py
_REFERENCE = re.compile(rf"'?\$\{{(?:oc\.decode:\$\{{)?oc\.env:({TYPED}\d+)\}}+'?")
SHORTEST = 4  # letters of a value that is looked for in text: a shorter one is in every other word
_known: set[str] = set()


def is_secret(key: str) -> bool:
    """Whether a dotted key, or one that it lies below, looks as if it held a secret."""
    parts = key.lstrip("+~").split(".")
    return any(_NAME.fullmatch(part) is not None for part in parts)


def found(tree: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value, of every secret in a plain tree; a URL with a password is one."""
    if isinstance(tree, Mapping):
        inner = [(f"{key}.{name}" if key else str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list):
        inner = [(f"{key}.{i}", value) for i, value in enumerate(tree)]
    else:
        return {key: tree} if _hidden(key, tree) != tree else {}
    return {name: value for path, below in inner for name, value in found(below, path).items()}


def hidden(tree: Any, key: str = "") -> Any:
    """The same tree with *** in place of every secret."""
    if isinstance(tree, Mapping):
        return {
            name: hidden(value, f"{key}.{name}" if key else str(name))
            for name, value in tree.items()
        }
    if isinstance(tree, list):
        return [hidden(value, f"{key}.{i}") for i, value in enumerate(tree)]
    return _hidden(key, tree)


def is_hidden(value: Any) -> bool:
    """Whether this stands for a value that was not written."""
    return isinstance(value, str) and (value == HIDDEN or f"://{HIDDEN}@" in value)


def _hidden(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return value
    if is_secret(key):
        return HIDDEN
    return _USER.sub(rf"\1{HIDDEN}@", value) if isinstance(value, str) else value


def note(values: Mapping[str, Any]) -> None:
    """Have these values, as `found` gives them, left out of what this process says from here on."""
    _known.update(text for text in map(str, values.values()) if len(text) >= SHORTEST)


def in_words(words: list[str]) -> dict[str, Any]:
    """What `key=value` words say of secrets, by their keys; no names of variables."""
    said = {}
    for word in words:
        for key, _, value in _ASSIGNED.findall(word):
            if _says_secret(key):
                said[key.lstrip("+~")] = value.strip("\"'")
    return said


def masked(text: str) -> str:
    """The text without what keys that look so are given, passwords of URLs, and what was noted."""
    text = _ASSIGNED.sub(
        lambda m: f"{m[1]}{m[2]}{HIDDEN}" if _says_secret(m[1]) else m[0],
        _USER.sub(rf"\1{HIDDEN}@", _REFERENCE.sub(HIDDEN, text)),
    )
    return unsaid(text)


def restored(word: str) -> str:
    """A word of the command as it was typed, with the values of the variables that stand in it."""
    return _REFERENCE.sub(lambda m: os.environ.get(m[1], m[0]), word)


def _says_secret(word: str) -> bool:
    """Whether a word before `=` or `:` in a text is such a key; `key=value` stands for any."""
    return is_secret(word) and word != "key"


def unsaid(text: str) -> str:
    """The text without the values that were noted."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text
