"""Keys of the command line for the run that it resumes.

Hydra composes the default groups, and refuses keys that these lack. The groups of the run may have
them: `resume=<run of method=dmd2> method.fake_score_updates=5`.
"""

from typing import Any

from omegaconf import OmegaConf

from distill.commandline.quoting import GROUPS
from distill.config.compose import dotted, folder_of, read_unchecked
from distill.config.typed import parse_override


def accepted(arguments: list[str]) -> list[str]:
    """The arguments with keys that the run to resume has in a form that Hydra accepts: `key=value`
    as `++key=value`, and `~key` as `++key=null`. `continued` applies them to the run.

    Raises what `folder_of` raises if there is no such run.
    """
    known = keys_of_run(arguments)
    return [_accepted(argument, known) for argument in arguments] if known else arguments


def keys_of_run(arguments: list[str]) -> dict[str, Any]:
    """Dotted key -> value of the run that these arguments resume; {} if they resume none, or one a
    job.
    """
    for argument in arguments:
        override = parse_override(argument) if argument.startswith("resume=") else None
        if override is None or override.is_sweep_override():
            continue
        if isinstance(folder := override.value(), str):
            tree: Any = OmegaConf.to_container(
                read_unchecked(folder_of(folder)) or OmegaConf.create()
            )
            return dotted(tree)
    return {}


def _accepted(argument: str, known: dict[str, Any]) -> str:
    key, equals, _ = argument.partition("=")
    name = key.removeprefix("~")
    if name not in known or name in GROUPS or "." not in name:
        return argument
    if key == name:
        return f"++{argument}"
    return argument if equals else f"++{name}=null"
