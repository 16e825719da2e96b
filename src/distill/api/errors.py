"""Turn mistakes of the user into exceptions that carry the sentence of the command."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from distill.config.errors import is_mistake, sentence

# Errors of the libraries; some of them also derive from ValueError or OSError.
LIBRARY_ERRORS = (HydraException, OmegaConfBaseException)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Within: errors of Hydra, OmegaConf and Lightning become a ValueError of one sentence.

    A plain ValueError or OSError passes unchanged, and so do bugs, which are no mistakes of the
    user.
    """
    try:
        yield
    except Exception as error:
        is_builtin = isinstance(error, (ValueError, OSError))
        is_plain = is_builtin and not isinstance(error, LIBRARY_ERRORS)
        if is_plain or not is_mistake(error):
            raise
        raise ValueError(sentence(error)) from None


def with_plain_errors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: the function runs within `plain_errors`."""

    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with plain_errors():
            return function(*args, **kwargs)

    return wrapper
