"""Students: made from a teacher, and left behind as ordinary diffusers pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

from distill.teachers.network import Network, PipelineTeacher

LEFT_OUT = shutil.ignore_patterns("transformer", "unet", "scheduler", "*.md", "*.csv", ".git*", ".cache")


def full(teacher: PipelineTeacher) -> Network:
    """A copy of the teacher's network with weights of its own, all of them trainable: the papers' student."""
    return teacher.network.twin()


def save_pipeline(student: Network, teacher: PipelineTeacher, folder: Path) -> Path:
    """Write `folder` as a diffusers pipeline: the student's network, a few-step scheduler, the teacher's other parts.

    Text encoders, tokenizers and autoencoder are copied as files: saving them again renames weights (transformers 5).
    """
    source = teacher.folder
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=LEFT_OUT)
    part = "transformer" if (source / "transformer").is_dir() else "unet"
    student.model.save_pretrained(partial / part)
    scheduler = few_step_scheduler(student, teacher)
    scheduler.save_pretrained(partial / "scheduler")
    index = json.loads((source / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return partial.rename(folder)


def few_step_scheduler(student: Network, teacher: PipelineTeacher) -> FlowMatchEulerDiscreteScheduler | LCMScheduler:
    """The stock scheduler that predicts x0 and noises it again, as the consistency sampler does.

    Flow: no shift, for the levels were trained as they are. eps and v: four original steps, so that 1, 2 and 4 steps
    begin at 999, (999, 499) and (999, 749, 499, 249).
    """
    if student.prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=True)
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    config = {key: value for key, value in teacher.pipeline.scheduler.config.items() if key in kept}
    return LCMScheduler(**config, original_inference_steps=4, clip_sample=False)
