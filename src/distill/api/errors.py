"""Mistakes as a Python program meets them: the sentence of the command, as an exception."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from distill.config.errors import is_mistake, sentence

WRAPPING = (HydraException, OmegaConfBaseException)  # some of which are ValueErrors and OSErrors
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what Hydra, OmegaConf or Lightning make of a mistake into a ValueError of one sentence.

    ValueError and OSError pass as they are, and so does everything that is no mistake of the user.
    """
    try:
        yield
    except Exception as error:
        own = isinstance(error, (ValueError, OSError)) and not isinstance(error, WRAPPING)
        if own or not is_mistake(error):
            raise
        raise ValueError(sentence(error)) from None


def with_plain_errors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: the function raises as `plain_errors` has it."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with plain_errors():
            return function(*args, **kwargs)

    return called
