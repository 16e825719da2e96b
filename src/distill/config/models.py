"""Teachers, students and samplers for a command that draws: of a run folder, or any pipeline of a
family we know.
"""

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
from distill.teachers.loading.locate import family_of, pipeline_folder
from distill.teachers.loading.reading import class_of, fetched, lineage, told_of
from distill.teachers.loading.sizes import of_pipeline
from distill.terminal.console import note

# What leaves a part of a teacher out, and the same for a folder that is read without a teacher's
# options.
WITHOUT = re.compile(r"add teacher\.without=\[\S+\]")
IN_INDEX = "write [null, null] for it in model_index.json"


def sampler_of(run: str, student: Any) -> Any:
    """The few-step sampler of a run, or the one that an exported pipeline's scheduler stands
    for.
    """
    if own := (config_of(run, "sampler") or {}).get("sampler"):
        return make(own, "sampler")
    return sampling.sampler_of(student.pipeline)


def teacher_of(cfg: DictConfig, deferred: Sequence[str] = ()) -> Any:
    """The teacher; parts of it whose names begin so are read only if they are asked for."""
    more = {"deferred": list(deferred)} if deferred else {}
    return make(OmegaConf.create({**cfg.teacher, **more}), "teacher")


def resolve_dtype(dtype: str, path: str, kind: Any = None) -> str:
    """`dtype` itself; for auto float32, and bfloat16 where the weights at `path` would take over
    half of the memory.

    `path` is a pipeline folder, or a hub id, which is fetched as a pipeline of class `kind`.
    """
    if dtype != "auto":
        return dtype
    if kind is not None and not Path(path).exists():
        path = fetched("run", path, kind.download, use_safetensors=True)
    needed = 4 * sum(of_pipeline(Path(path)).values())
    there = hardware.memory(hardware.device().type)
    if needed <= there / 2:
        return "float32"
    note(
        f"dtype: bfloat16, for in float32 the weights take {needed / 1e9:.1f} of"
        f" {there / 1e9:.1f} GB"
    )
    return "bfloat16"


def teacher_of_student(run: str, dtype: str = "float32") -> Any | None:
    """The teacher that a run folder names, or that a shipped student leaves its parts to; None
    where none is named.
    """
    if config := config_of(run, "teacher"):
        dtype = resolve_dtype(dtype, str(pipeline_folder(Path(run))))
        return make(OmegaConf.create({**config.teacher, "dtype": dtype}), "teacher")
    _, *bases = lineage(pipeline_folder(Path(shipped(run))))
    return student_of(str(bases[0]), dtype) if bases else None


def student_of(run: str, dtype: str = "float32") -> Any:
    """The student of a run folder, or any pipeline of a family we know, a folder or hub id, by our
    own adapter.

    `dtype` of its weights; auto is what `fitting_dtype` says.
    """
    folder = pipeline_folder(Path(shipped(run)))
    path = str(folder) if folder.exists() else run
    family = family_of(class_of(path), run)
    adapter = get_object(family)
    dtype = resolve_dtype(dtype, path, adapter.kind)
    node = {"_target_": family, "path": path, "dtype": dtype}
    chosen = told_of(path)["options"]
    own = [f"teacher.{key}" for key in adapter.own]
    if own and (config := config_of(run, *own)):
        chosen |= config.teacher  # what a family lets one choose is as in the run
    node |= {key: chosen[key] for key in adapter.own if key in chosen}
    try:
        return make(OmegaConf.create(node), "teacher")
    except InstantiationException as error:  # which names teacher.path, and nobody has typed that
        if isinstance(error.__cause__, (ValueError, OSError)):
            said = str(error.__cause__).replace(f"teacher.path={path}", f"run={run}")
            said = said.replace("teacher.dtype=", "dtype=")
            raise ValueError(WITHOUT.sub(IN_INDEX, said)) from None
        raise
