"""Words of a command line as Hydra's grammar takes them: texts as they were typed, and groups that
are left out.

Hydra reads a value as numbers, lists, functions and nodes, and OmegaConf looks for `${...}` in it.
A prompt, a name and a path are none of that. So they are put into quotes here, and what would be an
interpolation is escaped, before Hydra sees them. Which keys are texts is said in the tables below,
and nowhere else.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import MISSING, OmegaConf

from distill.config.compose import nearest
from distill.config.location import CONF_DIR
from distill.config.paths import escaped
from distill.config.typed import parse_override

GROUPS = sorted(path.name for path in Path(CONF_DIR).iterdir() if path.is_dir())
# Texts that mean what they say, `null`, `~` and `${5}` included: what is typed is what the model
# reads.
PROMPTS = {"prompt", "negative"}
# Texts to which nothing in them refers either; `null` is none.
WORDS = {"method.negative"}
# Names and paths: `null` is none of them, `~` is the home folder, and `${...}` refers to a key or
# to a variable.
TEXTS = {
    "base", "callbacks.samples.prompts", "delta", "image", "metric",
    "metrics.reference", "name", "out", "parts", "prompts", "repo", "resume", "run", "run_dir",
    "runs", "student.init", "teacher.vae", "teacher.weights",
}  # fmt: skip
ENDS = (".path", ".taught_by", ".pretrained")  # of other keys that are paths or names
LISTS = {
    "prompts",
    "runs",
    "callbacks.samples.prompts",
}  # [...] is a list, unless a file is called so
NOT_TEXTS = {"search": {"run"}}  # command -> keys that are something else there: a list of words
# Command -> its own keys that are called as a group. Hydra would take the value for the name of an
# option, unless it is a node: `teacher=x` is handed over as `teacher={path: x}`.
AS_GROUPS = {"demo": {"teacher"}}
SPOKEN = {*PROMPTS, *WORDS, "name", "callbacks.samples.prompts"}  # texts that are no paths

NOTHING = ("", "null", "none", "false", "no", "off")  # what a group that is left out is said to be
OPTIONAL = {  # command -> groups that it can be without
    "config": {"metrics", "logger", "callbacks", "experiment", "debug", "recipe", "heads"},
    "evaluate": {"teacher"},
}
REFERENCE = re.compile(r"(\\*)\$\{\s*([\w.]*)\s*([:}.\[]?)")


def for_hydra(word: str, config: str, *, sweep: bool = False) -> str:
    """A word of the command whose configuration is `config`, as Hydra reads it rightly.

    Raises ValueError for a group that the command has not, or cannot be without.
    """
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    if word.startswith("-"):
        return word
    if name in AS_GROUPS.get(config, ()) and equals:
        return f"{name}={{path:{_as_path(value, config)}}}"
    if name.lstrip("~") in GROUPS:
        return _group(word, config)
    if not equals:
        return word
    if not name:
        raise ValueError(f"{word}: has no key; write key=value")
    if is_text(name, config) and value.strip("'\"") == MISSING:
        what = "three question marks alone stand for a value that is missing"
        raise ValueError(f"{word}: {what}; write another mark or a space with them")
    if is_text(name, config):
        return _text(key, value, config, sweep=sweep)
    return _other(key, value, sweep=sweep)


def is_text(key: str, config: str) -> bool:
    """Whether the values of this key are texts, in the command of this configuration."""
    known = key in TEXTS | PROMPTS | WORDS or key.endswith(ENDS)
    return known and key not in NOT_TEXTS.get(config, ())


def as_typed(word: str) -> str:
    """`key=value` as it was typed: where the locale has no such letters Python gives their bytes in
    disguise (PEP 383).

    Raises ValueError for a path of such letters: the file system would not take it.
    """
    if re.search("[\udc80-\udcff]", word) is None:
        return word
    typed = os.fsencode(word).decode("utf-8", "backslashreplace")
    key, _, value = typed.partition("=")
    if key.lstrip("+") in SPOKEN:
        return typed
    what = f"this locale, {sys.getfilesystemencoding()}, has no file of such a name"
    raise ValueError(f"{key}={value}: {what}; set PYTHONUTF8=1 in the environment")


def check_flags(words: list[str]) -> None:
    """Raise ValueError for a flag that Hydra does not have, in place of its page of usage."""
    if not any(word.startswith("-") for word in words):
        return
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for word in words:
        flag, equals, _ = word.partition("=")
        if word.startswith("-") and equals and not any(known.startswith(flag) for known in flags):
            raise ValueError(f"{word}: a key has no dashes; write {word.lstrip('-')}")

    def refuse(message: str) -> None:
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    _, unknown = parser.parse_known_args(words)
    if named := next((word for word in unknown if word.startswith("-")), None):
        refuse(f"{named}: no such flag{nearest(named, flags)}")


def flags_last(words: list[str]) -> list[str]:
    """The words with Hydra's flags, and what belongs to each, behind all keys: it wants them on one
    side.
    """
    known = get_args_parser()._option_string_actions
    keys: list[str] = []
    flags: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            keys.append(word)
            continue
        flags.append(word)
        named = {action.dest: action for flag, action in known.items() if flag.startswith(word)}
        action = known.get(word) or (next(iter(named.values())) if len(named) == 1 else None)
        takes = action is not None and (action.nargs is None or action.nargs == "?")
        must = action is not None and action.nargs is None
        if takes and waiting and (must or not ("=" in waiting[0] or waiting[0].startswith("-"))):
            flags.append(waiting.pop(0))
        if action is not None and action.dest == "shell_completion" and waiting:
            flags.append(waiting.pop(0))  # install=bash
    return [*keys, *flags]


# -- texts -----------------------------------------------------------------------------------------


def _text(key: str, value: str, config: str, *, sweep: bool) -> str:
    """A text as a word that Hydra reads as just that; as it was, where that is so already."""
    word, name = f"{key}={value}", key.lstrip("+")
    if value == "null" and name not in PROMPTS:
        return word
    if name in LISTS and value.startswith("[") and value.endswith("]") and not _exists(value):
        return _list(key, value)
    found = parse_override(word)
    if sweep and (found.is_sweep_override() if found else "," in value):
        return word  # several values, of which Hydra makes as many jobs
    read = found.value() if found and not found.is_sweep_override() else None
    in_quotes = found is not None and isinstance(found._value, QuotedString)
    typed, words = str(read) if in_quotes else value, name in PROMPTS | WORDS
    if not words:
        typed = os.path.expanduser(typed)
    wanted = _literal(typed, config, prompt=words)
    return word if isinstance(read, str) and read == wanted else f"{key}={_quoted(wanted)}"


def _as_path(value: str, config: str) -> str:
    """A path as it stands in a node."""
    if value == "null":
        return value
    return _quoted(_literal(os.path.expanduser(value), config, prompt=False))


def _list(key: str, value: str) -> str:
    """A list of texts. Raises ValueError for one that cannot be read."""
    found = parse_override(f"{key}={value}")
    items = found.value() if found else None
    if key.lstrip("+") == "runs" and isinstance(items, list):
        return f"{key}={value}"  # of patterns: 2024 is one as well
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        how = """write ["one","two"], each in quotes"""
        raise ValueError(f"{key}={value}: cannot be read as a list of texts; {how}")
    return f"{key}=[{','.join(_quoted(escaped(text)) for text in items)}]"


def _other(key: str, value: str, *, sweep: bool) -> str:
    """The value of any other key: what Hydra cannot read is a text, but for lists and nodes that
    are not closed.
    """
    word = f"{key}={value}"
    if parse_override(word) or value.startswith(("[", "{")) or (sweep and "," in value):
        return word
    quoted = f"{key}={_quoted(os.path.expanduser(value))}"
    return quoted if parse_override(quoted) else word


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _literal(text: str, config: str, *, prompt: bool) -> str:
    """A text in which no `${` is an interpolation; of a path those stay that refer to something."""
    if prompt:
        return escaped(text)

    def kept(found: re.Match[str]) -> str:
        by_hand = len(found[1]) % 2
        return found[0] if by_hand or _refers(found[2], found[3], config) else escaped(found[0])

    return REFERENCE.sub(kept, text)


def _refers(name: str, mark: str, config: str) -> bool:
    """Whether `${name:...}` or `${name...}` of a path is a resolver, or a key of the command's
    configuration.
    """
    if mark == ":":
        return name in ("hydra", "now") or OmegaConf.has_resolver(name)
    return name.partition(".")[0] in {*own_keys(config), *groups(config)}


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


# -- groups ----------------------------------------------------------------------------------------


def _group(word: str, config: str) -> str:
    """`group=option`, or what stands for a group that is left out."""
    key, equals, value = word.partition("=")
    name, has = key.lstrip("+~"), groups(config)
    command = "a run" if config == "config" else config
    if name not in has and name not in own_keys(config):
        near = nearest(name, [*has, *own_keys(config)])
        raise ValueError(f"{word}: {command} has no such key{near}; --help lists all")
    if name not in has:
        if value.startswith("{"):
            return word
        inner = next(iter(own_keys(config)[name]))
        raise ValueError(f"{word}: has keys of its own; name one of them, as {name}.{inner}=...")
    there = options(name)
    found = parse_override(word) if equals and value not in there else None
    several = isinstance(found.value(), list) if found else False
    unnamed = found and isinstance(found.value(), int | float) and value.lower() not in NOTHING
    if unnamed or (several and name not in OPTIONAL.get(config, ())):
        what = f"takes the name of one option, there is {', '.join(there)}"
        raise ValueError(f"{word}: {name} {what}")
    nothing = key.startswith("~") or (equals and value.strip().lower() in NOTHING)
    if not nothing or value in there:
        return word.lstrip("+") if equals else word
    if "none" in there:
        return f"{name}=none"
    if name in OPTIONAL.get(config, ()):
        return f"~{name}"
    what = f"{command} needs it; choose one by {name}=..."
    raise ValueError(f"{word}: {what}, there is {', '.join(there)}")


def options(group: str) -> list[str]:
    """The names of a group's options."""
    return sorted(path.stem for path in Path(CONF_DIR, group).glob("*.yaml"))


@cache
def _file(config: str) -> dict:
    file = Path(CONF_DIR, f"{config}.yaml")
    found: Any = (
        OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
    )
    return found


def own_keys(config: str) -> dict:
    """The keys of the command's own file, with their defaults."""
    return {key: value for key, value in _file(config).items() if key not in ("defaults", "hydra")}


def groups(config: str) -> list[str]:
    """The groups that the command's defaults list has."""
    entries = [e for e in _file(config).get("defaults", []) if isinstance(e, dict)]
    named = [str(key).removeprefix("optional ") for entry in entries for key in entry]
    return [
        *dict.fromkeys(n for n in named if n in GROUPS),
        *(["discriminator"] * (config == "config")),
    ]
