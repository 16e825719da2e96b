"""Students: made from a teacher, and left behind as ordinary diffusers pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from distill.teachers.network import Network, PipelineTeacher

LEFT_OUT = shutil.ignore_patterns("transformer", "unet", "scheduler", "*.md", "*.csv", ".git*", ".cache")


def full(teacher: PipelineTeacher, *, init: str = "teacher") -> Network:
    """A network of the teacher's size with weights of its own, all trainable: the papers' student.

    `init` is teacher, or random for weights as the network's class draws them. Raises ValueError for another word.
    """
    if init not in ("teacher", "random"):
        raise ValueError(f"student.init={init}: must be teacher or random")
    student = teacher.network.twin()
    if init == "random":
        fresh = type(student.model).from_config(student.model.config)
        student.model.load_state_dict(fresh.state_dict())
    return student


def save_pipeline(student: Network, teacher: PipelineTeacher, folder: Path, scheduler: Any) -> Path:
    """Write `folder` as a diffusers pipeline: the student's network, this scheduler, the teacher's other parts.

    Text encoders, tokenizers and autoencoder are copied as files: saving them again renames weights (transformers 5).
    """
    source = teacher.folder
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=LEFT_OUT)
    part = "transformer" if (source / "transformer").is_dir() else "unet"
    student.model.save_pretrained(partial / part)
    scheduler.save_pretrained(partial / "scheduler")
    index = json.loads((source / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)
