"""Arguments of the command line for Hydra's grammar: quote texts, and translate empty groups.

Hydra parses a value as number, list, function or node, and OmegaConf resolves `${...}` in it. But a
prompt, a name or a path is plain text. So texts are quoted here, and interpolations in them are
escaped, before Hydra parses them. The tables below list all keys of texts.
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
# Texts that are taken literally, with `null`, `~` and `${5}`: the model reads what was typed.
PROMPTS = {"prompt", "negative"}
# Literal texts too, except that `null` is no text.
LITERALS = {"method.negative"}
# Names and paths: `null` is no text, `~` is the home folder, and `${...}` refers to a key or a
# variable.
TEXTS = {
    "base", "callbacks.samples.prompts", "delta", "image", "lora", "mask", "metric",
    "metrics.reference", "name", "out", "parts", "prompts", "repo", "resume", "run", "run_dir",
    "runs", "score_teacher.vae", "score_teacher.weights", "student.init", "teacher.vae",
    "teacher.weights",
}  # fmt: skip
ENDS = (".path", ".taught_by", ".pretrained")  # ends of other keys that hold paths or names
# At these keys [...] is a list, unless a file has that name.
LISTS = {"prompts", "runs", "callbacks.samples.prompts"}
NOT_TEXTS = {"search": {"run"}}  # command -> keys that are not texts there, but a list of overrides
# Command -> its own keys that have the name of a group. Hydra would read the value as an option,
# unless it is a node: `teacher=x` is passed as `teacher={path: x}`.
AS_GROUPS = {"demo": {"teacher"}}
NOT_PATHS = {*PROMPTS, *LITERALS, "name", "callbacks.samples.prompts"}  # texts that are no paths

NOTHING = ("", "null", "none", "false", "no", "off")  # values that leave a group out
OPTIONAL = {  # command -> groups that may be left out
    "config": {
        "score_teacher",
        "metrics",
        "logger",
        "callbacks",
        "experiment",
        "debug",
        "recipe",
        "heads",
    },
    "evaluate": {"teacher"},
}
REFERENCE = re.compile(r"(\\*)\$\{\s*([\w.]*)\s*([:}.\[]?)")


def for_hydra(argument: str, config: str, *, sweep: bool = False) -> str:
    """Quote an argument for Hydra, for the command with the configuration `config`.

    Raises ValueError for a group that the command does not have, or that cannot be left out.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+")
    if argument.startswith("-"):
        return argument
    if name in AS_GROUPS.get(config, ()) and equals:
        return f"{name}={{path:{_as_path(value, config)}}}"
    if name.lstrip("~") in GROUPS:
        return _group(argument, config)
    if not equals:
        return argument
    if not name:
        raise ValueError(f"{argument}: has no key; write key=value")
    if is_text(name, config) and value.strip("'\"") == MISSING:
        what = "??? stands for a missing value"
        raise ValueError(f"{argument}: {what}; add another character or a space")
    if is_text(name, config):
        return _text(key, value, config, sweep=sweep)
    return _other(key, value, sweep=sweep)


def is_text(key: str, config: str) -> bool:
    """Whether this key holds text in the command of this configuration."""
    known = key in TEXTS | PROMPTS | LITERALS or key.endswith(ENDS)
    return known and key not in NOT_TEXTS.get(config, ())


def as_typed(argument: str) -> str:
    """`key=value` as it was typed. Python represents letters that the locale lacks as surrogates
    (PEP 383).

    Raises ValueError for a path with such letters: the file system would refuse it.
    """
    if re.search("[\udc80-\udcff]", argument) is None:
        return argument
    typed = os.fsencode(argument).decode("utf-8", "backslashreplace")
    key, _, value = typed.partition("=")
    if key.lstrip("+") in NOT_PATHS:
        return typed
    what = f"this locale, {sys.getfilesystemencoding()}, has no file of such a name"
    raise ValueError(f"{key}={value}: {what}; set PYTHONUTF8=1 in the environment")


def check_flags(arguments: list[str]) -> None:
    """Raise ValueError for an unknown flag, for which Hydra would print its usage."""
    if not any(argument.startswith("-") for argument in arguments):
        return
    parser = get_args_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if (
            argument.startswith("-")
            and equals
            and not any(known.startswith(flag) for known in flags)
        ):
            raise ValueError(f"{argument}: a key has no dashes; write {argument.lstrip('-')}")

    def refuse(message: str) -> None:
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = refuse  # type: ignore[method-assign,assignment]
    _, unknown = parser.parse_known_args(arguments)
    if named := next((argument for argument in unknown if argument.startswith("-")), None):
        refuse(f"{named}: no such flag{nearest(named, flags)}")


def flags_last(arguments: list[str]) -> list[str]:
    """The arguments with flags and their values after all overrides, as Hydra needs them."""
    known = get_args_parser()._option_string_actions
    keys: list[str] = []
    flags: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("-"):
            keys.append(argument)
            continue
        flags.append(argument)
        named = {action.dest: action for flag, action in known.items() if flag.startswith(argument)}
        action = known.get(argument) or (next(iter(named.values())) if len(named) == 1 else None)
        takes = action is not None and (action.nargs is None or action.nargs == "?")
        must = action is not None and action.nargs is None
        if takes and waiting and (must or not ("=" in waiting[0] or waiting[0].startswith("-"))):
            flags.append(waiting.pop(0))
        if action is not None and action.dest == "shell_completion" and waiting:
            flags.append(waiting.pop(0))  # install=bash
    return [*keys, *flags]


# -- texts -----------------------------------------------------------------------------------------


def _text(key: str, value: str, config: str, *, sweep: bool) -> str:
    """`key=value` quoted so that Hydra reads exactly this text; unchanged if it does so already."""
    argument, name = f"{key}={value}", key.lstrip("+")
    if value == "null" and name not in PROMPTS:
        return argument
    if name in LISTS and value.startswith("[") and value.endswith("]") and not _exists(value):
        return _list(key, value)
    found = parse_override(argument)
    if sweep and (found.is_sweep_override() if found else "," in value):
        return argument  # several values, one for each job
    read = found.value() if found and not found.is_sweep_override() else None
    in_quotes = found is not None and isinstance(found._value, QuotedString)
    typed, is_prompt = str(read) if in_quotes else value, name in PROMPTS | LITERALS
    if not is_prompt:
        typed = os.path.expanduser(typed)
    wanted = _literal(typed, config, prompt=is_prompt)
    return argument if isinstance(read, str) and read == wanted else f"{key}={_quoted(wanted)}"


def _as_path(value: str, config: str) -> str:
    """A path quoted for a node."""
    if value == "null":
        return value
    return _quoted(_literal(os.path.expanduser(value), config, prompt=False))


def _list(key: str, value: str) -> str:
    """A list of texts. Raises ValueError for one that cannot be read."""
    found = parse_override(f"{key}={value}")
    items = found.value() if found else None
    if key.lstrip("+") == "runs" and isinstance(items, list):
        return f"{key}={value}"  # of file patterns, where 2024 is one as well
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        hint = """write ["one","two"], each in quotes"""
        raise ValueError(f"{key}={value}: cannot be read as a list of texts; {hint}")
    return f"{key}=[{','.join(_quoted(escaped(text)) for text in items)}]"


def _other(key: str, value: str, *, sweep: bool) -> str:
    """An override of any other key: quoted if Hydra cannot parse it, except for unclosed lists and
    nodes.
    """
    argument = f"{key}={value}"
    if parse_override(argument) or value.startswith(("[", "{")) or (sweep and "," in value):
        return argument
    quoted = f"{key}={_quoted(os.path.expanduser(value))}"
    return quoted if parse_override(quoted) else argument


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _literal(text: str, config: str, *, prompt: bool) -> str:
    """The text with every `${` escaped; in a path, those that refer to a key or resolver stay."""
    if prompt:
        return escaped(text)

    def kept_or_escaped(found: re.Match[str]) -> str:
        escaped_by_user = len(found[1]) % 2
        refers = _refers(found[2], found[3], config)
        return found[0] if escaped_by_user or refers else escaped(found[0])

    return REFERENCE.sub(kept_or_escaped, text)


def _refers(name: str, mark: str, config: str) -> bool:
    """Whether `${name:...}` is a resolver, or `${name...}` a key of the command's configuration."""
    if mark == ":":
        return name in ("hydra", "now") or OmegaConf.has_resolver(name)
    return name.partition(".")[0] in {*own_keys(config), *groups(config)}


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


# -- groups ----------------------------------------------------------------------------------------


def _group(argument: str, config: str) -> str:
    """`group=option`, or the override that leaves the group out."""
    key, equals, value = argument.partition("=")
    name, has_groups = key.lstrip("+~"), groups(config)
    command = "a run" if config == "config" else config
    if name not in has_groups and name not in own_keys(config):
        near = nearest(name, [*has_groups, *own_keys(config)])
        raise ValueError(f"{argument}: {command} has no such key{near}; --help lists all")
    if name not in has_groups:
        if value.startswith("{"):
            return argument
        inner = next(iter(own_keys(config)[name]))
        raise ValueError(
            f"{argument}: has keys of its own; name one of them, as {name}.{inner}=..."
        )
    known = options(name)
    found = parse_override(argument) if equals and value not in known else None
    several = isinstance(found.value(), list) if found else False
    unnamed = found and isinstance(found.value(), int | float) and value.lower() not in NOTHING
    if unnamed or (several and name not in OPTIONAL.get(config, ())):
        what = f"takes the name of one option, there is {', '.join(known)}"
        raise ValueError(f"{argument}: {name} {what}")
    left_out = key.startswith("~") or (equals and value.strip().lower() in NOTHING)
    if not left_out or value in known:
        return argument.lstrip("+") if equals else argument
    if name in OPTIONAL.get(config, ()):  # before `none`: that of logger keeps metrics.csv
        return f"~{name}"
    if "none" in known:
        return f"{name}=none"
    what = f"{command} needs it; choose one by {name}=..."
    raise ValueError(f"{argument}: {what}, there is {', '.join(known)}")


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
    """The groups in the command's defaults list."""
    entries = [e for e in _file(config).get("defaults", []) if isinstance(e, dict)]
    named = [str(key).removeprefix("optional ") for entry in entries for key in entry]
    return [
        *dict.fromkeys(n for n in named if n in GROUPS),
        *(["discriminator"] * (config == "config")),
    ]
