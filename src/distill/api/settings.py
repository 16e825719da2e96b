"""The settings of a run, composed as the command composes them, and what its classes take of them.

Composing imports neither torch nor Lightning: a mistake in a word is refused in a second.
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
from distill.commandline.keys import check_known, check_own_keys
from distill.commandline.quoting import as_typed, for_hydra
from distill.config import compose as composing
from distill.config import typed, validate
from distill.config.defaults import with_defaults

RUN = "config"  # the name of the configuration of a run


@with_plain_errors
def compose(*words: str) -> DictConfig:
    """The settings of a run: `compose("method=ladd", "teacher=shapes", "trainer.max_steps=100")`.

    The words are those of `python -m distill.run`, and all that they leave open is as there. The
    settings can be changed afterwards, as `settings.optimizer.student.lr = 1e-4`.

    Raises:
        ValueError, OSError: for what the command would refuse, in the same sentence.
    """
    for word in words:
        if word.startswith("-"):
            raise ValueError(f"{word}: flags are of the command line; give words as key=value")
    typed.register_secrets(words)
    read = [for_hydra(as_typed(word), RUN) for word in words]
    loader = Composed(RUN, tuple(read)).loader
    with composing.options_of(loader):
        composed = loader.load_configuration(RUN, read, RunMode.RUN)
    with _known_to_hydra(composed):
        settings = composed.copy()
        with open_dict(settings):
            del settings["hydra"]
        typed.register_config_secrets(settings)
        settings = with_defaults(settings)
        _check(settings)
        settings.name = composing.name_of(settings)
    return settings


def _check(settings: DictConfig) -> None:
    if missing := sorted(OmegaConf.missing_keys(settings)):
        word = f"{missing[0]}=..."
        raise ValueError(f"{', '.join(missing)}: not given; add {word} to the command")
    check_known(settings, RUN)
    check_own_keys(settings, RUN)
    if settings.resume:
        what = "a run goes on by the command, python -m distill.run resume=..."
        raise ValueError(f"resume={settings.resume}: {what}; leave it out")
    validate.check_run(settings)


@contextmanager
def _known_to_hydra(composed: DictConfig) -> Iterator[None]:
    """Within: Hydra's own settings of this composition, of which defaults ask what was chosen."""
    instance = HydraConfig.instance()
    before, instance.cfg = instance.cfg, None
    try:
        instance.set_config(composed)
        yield
    finally:
        instance.cfg = before


@with_plain_errors
def arguments(settings: DictConfig, of: Literal["method", "trainer"] = "method") -> dict[str, Any]:
    """What a class takes of the settings, built: `LADD(players, **arguments(settings))`.

    Args:
        settings: from `compose`.
        of: `method`, for a method, its `loop` included; or `trainer`, for `lightning.Trainer`, with
            the precision that is best on this machine where the settings say auto.
    """
    from distill.config import build

    if of == "method":
        build.check_numbers(settings)
        built = composing.make(settings.method, "method")
        return {**built.keywords, "loop": build.loop_of(settings)}
    if of == "trainer":
        own = settings.copy()  # the precision is settled in place
        build.settle_precision(own)
        return dict(composing.make(own.trainer, "trainer").keywords)
    raise ValueError(f"of={of}: must be method or trainer")


def option(group: str, name: str, values: Mapping[str, Any]) -> DictConfig:
    """One option of a group with these values in place of its own, checked as a run's.

    Raises ValueError for a key that it does not take.
    """
    node = {**Composed(RUN, (f"{group}={name}",)).tree[group], **values}
    validate.check_keys(OmegaConf.create({group: node}))
    return OmegaConf.create(node)


@cache
def defaults_of(command: str) -> Mapping[str, Any]:
    """The keys of a command with their defaults: the one place where these stand."""
    return Composed(command).tree


def given(command: str, values: Mapping[str, Any]) -> DictConfig:
    """The keys of a command with these values; None leaves one as it is there."""
    chosen = {key: value for key, value in values.items() if value is not None}
    settings = OmegaConf.create({**defaults_of(command), **chosen})
    counts: dict[str, int] = {"steps": 1, "count": 1, "seed": 0}
    composing.check_counts(settings, {k: v for k, v in counts.items() if k in settings})
    return settings
