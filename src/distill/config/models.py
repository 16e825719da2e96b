"""Load teachers, students and samplers for generating: from a run folder, or a known pipeline."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from distill import sampling
from distill.config.compose import config_of, make, shipped
from distill.machine import hardware
from distill.teachers.loading.locate import family_of, lineage, pipeline_folder
from distill.teachers.loading.reading import class_of, download, student_info
from distill.teachers.loading.sizes import of_pipeline
from distill.teachers.loading.weights import put_lora
from distill.terminal.console import note

# The advice in errors of a teacher to leave out a part, and what to do for a pipeline folder.
WITHOUT = re.compile(r"add teacher\.without=\[\S+\]")
IN_INDEX = "write [null, null] for it in model_index.json"


def sampler_of(run: str, student: Any) -> Any:
    """The few-step sampler of a run, or the one that matches the scheduler of a pipeline."""
    if node := (config_of(run, "sampler") or {}).get("sampler"):
        return make(node, "sampler")
    return sampling.sampler_of(student.pipeline)


def teacher_of(cfg: DictConfig, deferred: Sequence[str] = ()) -> Any:
    """The teacher. Components whose names start with one of `deferred` are read at first use."""
    more = {"deferred": list(deferred)} if deferred else {}
    return make(OmegaConf.create({**cfg.teacher, **more}), "teacher")


def resolve_dtype(dtype: str, path: str, kind: Any = None) -> str:
    """`dtype` itself. For auto: float32, or bfloat16 if the weights at `path` would take more than
    half of the memory.

    `path` is a pipeline folder, or a hub id, which is downloaded as a pipeline of class `kind`.
    """
    if dtype != "auto":
        return dtype
    if kind is not None and not Path(path).exists():
        path = download("run", path, kind.download, use_safetensors=True)
    needed = 4 * sum(of_pipeline(Path(path)).values())
    available = hardware.memory(hardware.device().type)
    if needed <= available / 2:
        return "float32"
    note(
        f"dtype: bfloat16, since in float32 the weights take {needed / 1e9:.1f} of"
        f" {available / 1e9:.1f} GB"
    )
    return "bfloat16"


def teacher_of_student(run: str, dtype: str = "float32") -> Any | None:
    """The teacher of a run folder, or the pipeline whose components a shipped student shares; None
    if there is none.
    """
    if config := config_of(run, "teacher"):
        dtype = resolve_dtype(dtype, str(pipeline_folder(Path(run))))
        return make(OmegaConf.create({**config.teacher, "dtype": dtype}), "teacher")
    _, *bases = lineage(pipeline_folder(Path(shipped(run))))
    return student_of(str(bases[0]), dtype) if bases else None


def student_of(
    run: str,
    dtype: str = "float32",
    lora: str | None = None,
    lora_scale: float = 1.0,
    *,
    key: str = "run",
) -> Any:
    """The student of a run folder, or a pipeline of a known family, as one of our adapters.

    `run` is a folder or a hub id, and `key` its setting; for `dtype` see `resolve_dtype`. A `lora`
    times `lora_scale` is added to its weights: see `weights.put_lora`.
    """
    folder = pipeline_folder(Path(shipped(run)))
    path = str(folder) if folder.exists() else run
    family = family_of(class_of(path, key), run, key)
    adapter = get_object(family)
    dtype = resolve_dtype(dtype, path, adapter.kind)
    node = {"_target_": family, "path": path, "dtype": dtype}
    chosen = student_info(path)["options"]
    keys = [f"teacher.{key}" for key in adapter.family_keys]
    if keys and (config := config_of(run, *keys)):
        chosen |= config.teacher  # options of the family are as in the run
    node |= {key: chosen[key] for key in adapter.family_keys if key in chosen}
    try:
        found = make(OmegaConf.create(node), "teacher")
    except InstantiationException as error:
        # The message names teacher.path and teacher.dtype; the user has typed `key` and dtype.
        if isinstance(error.__cause__, (ValueError, OSError)):
            message = str(error.__cause__).replace(f"teacher.path={path}", f"{key}={run}")
            message = message.replace("teacher.dtype=", "dtype=")
            raise ValueError(WITHOUT.sub(IN_INDEX, message)) from None
        raise
    if lora:
        put_lora(found.pipeline, lora, lora_scale)
    return found
