"""Students: built from a teacher, and saved as ordinary diffusers pipelines."""

import json
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor, nn

from distill.machine.faults import first_line
from distill.storage.atomic import atomic_folder, remove
from distill.storage.bounded import mapping_of
from distill.storage.loaded_weights import check_all_loaded, check_finite
from distill.students.parts import cast, copy_part, copy_terms
from distill.teachers import schedulers
from distill.teachers.loading.locate import (
    BASE,
    GENERATOR,
    INDEX,
    STUDENT_INFO,
    check_part,
    denoiser_in,
    denoiser_part,
    home_of,
    index_of,
    lineage,
)
from distill.teachers.loading.reading import OURS, only_variant
from distill.teachers.loading.settings import KINDS, check_grid, prediction_of, refuse_quantised
from distill.teachers.loading.weights import about_weights, put_on, readable, write_weights
from distill.teachers.network import Network
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.shown import shown

# Settings that a student of another size shares with its teacher: its inputs and its prediction.
FITTING = (
    *("_class_name", "in_channels", "out_channels", "cross_attention_dim", "joint_attention_dim"),
    "text_dim",
    *(
        "pooled_projection_dim",
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
        "prediction_type",
    ),
)
OR_ELSE = "must be teacher, random, or"  # values of student.init other than a folder


def full(
    teacher: PipelineTeacher,
    *,
    init: str = "teacher",
    shift: int | None = None,
    checkpointing: bool = False,
) -> Network:
    """A network of the teacher's kind with its own weights, all trainable: the papers' student.

    `init` is teacher; random, for weights as the network's class initialises them; or a run or
    pipeline folder to start from, whose network may have another size. `shift` is NitroFusion's
    timestep shift, of 1,000; None takes that of `init`. With `checkpointing` the backward pass
    computes the activations of blocks again. Raises ValueError for options that do not fit.
    """
    if init not in ("teacher", "random"):
        model, own = _read(teacher, init)
        student = teacher.network.with_model(model).float().requires_grad_(True).train()
        student.rounds_up, student.draws = teacher.rounds_up, teacher.draws
        shift = own if shift is None else shift
    else:
        student = teacher.network.trainable_copy()
    if init == "random":
        student.model.load_state_dict(
            type(student.model).from_config(student.model.config).state_dict()
        )
    if checkpointing:
        student.enable_checkpointing()
    return shifted(student, shift)


def shifted(student: Network, shift: int | None) -> Network:
    """The student with NitroFusion's timestep shift, if one is given."""
    if shift is not None:
        if student.prediction == "flow" or not 0 < shift <= 1000:
            what = (
                "must lie in [1, 1000], and is for networks that predict eps or v on Stable"
                " Diffusion's schedule"
            )
            raise ValueError(f"student.shift={shift}: {what}")
        student.shift = shift
    return student


def _read(teacher: PipelineTeacher, init: str) -> tuple[Any, int | None]:
    """The denoiser in a run or pipeline folder, and its timestep shift.

    Raises ValueError unless it takes the teacher's latents and captions.
    """
    model, part = teacher.network.model, denoiser_in(init, "student.init", OR_ELSE)
    folder = part.parent
    file = folder / "scheduler" / "scheduler_config.json"  # holds the prediction type
    settings = mapping_of(file) if file.is_file() else {}
    config, own = dict(type(model).load_config(part)), dict(model.config)
    if settings:
        names = {prediction: name for name, prediction in KINDS.items()}
        config["prediction_type"] = names[prediction_of(settings, f"student.init={init}")]
        own["prediction_type"] = names[teacher.network.prediction]
    for key in FITTING:
        if (theirs := config.get(key, own.get(key))) != own.get(key):
            what = f"its {key} is {theirs} and the teacher's is {own.get(key)}"
            raise ValueError(
                f"student.init={init}: {what}; start from a pipeline of the teacher's family"
            )
    check_part(part, f"student.init={init}")
    refuse_quantised(config, f"student.init={init}: its {part.name}/")
    try:
        variant = only_variant(part, f"student.init={init}")
        found, report = type(model).from_pretrained(part, output_loading_info=True, variant=variant)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"student.init={init}: cannot be read ({first_line(error, 120)}); export it anew"
        ) from None
    # diffusers would initialise missing tensors at random
    check_all_loaded(report, f"student.init={init}: {part.name}/", type(model).__name__)
    check_finite(found, f"student.init={init}: {part.name}/")
    return found, settings.get("shifted_timestep")


def save_pipeline(
    student: Network,
    teacher: PipelineTeacher,
    folder: Path,
    scheduler: Any,
    sampler: Any = None,
) -> Path:
    """Write `folder` as a diffusers pipeline: the student's network, this scheduler, the teacher's
    other parts.

    Text encoders, tokenizers and autoencoder are copied as files, those that the index names in one
    precision: saving them again would rename weights (transformers 5). Those of a single file have
    no files of their own, and are saved. The index also holds the teacher's options, and the name
    and levels of the `sampler`, a `FewSteps`.
    """
    with atomic_folder(folder) as partial:
        _write_pipeline(student, teacher, partial, scheduler, sampler)
    return folder


def _write_pipeline(
    student: Network, teacher: PipelineTeacher, partial: Path, scheduler: Any, sampler: Any
) -> None:
    part = denoiser_part(teacher.folder) if teacher.folder else teacher.part
    if teacher.folder:
        left = {part, "scheduler", *teacher.without, *teacher.own_parts}
        index = _copied(teacher, partial, left)
    else:
        teacher.pipeline.save_pretrained(partial)
        index = index_of(str(partial))
        remove(partial / part)
    for name, home in teacher.own_parts.items():  # in place of the pipeline's
        remove(partial / name)
        copy_part(home, partial / name)
    model = student.model
    if student.adapters is not None:
        from distill.students.lora import merged  # peft is slow to import

        model = merged(student)
    if part == "unet":
        # The default size of diffusers' pictures; a transformer's positions may depend on it.
        model.register_to_config(sample_size=teacher.latent_shape[-1])
    model.save_pretrained(partial / part)
    _remove_local_path(partial / part / "config.json")
    scheduler.save_pretrained(partial / "scheduler")
    there = {name: pair for name, pair in index.items() if isinstance(pair, list)}
    absent = [name for name in there if not (partial / name).is_dir()]
    index |= {name: [None, None] for name in absent}  # left out, or not downloaded from the hub
    if student.one_step:
        index[part] = GENERATOR
    library = OURS if type(scheduler).__module__ == OURS else "diffusers"
    index["scheduler"] = [library, type(scheduler).__name__]
    index[STUDENT_INFO] = {"options": teacher.family_options(), "call": teacher.call_options()}
    if sampler is not None and not getattr(
        sampler, "few", True
    ):  # as its teacher, not of few steps
        call = teacher.guided_call(sampler.guidance)
        index[STUDENT_INFO] |= {"call": call, "many_steps": True}
    elif sampler is not None:
        levels = [1.0] if student.one_step else list(sampler.levels or ()) or None
        index[STUDENT_INFO]["sampler"] = {"name": type(sampler).__name__, "levels": levels}
        if sampler.shift is not None:  # the scheduler has its other settings
            index[STUDENT_INFO]["sampler"]["patch"] = sampler.shift.patch
    (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def replace_denoiser(model: nn.Module, folder: Path, dtype: str | None) -> None:
    """Write this model in place of the denoiser of the pipeline in `folder`; None leaves its
    dtype.
    """
    save_denoiser(model, folder)
    cast(folder / denoiser_part(folder), dtype)


def save_denoiser(model: nn.Module, folder: Path) -> None:
    """Write this model in place of the denoiser of the pipeline in `folder`, as it is."""
    part = denoiser_part(folder)
    remove(folder / part)
    model.save_pretrained(folder / part)
    _remove_local_path(folder / part / "config.json")


def _remove_local_path(config: Path) -> None:
    """Remove the path from which diffusers loaded the teacher: it is of this machine alone."""
    settings = mapping_of(config)
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copied(teacher: PipelineTeacher, target: Path, excluded: set[str]) -> dict[str, Any]:
    """Copy the parts that the index of the teacher's folder names, except `but`; returns the copy's
    index.
    """
    index = index_of(str(teacher.folder))
    target.mkdir(parents=True)
    for name, pair in index.items():
        home = Path(home_of(teacher.folder, name), name)
        if isinstance(pair, list) and pair[0] and name not in excluded and home.is_dir():
            copy_part(home, target / name, teacher.variant)
    for folder in reversed(lineage(teacher.folder)):
        copy_terms(folder, target)
    index.pop(BASE, None)  # all parts are here now
    return index


def save_delta(student: PipelineTeacher, base: PipelineTeacher, file: Path) -> Path:
    """Write student minus base in half precision, with the student's scheduler in the metadata."""
    ours, theirs = states(student.network.model, base.network.model)
    scheduler = student.pipeline.scheduler
    about = {"delta": type(scheduler).__name__, "scheduler": dict(scheduler.config)}
    return write_weights(
        {k: v - theirs[k] for k, v in ours.items()}, file, dtype="float16", about=about
    )


def states(student: nn.Module, base: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of both by name. Raises ValueError for networks of other shapes."""
    ours, theirs = student.state_dict(), base.state_dict()
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise ValueError(
            "base: its network has another shape than the student's; give base=<the teacher of the"
            " student>"
        )
    return ours, theirs


def apply_delta(base: PipelineTeacher, file: Path, folder: Path) -> Path:
    """Write a pipeline folder of `base` plus the delta, with the delta's scheduler."""
    with readable(f"delta={file}"):
        about = about_weights(file)
    if "delta" not in about:
        what = "not a file that distill.export to=delta wrote; give one"
        raise ValueError(f"delta={file}: {what}")
    scheduler = _scheduler_of(about, file)
    put_on(base.pipeline, str(file), "delta")
    return save_pipeline(base.network, base, folder, scheduler)


def _scheduler_of(about: dict[str, Any], file: Path) -> Any:
    """The scheduler that a delta names, which may be a stranger's."""
    name, settings = str(about["delta"]), about.get("scheduler")
    kind = getattr(schedulers, name, None) or getattr(diffusers, name, None)
    bases = (diffusers.SchedulerMixin, diffusers.ConfigMixin)
    if not isinstance(kind, type) or not all(issubclass(kind, base) for base in bases):
        what = f"names a scheduler {shown(name, 60)}, which diffusers does not have"
        raise ValueError(f"delta={file}: {what}; write it again by distill.export")
    # As text they would name a repository of the hub.
    if not isinstance(settings, dict):
        what = f"its scheduler's settings are {shown(settings, 60)}, and must be a mapping"
        raise ValueError(f"delta={file}: {what}; write it again by distill.export")
    check_grid(settings, f"delta={file}: its scheduler")
    try:
        return kind.from_config(settings)
    except Exception as error:  # settings of wrong types raise nearly anything
        what = f"its scheduler cannot be made ({first_line(error, 90)})"
        raise ValueError(f"delta={file}: {what}; write it again by distill.export") from None
