"""A user's own mistake is said in one sentence, exit code 1, without a traceback;
HYDRA_FULL_ERROR=1 shows it all.
"""

import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
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

from distill.commandline.keys import check_known, check_own_keys
from distill.commandline.quoting import GROUPS, as_typed, check_flags, flags_last, for_hydra
from distill.commandline.secret_arguments import with_variables
from distill.commandline.sweep import Sweep
from distill.config import config_folders, typed
from distill.config.compose import dotted, nearest
from distill.config.location import CONF_DIR
from distill.machine import faults, signals
from distill.machine.ranks import rank
from distill.terminal import console, secret
from distill.terminal.shown import shown

# What a user, a disk or a file can cause. A missing attribute, a wrong type or the like is a bug of
# ours.
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
    """Decorator: a function of the configuration <name>.yaml becomes a command; what it returns is
    the exit code.

    `prepare` gives the configuration what it leaves open, before it is asked what is missing.
    `way_on` says how to go on with what was done, should it be stopped; the function may know
    better, by `faults.goes_on`.

    Hydra prints what it finds wrong in its own words, unless HYDRA_FULL_ERROR is set: then it
    raises. So the variable is set while Hydra composes, and what the user had there is put back
    before the function is called.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def main() -> None:
            asked, sweep = os.environ.get(FULL, "0"), Sweep()

            @functools.wraps(task)  # Hydra takes the command's name from it
            def job(cfg: DictConfig) -> None:
                with sweep.job(), _full_errors(asked), console.record_output(), print_mistakes():
                    typed.register_config_secrets(cfg)
                    cfg = prepare(cfg)
                    if missing := sorted(OmegaConf.missing_keys(cfg)):
                        raise ValueError(
                            f"{', '.join(missing)}: not given; add {missing[0]}=... to the command"
                        )
                    check_known(cfg, name)
                    check_own_keys(cfg, name)
                    with faults.hint_on_failure(lambda: hint):
                        code = task(cfg)
                        signals.check()
                    if code or signals.received():  # no other job of a sweep begins after a signal
                        raise SystemExit(code)

            signals.end_with_parent()
            console.open_standard_streams()
            escape_unprintable()
            with _isolated(), stoppable(), console.tolerate_closed_pipes():
                typed.register_secrets(sys.argv[1:])
                with print_mistakes():
                    sys.argv[1:] = _checked_arguments(name, sweep)
                    if text := _help_text(task, name):
                        print(text)
                        return
                with print_mistakes(), _full_errors("1"):
                    hydra.main(config_path=CONF_DIR, config_name=name, version_base="1.3")(job)()
                sweep.end()

        return main

    return decorate


@contextmanager
def _isolated() -> Iterator[None]:
    """Have nothing of this command be left for another one in the same process."""
    with secret.scoped():
        try:
            yield
        finally:
            HydraConfig.instance().cfg = None


def _checked_arguments(name: str, sweep: Sweep) -> list[str]:
    """The command line as Hydra is to have it: checked, flags last, texts quoted, no secret."""
    words = [as_typed(word) for word in sys.argv[1:]]
    config_folders.check(words)
    words = flags_last(words)
    check_flags(words)
    read = [for_hydra(word, name, sweep=sweep.asked) for word in words]
    typed.register_secrets(read)
    given = with_variables(read)
    sweep.typed = dict(zip(given, words, strict=True))
    return given


def escape_unprintable() -> None:
    """Have the terminal show what it has no letter for as an escape, instead of ending the
    command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _help_text(task: Callable[[DictConfig], Any], config: str) -> str | None:
    """The help page of the command whose module the function stands in, or what completes it, where
    one asks.
    """
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
    """Have a signal end what is inside in one sentence; exit code 128 plus its number, 0 where
    SLURM requeues.
    """
    try:
        with signals.stop_on_signal():
            yield
    except signals.Stopped as stop:
        way = getattr(stop, faults.HINT, "")
        if rank() == 0:
            print(f"distill: {stop}{f'; {way}' if way else ''}", file=sys.stderr)
        again = stop.number == signals.REQUEUE and signals.requeue()
        raise SystemExit(0 if again else 128 + stop.number) from None


@contextmanager
def print_mistakes() -> Iterator[None]:
    """Turn a mistake of the user into `distill: <sentence>` on stderr; anything else stays a bug
    with its traceback.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # `readers_may_leave`
    except Exception as error:
        signals.check(error)
        if wants_traceback() or not is_mistake(error):
            raise
        console.log_failure(error)
        said = shown(secret.masked(sentence(error)))
        print(f"distill: {said}", file=sys.stderr)
        end = SystemExit(1)
        end.add_note(said)  # for who lists what has failed
        raise end from None


def wants_traceback() -> bool:
    """Whether the user wants tracebacks."""
    return os.environ.get(FULL) == "1"


def is_mistake(error: BaseException) -> bool:
    """Whether this is the doing of a user, a file or the machine, so that a sentence says all there
    is to say.
    """
    cause = _root_cause(error)
    # Lightning's own class for settings that do not fit, by its name: to import it takes seconds
    known = isinstance(cause, MISTAKES) or type(cause).__name__ == "MisconfigurationException"
    return known or faults.sentence(error, cause) is not None


def sentence(error: BaseException) -> str:
    """What is wrong, where, and what to do, on one line."""
    cause = _root_cause(error)
    if said := faults.sentence(error, cause):
        return said
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
    if (
        "Original Traceback" in text
    ):  # a worker of the loader: the sentence comes last, after the exception's name
        text = text.strip().splitlines()[-1].partition(": ")[2]
    elif isinstance(cause, HydraException):
        text = _hydra_sentence(text)
    return " ".join(text.split())


def _hydra_sentence(text: str) -> str:
    """What Hydra finds wrong with a word of the command line, with what to type instead."""
    several = text.startswith(("Ambiguous value", "Sweep parameters"))
    found = re.search(r"'(.*)'" if several else r"'(.*?)'", text)
    named = found[1] if found else ""
    if several:
        key, _, value = named.partition("=")
        return (
            f"{named}: has a comma; write {key}=[{value}] for a list, or add -m to run once for"
            " each value"
        )
    if text.startswith("Could not append to config. An item is already at"):
        return f"+{named}: there is such a key already; leave the + out"
    if text.startswith("Cannot find primary config"):
        return f"--config-name={named}: there is no such configuration; leave it out"
    if text.startswith("Additional config directory"):
        return f"--config-dir={named}: there is no such folder; give the one that has experiment/"
    if text.startswith("Could not override"):
        return f"{named}: no such group{nearest(named, GROUPS)}; --help lists all"
    if text.startswith("Could not delete"):
        named = named.removeprefix("defaults.")
        return f"~{named}: there is no such key{nearest(named, GROUPS)}; leave it out"
    unquoted = re.search(r"'([\w./@]+)'", text)
    return text.rstrip(". ") + (nearest(unquoted[1], GROUPS) if unquoted else "")


def _key_sentence(error: BaseException, cause: OmegaConfBaseException) -> str:
    """What OmegaConf finds wrong with a key or an interpolation, with what to type instead."""
    said, key = str(cause).splitlines()[0], str(cause.full_key or "")
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        near = nearest(key, [known for known in _keys(cause) if known != key])
        if isinstance(error, HydraException):
            return f"{key}: no such key{near}; --cfg job prints all"
        return f"{key}: not given; add {key}=..., or do not leave it out"
    words = [word for word in sys.argv[1:] if "${" in word and secret.TYPED not in word]
    word = next(iter(words), key)
    if isinstance(cause, InterpolationKeyError):
        named = re.search(r"'(.*?)'", said)
        name = named[1] if named else ""
        what = f"there is no key {name}{nearest(name, _keys(cause))}"
        return f"{word}: {what}; write \\${{{name}}} for the characters themselves"
    if isinstance(cause, GrammarParseError | UnsupportedInterpolationType):
        what = "is read as a reference to another key, and is none"
        return f"{word}: ${{ {what}; write \\${{ for the characters themselves"
    if isinstance(cause, InterpolationResolutionError):
        return f"{word}: {said}"
    return f"{key}: {said}" if key and key not in said else said


def _keys(error: OmegaConfBaseException) -> list[str]:
    """Every dotted key that could have been meant: those of the configuration, and the groups."""
    if error.parent_node is None:
        return GROUPS
    tree: Any = OmegaConf.to_container(error.parent_node._get_root(), resolve=False)
    if not str(error.full_key).startswith("hydra"):
        tree.pop("hydra", None)
    return [*GROUPS, *dotted(tree)]


def _root_cause(error: BaseException) -> BaseException:
    """What went wrong first: Hydra wraps an exception of a constructor in one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
