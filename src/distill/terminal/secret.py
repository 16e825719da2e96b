"""Secrets: recognise keys that hold one, and mask their values in text.

    token  password  passphrase  secret  credential  auth  api_key  accessKey  authorization ...

A command registers secret values (`register`) and arguments (`register_argument`). From then on its
log, its errors and its files have *** in their place. An argument that names an environment
variable, `${oc.env:NAME}`, has no value and stays. In text that is not registered a pattern has to
guess where a value ends.
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
SECRETS = "DISTILL_SECRETS"  # the variable by which a command passes them to its processes
_NAME = re.compile(
    r"(?:.*_)?(?:(?:api|access|secret|private|auth|account)_?key|(?:api|access|auth|refresh)?token"
    r"|o?auth|authorization|bearer|cookie|pwd"
    r"|(?:pass(?:word|wd|phrase)|secret|credential)s?)|key"
)
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|-")  # word breaks in apiKey
# `key=value` and `key: value`, unless the value is `${...}` or starts a node or a list.
_ASSIGNED = re.compile(
    r"([\w./@+~-]+)(['\"]?\s*[=:]\s*)(?!['\"]?\$\{)"
    r"(\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'"
    r"|(?:(?:Basic|Bearer|Token)\s+)?[^\s,;&'\"{}\[\]]+)"
)
# `//name:password@` of a URL, up to the last @. A password may hold a slash; `//host:8080/` is
# recognised by its number.
_SCHEME = r"(\b[A-Za-z][\w+.-]*://)"
_USER = re.compile(rf"{_SCHEME}(?:[^/\s'\"]+@|[^/\s'\"@:]*:(?!\d+/)[^\s'\"]*@)")
_QUERY = re.compile(r"([?&#;])([\w.-]+)=([^&#;\s'\"]+)")  # the query of a URL
_SIGNED = re.compile(r"(?:.*[-_])?(?:sig|signature)", re.IGNORECASE)
TYPED = "DISTILL_TYPED_"  # prefix of variables for typed secrets: commandline/secret_arguments.py
_REFERENCE = re.compile(rf"'?\$\{{(?:oc\.decode:\$\{{)?oc\.env:({TYPED}\d+)\}}+'?")
SHORTEST = 4  # ours: letters of a registered value; a shorter one would match in ordinary words
_registered: set[str] = set()
_shown_as: dict[str, str] = {}  # argument of the command line -> text to show


def is_secret(key: str) -> bool:
    """Whether a dotted key, or one of its parents, looks like that of a secret."""
    parts = key.lstrip("+~").split(".")
    return any(_NAME.fullmatch(_WORDS.sub("_", part).lower()) is not None for part in parts)


def secrets_in(tree: Any, key: str = "") -> dict[str, Any]:
    """Dotted key -> value of every secret in a plain tree, including URLs with a password."""
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
    """Whether this value is masked, or has a masked part."""
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
    """The text without users, passwords and tokens of URLs."""
    if "://" not in text:
        return text
    return _QUERY.sub(_masked_query, _USER.sub(rf"\1{MASK}@", text))


def _masked_query(match: re.Match[str]) -> str:
    secret = is_secret(match[2]) or _SIGNED.fullmatch(match[2])
    return f"{match[1]}{match[2]}={MASK}" if secret else match[0]


def register(values: Mapping[str, Any]) -> None:
    """Mask these values, as `secrets_in` returns them, in everything this process prints.

    Also if they are quoted as in Python, JSON, YAML, HTML, a shell or a URL.
    """
    texts = list(map(str, values.values()))
    for text in [*texts, *(part for whole in texts for part in _parts(whole))]:
        quotes = (text.replace("'", other) for other in ("''", "\\'", "'\"'\"'"))
        coded = (json.dumps(text)[1:-1], repr(text)[1:-1], html.escape(text), quote(text, safe=""))
        _registered.update(form for form in (text, *quotes, *coded) if len(form) >= SHORTEST)


@contextmanager
def scoped() -> Iterator[None]:
    """Forget at the end what was registered inside, for another command in this process."""
    known, shown = set(_registered), dict(_shown_as)
    try:
        yield
    finally:
        _registered.clear()
        _registered.update(known)
        _shown_as.clear()
        _shown_as.update(shown)


def _parts(text: str) -> list[str]:
    """The users, passwords and tokens in a URL."""
    if "://" not in text:
        return []
    users = [match[0].removeprefix(match[1])[:-1] for match in _USER.finditer(text)]
    tokens = [match[3] for match in _QUERY.finditer(text) if _masked_query(match) != match[0]]
    return [*users, *(user.partition(":")[2] for user in users), *tokens]


def register_argument(argument: str, shown: str) -> None:
    """Show an argument of the command line as `shown` wherever the command line is printed."""
    _shown_as[argument] = shown


def redacted(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line with masked secrets."""
    return [_shown_as[text] if text in _shown_as else masked(text) for text in arguments]


def secrets_in_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Key -> value of the secrets in `key=value` arguments, except references to variables."""
    found = {}
    for argument in arguments:
        for key, _, value in _ASSIGNED.findall(argument):
            if _is_secret_key(key):
                found[key.lstrip("+~")] = value.strip("\"'")
    return found


def masked(text: str) -> str:
    """The text with *** for registered values, values of secret keys, and passwords of URLs."""
    text = _REFERENCE.sub(MASK, text)
    # Registered values come first, since they are known completely; a pattern may find only a part.
    text = _masked_url(without_registered(text))
    text = _ASSIGNED.sub(lambda m: f"{m[1]}{m[2]}{MASK}" if _is_secret_key(m[1]) else m[0], text)
    return without_registered(text)


def resolved(argument: str) -> str:
    """An argument as it was typed, with the values of the variables that replace its secrets."""
    return _REFERENCE.sub(lambda m: os.environ.get(m[1], m[0]), argument)


def _is_secret_key(name: str) -> bool:
    """Whether a name before `=` or `:` in a text is a secret key; `key=value` is an example."""
    return is_secret(name) and name != "key"


def without_registered(text: str) -> str:
    """The text with *** for registered values."""
    for value in sorted(_registered, key=len, reverse=True):
        text = text.replace(value, MASK)
    return text
