"""What takes part in a distillation, made from the settings of a run or from objects of one's own.

Each function takes the settings that `compose` gives, and makes what the command would make of
them.
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
    """A frozen teacher of any family.

    Args:
        of: settings; or the name of an option of `teacher`, as sdxl; or a pipeline folder, a run
            folder or a hub id, whose family is read from its files.
        values: keys of the teacher with values of one's own, as `dtype="bfloat16"`; not with
            settings, which have them.

    Raises:
        ValueError, OSError: for files that are not there, or not of the family.
    """
    from distill.config import models

    if isinstance(of, DictConfig):
        if values:
            key, value = next(iter(values.items()))
            what = "the settings say it; give it to compose"
            raise ValueError(f"{key}={value}: {what}, as teacher.{key}={value}")
        return models.teacher_of(of)
    named = str(of) in options("teacher")
    node = option("teacher", str(of), values) if named else _read_from(str(of), values)
    validate.check_teacher(node)
    return models.teacher_of(OmegaConf.create({"teacher": node}))


def _read_from(path: str, values: dict[str, Any]) -> DictConfig:
    """The teacher's node for a folder or hub id."""
    from distill.teachers.loading.locate import family_of, pipeline_folder
    from distill.teachers.loading.reading import class_of

    validate.check_model(path, "teacher.path")
    folder = pipeline_folder(Path(compose.shipped(path)))
    found = str(folder) if folder.exists() else path
    node = {"_target_": family_of(class_of(found), path), "path": found, **values}
    validate.check_keys(OmegaConf.create({"teacher": node}))
    return OmegaConf.create(node)


@with_plain_errors
def load_data(settings: DictConfig, teacher: PipelineTeacher) -> DataModule:
    """The data of the settings for `trainer.fit(method, data)`: pictures, latents, or `shapes`.

    Raises:
        ValueError, OSError: for data that are not there, or that this teacher cannot read.
    """
    from distill.config import build
    from distill.training.data_module import DataModule

    source = build.data_of(settings)
    build.check_and_fit(settings, source.dataset, teacher)
    return DataModule(source, seed=settings.seed)


@with_plain_errors
def make_student(settings: DictConfig, teacher: PipelineTeacher) -> Network:
    """The student: a copy of the teacher's network (`student=full`), or adapters (`student=lora`).

    Seeds the global generators of torch, NumPy and Python with `settings.seed`, as a run does
    before it draws any weight. So make the players next.
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
    """Teacher, student, and the discriminator of the settings or, part by part, one's own.

    Args:
        settings: their group `discriminator` gives what is not given here.
        teacher: frozen.
        student: what is trained, of this teacher.
        features: a frozen feature network, as `TeacherFeatures(teacher, taps="blocks")`.
        heads: a module, or a class or function that is called with `channels`, name of a map ->
            its width, and with `pooled`, the width of the pooled text embedding.
        condition: what the heads are conditioned on in place of the teacher's embedding.

    Raises:
        ValueError: for a discriminator of pixels where the method reads latents and the like, and
            for a student of a teacher of another family.
    """
    from distill.config import build

    _check_family(teacher, student)
    _check_space(settings, features)
    own = {"features": features, "heads": heads, "condition": condition}
    return build.players_of(settings, teacher, student, **own)


def _check_family(teacher: Any, student: Any) -> None:
    """That the student reads the teacher's latents and captions: torch would say it in riddles."""
    from distill.students import FITTING

    models = [getattr(network, "model", None) for network in (student, teacher.network)]
    if None in models:  # a network of one's own
        return
    ours, theirs = ({"class": type(model).__name__, **model.config} for model in models)
    for key in ("class", *FITTING[1:]):
        if ours.get(key) != theirs.get(key):
            what = f"its {key} is {ours.get(key)} and the teacher's is {theirs.get(key)}"
            raise ValueError(f"student: {what}; make it of a teacher of the same family")


def _check_space(settings: DictConfig, features: Any) -> None:
    from distill.core.limits import check_space
    from distill.storage import source_code

    if features is not None:
        wanted = source_code.attribute(str(settings.method._target_), "space")
        check_space(wanted, getattr(features, "space", None))


@with_plain_errors
def make_trainer(settings: DictConfig) -> lightning.Trainer:
    """The command's trainer, in a run folder of its own: `trainer.default_root_dir`.

    It writes `metrics.csv`, pictures in `samples/` and checkpoints, as the settings' `callbacks`
    and `logger` say. The folder is `run_dir`, else `runs/<date>_<name>`. A plain trainer of
    Lightning does too: `lightning.Trainer(**arguments(settings, "trainer"))`.

    Raises:
        ValueError, OSError: for what the trainer cannot be, and a folder that holds a run already.
    """
    from distill.config import build

    build.check(settings)
    own = settings.copy()  # the precision is settled in place
    return build.trainer(own, compose.run_folder(own), {})
