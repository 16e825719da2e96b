"""Mistakes of the user are printed as one sentence, with exit code 1 and without a traceback.

HYDRA_FULL_ERROR=1 shows the traceback.
"""

import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from yaml import YAMLError

from distill.commandline import resumed_keys
from distill.commandline.keys import check_composed
from distill.commandline.quoting import GROUPS, as_typed, check_flags, flags_last, for_hydra
from distill.commandline.secret_arguments import with_variables
from distill.commandline.sweep import Sweep
from distill.config import config_folders, typed
from distill.config.compose import dotted, nearest
from distill.config.location import CONF_DIR
from distill.machine import faults, signals
from distill.machine.ranks import rank
from distill.storage import renames
from distill.terminal import console, secret
from distill.terminal.shown import shown

# Errors that a user, a disk or a file can cause. Others, such as AttributeError, are bugs.
MISTAKES = (
    ValueError,
    OSError,
    FloatingPointError,
    HydraException,
    OmegaConfBaseException,
    YAMLError,
)
FULL = "HYDRA_FULL_ERROR"


def command(
    name: str, prepare: Callable[[DictConfig], DictConfig] = lambda cfg: cfg, hint: str = ""
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: turn a function of the configuration <name>.yaml into a command.

    The function returns the exit code. `prepare` sets defaults before missing keys are checked.
    `hint` says how to resume if the command is stopped; the function can set a better one with
    `faults.hint_on_failure`.

    Hydra prints errors itself, unless HYDRA_FULL_ERROR is set: then it raises. So the variable is
    set while Hydra composes, and restored before the function is called.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def main() -> None:
            full_errors, sweep = os.environ.get(FULL, "0"), Sweep()

            @functools.wraps(task)  # Hydra takes the command's name from it
            def job(cfg: DictConfig) -> None:
                with (
                    sweep.job(),
                    _full_errors(full_errors),
                    console.record_output(),
                    print_mistakes(),
                ):
                    typed.register_config_secrets(cfg)
                    cfg = prepare(cfg)
                    check_composed(cfg, name)
                    with faults.hint_on_failure(lambda: hint):
                        code = task(cfg)
                        signals.check()
                    if code or signals.received():  # a signal also ends the sweep
                        raise SystemExit(code)

            signals.end_with_parent()
            console.open_standard_streams()
            escape_unprintable()
            with _isolated(), stoppable(), console.tolerate_closed_pipes():
                typed.register_secrets(sys.argv[1:])
                with print_mistakes():
                    sys.argv[1:] = _checked_arguments(name, sweep)
                    if text := _help_or_completion(task, name):
                        print(text)
                        return
                with print_mistakes(), _full_errors("1"):
                    hydra.main(config_path=CONF_DIR, config_name=name, version_base="1.3")(job)()
                sweep.end()

        return main

    return decorate


@contextmanager
def _isolated() -> Iterator[None]:
    """Reset global state afterwards, for another command in the same process."""
    with secret.scoped():
        try:
            yield
        finally:
            HydraConfig.instance().cfg = None


def _checked_arguments(name: str, sweep: Sweep) -> list[str]:
    """The command line for Hydra: checked, flags last, texts quoted, without secrets."""
    _check_working_folder()
    arguments = [as_typed(argument) for argument in sys.argv[1:]]
    config_folders.check(arguments)
    arguments = flags_last(arguments)
    check_flags(arguments)
    quoted = [for_hydra(argument, name, sweep=sweep.asked) for argument in arguments]
    if name == "config":
        quoted = resumed_keys.accepted(quoted)
    typed.register_secrets(quoted)
    without_secrets = with_variables(quoted)
    sweep.typed = dict(zip(without_secrets, arguments, strict=True))
    return without_secrets


def _check_working_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        what = "the working folder does not exist any more; change into another, or into it again"
        raise FileNotFoundError(what) from None


def escape_unprintable() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _help_or_completion(task: Callable[[DictConfig], Any], config: str) -> str | None:
    """The help page or the completion script of the command, if its flags are given; else None."""
    from distill.completion import requested_shell, script

    if shell := requested_shell(sys.argv):
        return script(shell)
    if {"-h", "--help"}.isdisjoint(sys.argv):
        return None
    from distill.commandline.page import page

    module = task.__globals__
    command = module["__spec__"].name.rpartition(".")[2]
    return page(command, module["__doc__"], config, sys.argv[1:])


@contextmanager
def _full_errors(value: str) -> Iterator[None]:
    before, os.environ[FULL] = os.environ.get(FULL, "0"), value
    try:
        yield
    finally:
        os.environ[FULL] = before


@contextmanager
def stoppable() -> Iterator[None]:
    """Let a signal end the command with one sentence.

    The exit code is 128 plus its number, or 0 if SLURM requeues the job.
    """
    try:
        with signals.stop_on_signal():
            yield
    except signals.Stopped as stop:
        hint = getattr(stop, faults.HINT, "")
        if rank() == 0:
            print(f"distill: {stop}{f'; {hint}' if hint else ''}", file=sys.stderr)
        requeued = stop.number == signals.REQUEUE and signals.requeue()
        raise SystemExit(0 if requeued else 128 + stop.number) from None


@contextmanager
def print_mistakes() -> Iterator[None]:
    """Print a mistake of the user as `distill: <sentence>` on stderr; bugs keep their traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # for `tolerate_closed_pipes`
    except Exception as error:
        signals.check(error)
        if wants_traceback() or not is_mistake(error):
            raise
        console.log_failure(error)
        text = shown(secret.masked(sentence(error)))
        print(f"distill: {text}", file=sys.stderr)
        end = SystemExit(1)
        end.add_note(text)  # `Sweep` lists it among the failed jobs
        raise end from None


def wants_traceback() -> bool:
    """Whether the user wants tracebacks."""
    return os.environ.get(FULL) == "1"


def is_mistake(error: BaseException) -> bool:
    """Whether a user, a file or the machine caused this error, so that a sentence is enough."""
    cause = _root_cause(error)
    # Lightning's class for wrong settings, by its name: importing it takes seconds.
    known = isinstance(cause, MISTAKES) or type(cause).__name__ == "MisconfigurationException"
    return known or faults.sentence(error, cause) is not None


def sentence(error: BaseException) -> str:
    """The error as one line: what is wrong, where, and what to do."""
    cause = _root_cause(error)
    if text := faults.sentence(error, cause):
        return text
    if isinstance(cause, MissingConfigException) and cause.options is not None:
        group, _, option = str(cause.missing_cfg_file).rpartition("/")
        return (
            f"{group}={option}: no such option{nearest(option, cause.options)}; there is"
            f" {', '.join(cause.options)}"
        )
    if isinstance(cause, OverrideParseException):
        what = "cannot be read as" if "=" in cause.override else "is no"
        return (
            f"{cause.override}: {what} key=value; put quotes around a value with spaces or commas"
        )
    if isinstance(cause, OmegaConfBaseException):
        return " ".join(_key_sentence(error, cause).split())
    if isinstance(cause, UnicodeEncodeError) and isinstance(cause.object, str):
        remedy = "set PYTHONUTF8=1 in the environment, and give it as UTF-8"
        return f"{cause.object}: cannot be written in {cause.encoding}; {remedy}"
    if isinstance(cause, OSError) and cause.errno is not None and cause.strerror:
        return f"{f'{cause.filename}: ' if cause.filename else ''}{cause.strerror}"
    text = str(cause)
    if "Original Traceback" in text:
        # of a DataLoader worker: the message is the last line, after the exception's name
        text = text.strip().splitlines()[-1].partition(": ")[2]
    elif isinstance(cause, HydraException):
        text = _hydra_sentence(text)
    return " ".join(text.split())


def _hydra_sentence(text: str) -> str:
    """An error of Hydra about an argument of the command line, with what to type instead."""
    several = text.startswith(("Ambiguous value", "Sweep parameters"))
    found = re.search(r"'(.*)'" if several else r"'(.*?)'", text)
    quoted = found[1] if found else ""
    if several:
        key, _, value = quoted.partition("=")
        return (
            f"{quoted}: has a comma; write {key}=[{value}] for a list, or add -m to run once for"
            " each value"
        )
    if text.startswith("Could not append to config. An item is already at"):
        return f"+{quoted}: there is such a key already; leave the + out"
    if text.startswith("Cannot find primary config"):
        return f"--config-name={quoted}: there is no such configuration; leave it out"
    if text.startswith("Additional config directory"):
        return f"--config-dir={quoted}: there is no such folder; give the one that has experiment/"
    if text.startswith("Could not override"):
        return f"{quoted}: no such group{nearest(quoted, GROUPS)}; --help lists all"
    if found := re.match(r"In '(.+?)': \w+ raised while composing config:\s*(.*)", text):
        return _not_merged(found[1], found[2])
    if text.startswith("Could not delete"):
        return _not_deleted(quoted.removeprefix("defaults."), text)
    unquoted = re.search(r"'([\w./@]+)'", text)
    return text.rstrip(". ") + (nearest(unquoted[1], GROUPS) if unquoted else "")


def _not_merged(file: str, why: str) -> str:
    """A file sets a key in another form than an option beside it: a list and not a node."""
    words = [word for word in sys.argv[1:] if word.partition("=")[0] in GROUPS]
    beside = " ".join(word for word in words if word.replace("=", "/") != file)
    how = f"leave out {beside}" if beside else "mend the file"
    return f"{file}.yaml: does not fit {beside or 'the other options'} ({why}); {how}"


def _not_deleted(key: str, text: str) -> str:
    """Hydra deletes no key whose value is null, and says that it does not exist."""
    argument = next((word for word in sys.argv[1:] if word.startswith(f"~{key}")), f"~{key}")
    if "The value of" in text:
        return f"{argument}: it has another value; write ~{key}"
    if "." in key:
        return f"{argument}: there is no such key, or it is null already; leave this out"
    return f"{argument}: there is no such key{nearest(key, GROUPS)}; leave it out"


def _key_sentence(error: BaseException, cause: OmegaConfBaseException) -> str:
    """An error of OmegaConf about a key or an interpolation, with what to type instead."""
    message, key = str(cause).splitlines()[0], str(cause.full_key or "")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        if key in renames.KEYS:
            return f"{key}: is now called {renames.KEYS[key]}; write that"
        of_run = resumed_keys.keys_of_run(sys.argv[1:])
        others = [*_keys(cause), *of_run]
        near = nearest(key, [other for other in others if not f"{key}.".startswith(f"{other}.")])
        if isinstance(error, HydraException):
            if of_run:
                return f"{key}: no such key{near}; config.yaml of the run has all"
            if options := _options_with(key):
                return f"{key}: no such key here; {options}"
            return f"{key}: no such key{near}; --cfg job prints all"
        return f"{key}: not given; add {key}=..., or do not leave it out"
    typed_ones = [text for text in sys.argv[1:] if "${" in text and secret.TYPED not in text]
    argument = next(iter(typed_ones), key)
    if isinstance(cause, InterpolationKeyError):
        quoted = re.search(r"'(.*?)'", message)
        name = quoted[1] if quoted else ""
        what = f"there is no key {name}{nearest(name, _keys(cause))}"
        return f"{argument}: {what}; write \\${{{name}}} for the characters themselves"
    if isinstance(cause, GrammarParseError | UnsupportedInterpolationType):
        what = "is read as a reference to another key, and is none"
        return f"{argument}: ${{ {what}; write \\${{ for the characters themselves"
    if isinstance(cause, InterpolationResolutionError):
        return f"{argument}: {message}"
    return f"{key}: {message}" if key and key not in message else message


def _options_with(key: str) -> str:
    """The options of its group that have this key, as `metrics=shapes_edit has it`, or ""."""
    group, _, inner = key.partition(".")
    files = sorted(Path(CONF_DIR, group).glob("*.yaml")) if group in GROUPS and inner else []
    having = [
        f"{group}={file.stem}"
        for file in files
        if OmegaConf.select(OmegaConf.load(file), inner, default=MISSING) != MISSING
    ]
    return f"{', '.join(having)} {'have' if having[1:] else 'has'} it" if having else ""


def _keys(error: OmegaConfBaseException) -> list[str]:
    """All dotted keys of the configuration, and the groups: candidates for a misspelt key."""
    if error.parent_node is None:
        return GROUPS
    tree: Any = OmegaConf.to_container(error.parent_node._get_root(), resolve=False)
    if not str(error.full_key).startswith("hydra"):
        tree.pop("hydra", None)
    return [*GROUPS, *dotted(tree)]


def _root_cause(error: BaseException) -> BaseException:
    """The first exception of the chain: Hydra wraps exceptions of constructors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
