"""A user's own mistake is said in one sentence, exit code 1, without a traceback; HYDRA_FULL_ERROR=1 shows it all."""

import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from distill import console, faults, signals
from distill._conf import CONF_DIR
from distill.commandline.sweep import Sweep
from distill.compose import dotted, nearest
from distill.ranks import rank

# What a user, a disk or a file can cause. A missing attribute, a wrong type or the like is a bug of ours.
MISTAKES = (
    ValueError,
    OSError,
    FloatingPointError,
    HydraException,
    OmegaConfBaseException,
    YAMLError,
)
TEXTS = {
    "prompt",
    "prompts",
    "image",
    "out",
    "run",
    "runs",
    "run_dir",
    "resume",
    "name",
    "base",
    "delta",
}  # keys
WORDS = ("prompt", "name", "callbacks.samples.prompts")  # texts that are no paths
FULL = "HYDRA_FULL_ERROR"
GROUPS = sorted(path.name for path in Path(CONF_DIR).iterdir() if path.is_dir())
NO_OPTION = "Config group override must be"  # how Hydra's sentence begins, which names neither key nor value
UNRESOLVED = (
    "Error resolving interpolation"  # likewise, where a group decides which option another has
)
DECIDING = ("method", "teacher", "discriminator")  # such groups


def command(
    name: str, prepare: Callable[[DictConfig], DictConfig] = lambda cfg: cfg, way_on: str = ""
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: a function of the configuration <name>.yaml becomes a command; what it returns is the exit code.

    `prepare` gives the configuration what it leaves open, before it is asked what is missing. `way_on` says how to go
    on with what was done, should it be stopped; the function may know better, by `faults.goes_on`.

    Hydra prints what it finds wrong in its own words, unless HYDRA_FULL_ERROR is set: then it raises. So the variable
    is set while Hydra composes, and what the user had there is put back before the function is called.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def main() -> None:
            asked, sweep = os.environ.get(FULL, "0"), Sweep()

            @functools.wraps(task)  # Hydra takes the command's name from it
            def job(cfg: DictConfig) -> None:
                with sweep.job(), _full_errors(asked), console.recorded(), said_plainly():
                    cfg = prepare(cfg)
                    if missing := sorted(OmegaConf.missing_keys(cfg)):
                        raise ValueError(
                            f"{', '.join(missing)}: not given; add {missing[0]}=... to the command"
                        )
                    with faults.goes_on(lambda: way_on):
                        code = task(cfg)
                    if code or signals.asked():  # no other job of a sweep begins after a signal
                        raise SystemExit(code)

            signals.end_with_parent()
            print_any_letter()
            with stoppable(), console.readers_may_leave():
                with said_plainly():
                    sys.argv[1:] = [
                        readable(w, sweep=sweep.asked) for w in map(as_text, sys.argv[1:])
                    ]
                    if text := _said_of_itself(task, name):
                        print(text)
                        return
                with said_plainly(), _full_errors("1"):
                    hydra.main(config_path=CONF_DIR, config_name=name, version_base="1.3")(job)()
                sweep.end()

        return main

    return decorate


def print_any_letter() -> None:
    """Have the terminal show what it has no letter for as an escape, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def as_text(word: str) -> str:
    """`key=value` as it was typed: where the locale has no such letters Python gives their bytes in disguise (PEP 383).

    Raises ValueError for a path of such letters: the file system would not take it.
    """
    if re.search("[\udc80-\udcff]", word) is None:
        return word
    typed = os.fsencode(word).decode("utf-8", "backslashreplace")
    key, _, value = typed.partition("=")
    if key.lstrip("+") in WORDS:
        return typed
    what = f"this locale, {sys.getfilesystemencoding()}, has no file of such a name"
    raise ValueError(f"{key}={value}: {what}; set PYTHONUTF8=1 in the environment")


def _said_of_itself(task: Callable[[DictConfig], Any], config: str) -> str | None:
    """The help page of the command whose module the function stands in, or what completes it, where one asks."""
    from distill.completion import asked, script

    if shell := asked(sys.argv):
        return script(shell)
    if {"-h", "--help"}.isdisjoint(sys.argv):
        return None
    from distill.commandline.page import page

    module = task.__globals__
    command = module["__spec__"].name.rpartition(".")[2]
    return page(command, module["__doc__"], config, sys.argv[1:])


def readable(word: str, *, sweep: bool) -> str:
    """`key=value` as Hydra's grammar takes it: a text that it cannot read, or takes for no text, in its quotes."""
    parser, (key, equals, value) = OverridesParser.create(), word.partition("=")
    is_text = key.lstrip("+") in TEXTS or key.endswith(".path")
    if word.startswith("-") or not equals:
        return word
    with suppress(HydraException):
        found = parser.parse_override(word)
        share = value.startswith("\\\\")  # of a Windows network, of which Hydra drops one backslash
        if not is_text or not (
            share
            or isinstance(found.value(), (int, float))
            or (found.is_sweep_override() and not sweep)
        ):
            return word
    text = QuotedString(text=os.path.expanduser(value), quote=Quote.single)
    with suppress(HydraException):
        if (is_text or not value.startswith(("[", "{"))) and not (sweep and "," in value):
            parser.parse_override(quoted := f"{key}={text.with_quotes()}")
            return quoted
    return word


@contextmanager
def _full_errors(value: str) -> Iterator[None]:
    before, os.environ[FULL] = os.environ.get(FULL, "0"), value
    try:
        yield
    finally:
        os.environ[FULL] = before


@contextmanager
def stoppable() -> Iterator[None]:
    """Have a signal end what is inside in one sentence; exit code 128 plus its number, 0 where SLURM requeues."""
    try:
        with signals.heard():
            yield
    except signals.Stopped as stop:
        way = getattr(stop, faults.WAY_ON, "")
        if rank() == 0:
            print(f"distill: {stop}{f'; {way}' if way else ''}", file=sys.stderr)
        again = stop.number == signals.REQUEUE and signals.requeue()
        raise SystemExit(0 if again else 128 + stop.number) from None


@contextmanager
def said_plainly() -> Iterator[None]:
    """Turn a mistake of the user into `distill: <sentence>` on stderr; anything else stays a bug with its traceback."""
    try:
        yield
    except BrokenPipeError:
        raise  # `readers_may_leave`
    except Exception as error:
        if all_asked_for() or not is_mistake(error):
            raise
        console.failed(error)
        print(f"distill: {sentence(error)}", file=sys.stderr)
        end = SystemExit(1)
        end.add_note(sentence(error))  # for who lists what has failed
        raise end from None


def all_asked_for() -> bool:
    """Whether the user wants tracebacks."""
    return os.environ.get(FULL) == "1"


def is_mistake(error: BaseException) -> bool:
    """Whether this is the doing of a user, a file or the machine, so that a sentence says all there is to say."""
    cause = _root(error)
    # Lightning's own class for settings that do not fit, by its name: to import it takes seconds
    known = isinstance(cause, MISTAKES) or type(cause).__name__ == "MisconfigurationException"
    return known or faults.sentence(error, cause) is not None


def sentence(error: BaseException) -> str:
    """What is wrong, where, and what to do, on one line."""
    cause = _root(error)
    if said := faults.sentence(error, cause):
        return said
    if isinstance(cause, MissingConfigException) and cause.options is not None:
        group, _, option = str(cause.missing_cfg_file).rpartition("/")
        return f"{group}={option}: no such option{nearest(option, cause.options)}; there is {', '.join(cause.options)}"
    if isinstance(cause, OverrideParseException):
        return f"{cause.override}: cannot be read as key=value; put quotes around a value with spaces or commas"
    if str(cause).startswith(NO_OPTION) and (word := _unnamed_option(sys.argv[1:])):
        group = word.partition("=")[0]
        named = f"{group} takes the name of an option, there is {', '.join(_options(group))}"
        return f"{word}: {named}; ~{group} leaves it out"
    left_out = [word for word in sys.argv[1:] if word.removeprefix("~") in DECIDING]
    if str(cause).startswith(UNRESOLVED) and left_out:
        group = left_out[0].removeprefix("~")
        return f"{left_out[0]}: a run cannot be without; there is {', '.join(_options(group))}"
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and isinstance(
        error, HydraException
    ):
        return f"{cause.full_key}: no such key{nearest(str(cause.full_key), _keys(cause))}; --cfg job prints all"
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
    elif isinstance(cause, HydraException) and (named := re.search(r"'([\w./@]+)'", text)):
        text = text.rstrip(". ") + nearest(named[1], GROUPS)
    return " ".join(text.split())


def _unnamed_option(words: list[str]) -> str | None:
    """The first `group=value` whose value Hydra reads as something else than a name: null, false, a number."""
    parser = OverridesParser.create()
    for word in words:
        if word.partition("=")[0] in GROUPS and not isinstance(
            parser.parse_override(word).value(), (str, list)
        ):
            return word
    return None


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in Path(CONF_DIR, group).glob("*.yaml"))


def _keys(error: OmegaConfBaseException) -> list[str]:
    """Every dotted key that could have been meant: those of the configuration, and the groups."""
    tree = OmegaConf.to_container(error.parent_node._get_root(), resolve=False)
    if not str(error.full_key).startswith("hydra"):
        tree.pop("hydra", None)
    return [*GROUPS, *dotted(tree)]


def _root(error: BaseException) -> BaseException:
    """What went wrong first: Hydra wraps an exception of a constructor in one of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
