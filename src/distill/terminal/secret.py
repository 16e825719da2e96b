"""Values that are nobody else's: which keys look as if they held one, and text without them.

    token  password  passphrase  secret  credential  auth  api_key  accessKey  authorization ...

A command tells what it was given, whole values (`note`) and words of its command line
(`note_word`); from then on its log and its errors have *** in the value's place, as every file has
that it writes. A word of the command that names a variable of the environment, `${oc.env:NAME}`,
says no value and stays. Where a value ends is known of what was noted; in other text a pattern has
to guess.
"""

import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

MASK = "***"
SECRETS = "DISTILL_SECRETS"  # the variable by which a command hands them to its processes
_NAME = re.compile(
    r"(?:.*_)?(?:(?:api|access|secret|private|auth|account)_?key|(?:api|access|auth|refresh)?token"
    r"|o?auth|authorization|bearer|cookie|pwd"
    r"|(?:pass(?:word|wd|phrase)|secret|credential)s?)|key"
)
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-")  # between them: apiKey
# `key=value` and `key: value`, but not where the value is `${...}` or begins a node or a list.
_ASSIGNED = re.compile(
    r"([\w./@+~-]+)(['\"]?\s*[=:]\s*)(?!['\"]?\$\{)"
    r"(\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
    r"|(?:(?:Basic|Bearer|Token)\s+)?[^\s,;&'\"{}\[\]]+)"
)
# `//name:password@` of a URL, up to the last @ of the host's part. A password may hold a slash,
# after which `//host:8080/` is told by its number.
_SCHEME = r"(\b[A-Za-z][\w+.-]*://)"
_USER = re.compile(rf"{_SCHEME}(?:[^/\s'\"]+@|[^/\s'\"@:]*:(?!\d+/)[^\s'\"]*@)")
_QUERY = re.compile(r"([?&#;])([\w.-]+)=([^&#;\s'\"]+)")  # what follows the ? of a URL
_SIGNED = re.compile(r"(?:.*[-_])?(?:sig|signature)", re.IGNORECASE)
TYPED = "DISTILL_TYPED_"  # begins variables that stand for what was typed: commandline/private.py
_REFERENCE = re.compile(rf"'?\$\{{(?:oc\.decode:\$\{{)?oc\.env:({TYPED}\d+)\}}+'?")
SHORTEST = 4  # letters of a value that is looked for in text: a shorter one is in every other word
_registered: set[str] = set()
_shown_as: dict[str, str] = {}  # a word of the command line -> how it is shown


def is_secret(key: str) -> bool:
    """Whether a dotted key, or one that it lies below, looks as if it held a secret."""
    parts = key.lstrip("+~").split(".")
    return any(_NAME.fullmatch(_WORDS.sub("_", part).lower()) is not None for part in parts)


def secrets_in(tree: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value, of every secret in a plain tree; a URL with a password is one."""
    if isinstance(tree, Mapping):
        inner = [(f"{key}.{name}" if key else str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list):
        inner = [(f"{key}.{i}", value) for i, value in enumerate(tree)]
    else:
        return {key: tree} if _masked_value(key, tree) != tree else {}
    return {name: value for path, below in inner for name, value in secrets_in(below, path).items()}


def masked_tree(tree: Any, key: str = "") -> Any:
    """The same tree with *** in place of every secret."""
    if isinstance(tree, Mapping):
        return {
            name: masked_tree(value, f"{key}.{name}" if key else str(name))
            for name, value in tree.items()
        }
    if isinstance(tree, list):
        return [masked_tree(value, f"{key}.{i}") for i, value in enumerate(tree)]
    return _masked_value(key, tree)


def is_masked(value: Any) -> bool:
    """Whether this stands for a value that was not written, or holds one."""
    if not isinstance(value, str):
        return False
    return value == MASK or f"://{MASK}@" in value or ("://" in value and f"={MASK}" in value)


def _masked_value(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        return value
    if is_secret(key):
        return MASK
    return _masked_url(value) if isinstance(value, str) else value


def _masked_url(text: str) -> str:
    """Without the users, passwords and tokens of URLs."""
    if "://" not in text:
        return text
    return _QUERY.sub(_masked_query, _USER.sub(rf"\1{MASK}@", text))


def _masked_query(match: re.Match[str]) -> str:
    says = is_secret(match[2]) or _SIGNED.fullmatch(match[2])
    return f"{match[1]}{match[2]}={MASK}" if says else match[0]


def register(values: Mapping[str, Any]) -> None:
    """Have these values, as `found` gives them, left out of what this process says from here on.

    However they are quoted there: as in Python, JSON, YAML, HTML, a shell or a URL.
    """
    texts = list(map(str, values.values()))
    for text in [*texts, *(part for whole in texts for part in _parts(whole))]:
        quotes = (text.replace("'", other) for other in ("''", "\\'", "'\"'\"'"))
        coded = (json.dumps(text)[1:-1], repr(text)[1:-1], html.escape(text), quote(text, safe=""))
        _registered.update(form for form in (text, *quotes, *coded) if len(form) >= SHORTEST)


@contextmanager
def scoped() -> Iterator[None]:
    """Within, what is noted is a command's own: another one in this process begins without it."""
    known, said = set(_registered), dict(_shown_as)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(known)
        _shown_as.clear()
        _shown_as.update(said)


def _parts(text: str) -> list[str]:
    """Of a URL what it says of users, their passwords, and tokens."""
    if "://" not in text:
        return []
    users = [match[0].removeprefix(match[1])[:-1] for match in _USER.finditer(text)]
    asked = [match[3] for match in _QUERY.finditer(text) if _masked_query(match) != match[0]]
    return [*users, *(user.partition(":")[2] for user in users), *asked]


def register_argument(word: str, said: str) -> None:
    """Have a word of the command line shown as `said` wherever the command line is."""
    _shown_as[word] = said


def redacted(words: Sequence[str]) -> list[str]:
    """The words of a command line as they may be shown."""
    return [_shown_as[word] if word in _shown_as else masked(word) for word in words]


def secrets_in_arguments(words: Sequence[str]) -> dict[str, Any]:
    """What `key=value` words say of secrets, by their keys; no names of variables."""
    said = {}
    for word in words:
        for key, _, value in _ASSIGNED.findall(word):
            if _says_secret(key):
                said[key.lstrip("+~")] = value.strip("\"'")
    return said


def masked(text: str) -> str:
    """The text without what keys that look so are given, passwords of URLs, and what was noted."""
    text = _REFERENCE.sub(MASK, text)
    text = _masked_url(
        without_registered(text)
    )  # first what is known whole: a pattern may take a part of it
    text = _ASSIGNED.sub(lambda m: f"{m[1]}{m[2]}{MASK}" if _says_secret(m[1]) else m[0], text)
    return without_registered(text)


def resolved(word: str) -> str:
    """A word of the command as it was typed, with the values of the variables that stand in it."""
    return _REFERENCE.sub(lambda m: os.environ.get(m[1], m[0]), word)


def _says_secret(word: str) -> bool:
    """Whether a word before `=` or `:` in a text is such a key; `key=value` stands for any."""
    return is_secret(word) and word != "key"


def without_registered(text: str) -> str:
    """The text without the values that were noted."""
    for value in sorted(_registered, key=len, reverse=True):
        text = text.replace(value, MASK)
    return text
