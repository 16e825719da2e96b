"""Compose the settings of a run as the command does, and build the arguments of classes from them.

Composing imports neither torch nor Lightning, so a mistake is reported within a second.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from distill.api.errors import with_plain_errors
from distill.commandline.composed import Composed
from distill.commandline.keys import check_composed
from distill.commandline.quoting import as_typed, for_hydra
from distill.config import compose as composing
from distill.config import typed, validate
from distill.config.defaults import with_defaults

RUN = "config"  # name of the run command's configuration


@with_plain_errors
def compose(*words: str) -> DictConfig:
    """Compose the settings of a run: `compose("method=ladd", "teacher=shapes", "seed=1")`.

    Each word is an argument of `python -m distill.run`. Other keys take the command's defaults. You
    can change the settings afterwards: `settings.optimizer.student.lr = 1e-4`.

    Raises:
        ValueError, OSError: for a mistake that the command would refuse, with the same sentence.
    """
    for word in words:
        if word.startswith("-"):
            raise ValueError(
                f"{word}: is a flag, and only the command line has flags; give key=value"
            )
    typed.register_secrets(words)
    overrides = [for_hydra(as_typed(word), RUN) for word in words]
    loader = Composed(RUN, tuple(overrides)).loader
    with composing.options_of(loader):
        composed = loader.load_configuration(RUN, overrides, RunMode.RUN)
    with _set_in_hydra(composed):
        settings = composed.copy()
        with open_dict(settings):
            del settings["hydra"]
        typed.register_config_secrets(settings)
        settings = with_defaults(settings)
        _check(settings)
        settings.name = composing.name_of(settings)
    return settings


def _check(settings: DictConfig) -> None:
    check_composed(settings, RUN)
    if settings.resume:
        what = "only the command resumes a run: python -m distill.run resume=..."
        raise ValueError(f"resume={settings.resume}: {what}; leave it out")
    validate.check_run(settings)


@contextmanager
def _set_in_hydra(composed: DictConfig) -> Iterator[None]:
    """Within: `HydraConfig` holds this composition. Defaults read the chosen options there."""
    instance = HydraConfig.instance()
    before, instance.cfg = instance.cfg, None
    try:
        instance.set_config(composed)
        yield
    finally:
        instance.cfg = before


@with_plain_errors
def arguments(settings: DictConfig, of: Literal["method", "trainer"] = "method") -> dict[str, Any]:
    """Build the keyword arguments of a class: `LADD(players, **arguments(settings))`.

    Args:
        settings: from `compose`.
        of: `method` for a method, including its `loop`; `trainer` for `lightning.Trainer`. With
            precision auto, the trainer gets the best precision for this machine. Its keys compile,
            matmul and channels_last become a callback, under `callbacks`, if one of them is set:
            add yours to this list, and do not give the trainer a second one.

    Raises:
        ValueError: for another `of`, and for a number that a class refuses.
    """
    from distill.config import build
    from distill.training.speed import speed_of

    if of == "method":
        build.check_numbers(settings)
        built = composing.make(settings.method, "method")
        return {**built.keywords, "loop": build.loop_of(settings)}
    if of == "trainer":
        copy = settings.copy()  # settle_precision changes its argument
        build.settle_precision(copy)
        options = dict(composing.make(copy.trainer, "trainer").keywords)
        faster = speed_of(options)
        return {**options, "callbacks": faster} if faster else options
    raise ValueError(f"of={of}: must be method or trainer")


def option(group: str, name: str, values: Mapping[str, Any]) -> DictConfig:
    """One option of a group, with these values in place of the defaults, checked like a run's.

    Raises ValueError for a key that the option does not take.
    """
    node = {**Composed(RUN, (f"{group}={name}",)).tree[group], **values}
    validate.check_keys(OmegaConf.create({group: node}))
    return OmegaConf.create(node)


@cache
def command_defaults(command: str) -> Mapping[str, Any]:
    """The keys of a command with their defaults, read from its configuration."""
    return Composed(command).tree


def command_settings(command: str, values: Mapping[str, Any]) -> DictConfig:
    """The settings of a command with these values; None takes the default.

    Raises ValueError for counts that are too small.
    """
    set_values = {key: value for key, value in values.items() if value is not None}
    settings = OmegaConf.create({**command_defaults(command), **set_values})
    minima: dict[str, int] = {"steps": 1, "count": 1, "seed": 0}
    composing.check_counts(settings, {k: v for k, v in minima.items() if k in settings})
    return settings
