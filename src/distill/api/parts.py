"""Build the teacher, data, student, players and trainer of a run, from settings or from objects.

Each function takes the settings of `compose`, and builds the same object as the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from distill.api.errors import with_plain_errors
from distill.api.settings import option
from distill.commandline.quoting import options
from distill.config import compose, validate

if TYPE_CHECKING:
    import lightning

    from distill.core.types import Players
    from distill.teachers.network import Network
    from distill.teachers.pipeline import PipelineTeacher
    from distill.training.data_module import DataModule


@with_plain_errors
def load_teacher(of: DictConfig | str | Path, **values: Any) -> PipelineTeacher:
    """Load a frozen teacher of any family.

    Args:
        of: settings; or the name of an option of `teacher`, such as sdxl; or a pipeline folder, a
            run folder or a hub id, whose files name the family.
        values: values for keys of the teacher, such as `dtype="bfloat16"`. Settings hold them
            already: do not give both.

    Raises:
        ValueError, OSError: if files are missing, or belong to another family.
    """
    from distill.config import models

    if isinstance(of, DictConfig):
        if values:
            key, value = next(iter(values.items()))
            what = "the settings hold the teacher's keys; give it to compose"
            raise ValueError(f"{key}={value}: {what}, as teacher.{key}={value}")
        return models.teacher_of(of)
    is_option = str(of) in options("teacher")
    node = option("teacher", str(of), values) if is_option else _node_of(str(of), values)
    validate.check_teacher(node)
    return models.teacher_of(OmegaConf.create({"teacher": node}))


def _node_of(path: str, values: dict[str, Any]) -> DictConfig:
    """The node of the teacher for a folder or hub id."""
    from distill.teachers.loading.locate import family_of, pipeline_folder
    from distill.teachers.loading.reading import class_of

    validate.check_model(path, "teacher.path")
    folder = pipeline_folder(Path(compose.shipped(path)))
    location = str(folder) if folder.exists() else path
    node = {"_target_": family_of(class_of(location), path), "path": location, **values}
    validate.check_keys(OmegaConf.create({"teacher": node}))
    return OmegaConf.create(node)


@with_plain_errors
def load_data(settings: DictConfig, teacher: PipelineTeacher) -> DataModule:
    """Open the data of the settings for `trainer.fit(method, data)`: pictures, latents or captions.

    Raises:
        ValueError, OSError: if the data are missing, or this teacher cannot use them.
    """
    from distill.config import build
    from distill.training.data_module import DataModule

    source = build.data_of(settings)
    build.check_and_fit(settings, source.dataset, teacher)
    return DataModule(source, seed=settings.seed)


@with_plain_errors
def make_student(settings: DictConfig, teacher: PipelineTeacher) -> Network:
    """Build the student: a copy of the teacher's network (`student=full`), adapters on it
    (`student=lora`), or a GAN's generator from nothing (`student=stylegan`).

    This seeds the global generators of torch, NumPy and Python with `settings.seed`, as the command
    does at this point. For the same initial weights, call `make_players` next.
    """
    from distill.config import build

    build.seed(settings)
    return build.student_of(settings, teacher)


@with_plain_errors
def make_players(
    settings: DictConfig,
    teacher: PipelineTeacher,
    student: Any,
    *,
    features: Any = None,
    heads: Any = None,
    condition: Any = None,
) -> Players:
    """Combine teacher, student and discriminator.

    The discriminator has three parts. The settings give each part that is not passed here.

    Args:
        settings: their group `discriminator` gives the missing parts.
        teacher: frozen.
        student: the network to train, made from this teacher.
        features: a frozen feature network, such as `TeacherFeatures(teacher, taps="blocks")`.
        heads: a module; or a class or function, which is called with `channels` (name of a map ->
            its width) and `pooled` (width of the pooled text embedding).
        condition: gives the conditioning of the heads, in place of the teacher's embedding.

    Raises:
        ValueError: if the method needs latents and the discriminator works on pixels, or the
            reverse; if the student comes from a teacher of another family.
    """
    from distill.config import build

    _check_family(teacher, student)
    _check_space(settings, features)
    parts = {"features": features, "heads": heads, "condition": condition}
    return build.players_of(settings, teacher, student, **parts)


def _check_family(teacher: Any, student: Any) -> None:
    """Check that the student takes the teacher's latents and captions.

    The errors of torch would not name the reason.
    """
    from distill.students import FITTING
    from distill.students.stylegan import FITTING as OF_GENERATORS

    models = [getattr(network, "model", None) for network in (student, teacher.network)]
    if None in models:  # a user's network, whose configuration is unknown
        return
    of_student, of_teacher = ({"class": type(model).__name__, **model.config} for model in models)
    generates = getattr(student, "one_step", False)
    keys = OF_GENERATORS if generates else ("class", *FITTING[1:])
    for key in keys:
        if of_student.get(key) != of_teacher.get(key):
            values = (
                f"its {key} is {of_student.get(key)} and the teacher's is {of_teacher.get(key)}"
            )
            raise ValueError(f"student: {values}; make it from a teacher of the same family")


def _check_space(settings: DictConfig, features: Any) -> None:
    """Check that method and features work in the same space, as validate.check_space does."""
    from distill.core.limits import check_space
    from distill.storage import source_code

    if features is not None:
        wanted = source_code.attribute(str(settings.method._target_), "space")
        check_space(wanted, getattr(features, "space", None))


@with_plain_errors
def make_trainer(settings: DictConfig) -> lightning.Trainer:
    """Build the command's trainer, with a new run folder: `trainer.default_root_dir`.

    It writes `metrics.csv`, pictures in `samples/` and checkpoints; `callbacks` and `logger` of the
    settings control this. The folder is `run_dir`, or `runs/<date>_<name>` if that is not set. You
    can also use a plain trainer: `lightning.Trainer(**arguments(settings, "trainer"))`.

    Raises:
        ValueError, OSError: for settings that the trainer refuses, and for a folder that already
            holds a run.
    """
    from distill.config import build

    build.check(settings)
    copy = settings.copy()  # build.trainer sets the precision in place
    return build.trainer(copy, compose.run_folder(copy), {})
