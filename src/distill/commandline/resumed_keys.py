"""Keys of the command line for the run that it resumes.

Hydra composes the default groups, and refuses keys that these lack. The groups of the run may have
them: `resume=<run with data=images> data.max_bad_share=0.2`.
"""

from contextlib import suppress
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.commandline.quoting import GROUPS
from distill.config.compose import dotted, folder_of, read_unchecked
from distill.config.typed import parse_override


def accepted(arguments: list[str]) -> list[str]:
    """The arguments with keys that the run to resume has in a form that Hydra accepts: `key=value`
    as `++key=value`, and `~key` as `++key=null`. `continued` applies them to the run.
    """
    known = keys_of_run(arguments)
    return [_accepted(argument, known) for argument in arguments] if known else arguments


def keys_of_run(arguments: list[str]) -> dict[str, Any]:
    """Dotted key -> value of the run that these arguments resume; {} if they resume none that can
    be read, or one a job.
    """
    folder = _resumed(arguments)
    with suppress(OSError, ValueError):  # the command itself says what is wrong with the folder
        found = read_unchecked(folder_of(folder)) if folder else None
        tree: Any = OmegaConf.to_container(found) if found else {}
        return dotted(tree)
    return {}


def _resumed(arguments: list[str]) -> str | None:
    """The value of `resume`; None without one, with several, or if it refers to another key."""
    for argument in arguments:
        override = parse_override(argument) if argument.startswith("resume=") else None
        if override and not override.is_sweep_override():
            with suppress(OmegaConfBaseException):
                value = OmegaConf.create({"resume": override.value()}).resume  # without its escapes
                return value if isinstance(value, str) else None
    return None


def _accepted(argument: str, known: dict[str, Any]) -> str:
    key, equals, _ = argument.partition("=")
    name = key.removeprefix("~")
    if name not in known or name in GROUPS or "." not in name:
        return argument
    if key == name:
        return f"++{argument}"
    return argument if equals else f"++{name}=null"
