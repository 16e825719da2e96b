"""Students: made from a teacher, and left behind as ordinary diffusers pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
from safetensors.torch import save_file

from distill.teachers import schedulers
from distill.teachers.network import Network, PipelineTeacher
from distill.teachers.weights import about_weights, put_on

OURS = "distill.teachers.schedulers"
LEFT_OUT = shutil.ignore_patterns("transformer", "unet", "scheduler", "*.md", "*.csv", ".git*", ".cache")


def full(teacher: PipelineTeacher, *, init: str = "teacher", shift: int | None = None) -> Network:
    """A network of the teacher's size with weights of its own, all trainable: the papers' student.

    `init` is teacher, random for weights as the network's class draws them, or a run or pipeline folder to begin from.
    `shift` is NitroFusion's timestep shift, of 1,000. Raises ValueError for what cannot be.
    """
    student = teacher.network.twin()
    if init == "random":
        student.model.load_state_dict(type(student.model).from_config(student.model.config).state_dict())
    elif init != "teacher":
        _load(student.model, init)
    if shift is not None:
        if student.prediction == "flow" or not 0 < shift <= 1000:
            what = "must lie in [1, 1000], and is for networks that predict eps or v on Stable Diffusion's schedule"
            raise ValueError(f"student.shift={shift}: {what}")
        student.shift = shift
    return student


def _load(model: Any, init: str) -> None:
    """The weights of the denoiser in a run or pipeline folder."""
    folder = pipeline_folder(Path(init))
    part = folder / denoiser_part(folder)
    if not part.is_dir():
        what = "must be teacher, random, or a run or pipeline folder with a unet/ or transformer/ in it"
        raise ValueError(f"student.init={init}: {what}")
    try:
        model.load_state_dict(type(model).from_pretrained(part).state_dict())
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"student.init={init}: other shapes than the teacher's ({str(error)[:120]})") from None


def pipeline_folder(run: Path) -> Path:
    """The student of a run folder; any other folder itself."""
    return run / "student" if (run / "student").is_dir() else run


def denoiser_part(folder: Path) -> str:
    """Which part of the pipeline in this folder denoises."""
    return "transformer" if (folder / "transformer").is_dir() else "unet"


def save_pipeline(student: Network, teacher: PipelineTeacher, folder: Path, scheduler: Any) -> Path:
    """Write `folder` as a diffusers pipeline: the student's network, this scheduler, the teacher's other parts.

    Text encoders, tokenizers and autoencoder are copied as files: saving them again renames weights (transformers 5).
    Those of a single file have no files of their own, and are saved.
    """
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    if teacher.folder:
        shutil.copytree(teacher.folder, partial, ignore=LEFT_OUT)
    else:
        teacher.pipeline.save_pretrained(partial)
    part = denoiser_part(teacher.folder or partial)
    shutil.rmtree(partial / part, ignore_errors=True)
    student.model.save_pretrained(partial / part)
    scheduler.save_pretrained(partial / "scheduler")
    index = json.loads((partial / "model_index.json").read_text())
    index["scheduler"] = [OURS if type(scheduler).__module__ == OURS else "diffusers", type(scheduler).__name__]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)


def save_delta(student: PipelineTeacher, base: PipelineTeacher, file: Path) -> Path:
    """Student minus base, in half precision, with the student's scheduler beside it."""
    ours, theirs = (teacher.network.model.state_dict() for teacher in (student, base))
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise ValueError(
            f"base={base.folder}: its network is not of the student's shape; give what the student was made from"
        )
    scheduler = student.pipeline.scheduler
    about = {"delta": type(scheduler).__name__, "scheduler": dict(scheduler.config)}
    save_file({k: (v - theirs[k]).half().contiguous() for k, v in ours.items()}, file, {"distill": json.dumps(about)})
    return file


def apply_delta(base: PipelineTeacher, file: Path, folder: Path) -> Path:
    """A pipeline folder of `base` plus the delta, with the delta's scheduler."""
    about = about_weights(file)
    if "delta" not in about:
        raise ValueError(f"delta={file}: not a file that distill.export to=delta wrote")
    put_on(base.pipeline, str(file))
    kind = getattr(schedulers, about["delta"], None) or getattr(diffusers, about["delta"], object)
    if not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"delta={file}: names a scheduler {about['delta']}, which diffusers does not have")
    return save_pipeline(base.network, base, folder, kind.from_config(about["scheduler"]))
