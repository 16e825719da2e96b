"""`score_teacher`: a teacher of another family than the student, for ADD's distillation term.

Nothing here imports torch.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf import DictConfig

from distill.config.trainer_keys import has_target
from distill.core import limits
from distill.storage import source_code
from distill.teachers.families import family

TEACHERS_KEY = re.compile(r"(?<!score_)\bteacher(?=[.=])")


def check_score_teacher(cfg: DictConfig, check_teacher: Callable[[DictConfig], None]) -> None:
    """Check the files of a score teacher by `check_teacher`, and that the method can use it."""
    node, method = cfg.get("score_teacher"), str(cfg.method._target_)
    if node is None:
        return
    if not has_target(node):
        what = "must be a teacher; choose one by score_teacher="
        raise ValueError(f"score_teacher={node}: {what}")
    if (facts := family(str(node["_target_"]))) is not None and (facts.image or facts.video):
        does = "makes videos" if facts.video else "reads pictures beside the caption"
        what = f"a {facts.kind_name()} {does}"
        raise ValueError(f"score_teacher: {what}; choose a text-to-image model")
    takes = source_code.attribute(method, "takes_score_teacher")
    limits.check_score_teacher(method.rpartition(".")[2], takes is True)
    weight, space = cfg.method.get("distill_weight", 1), cfg.method.get("distill_space", "pixels")
    limits.check_distillation(weight, space, cfg.method.get("crop"), across=True)
    with naming_it():
        check_teacher(node)


@contextmanager
def naming_it() -> Iterator[None]:
    """Within, errors about a teacher name the keys of `score_teacher`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise type(error)(TEACHERS_KEY.sub("score_teacher", str(error))) from None
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, ValueError | OSError):
            raise
        raise ValueError(TEACHERS_KEY.sub("score_teacher", str(cause))) from None
