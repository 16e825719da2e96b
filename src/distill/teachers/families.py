"""Families of pipelines: which class of ours reads which of diffusers', and what it says of them.

A family is one class, a `PipelineTeacher`. Commands need some facts about it before torch is
imported: these are plain values in its body, read from the source. A family in a user's own package
is found among the packages that the user trusts (`storage/trusted.py`). Nothing here imports a slow
library.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from distill.storage import source_code
from distill.storage.trusted import TRUST, roots

if TYPE_CHECKING:
    from distill.teachers.pipeline import PipelineTeacher

TEACHER = "distill.teachers.pipeline.PipelineTeacher"
BUILT_IN = {  # class of a pipeline -> what reads it
    "FluxPipeline": "distill.teachers.flux.Flux",
    "PixArtSigmaPipeline": "distill.teachers.pixart.PixArtSigma",
    "SanaPipeline": "distill.teachers.sana.Sana",
    "StableDiffusion3Pipeline": "distill.teachers.sd3.SD3",
    "StableDiffusionPipeline": "distill.teachers.sd.SD",
    "StableDiffusionXLPipeline": "distill.teachers.sdxl.SDXL",
}


class Family:
    """What a family says of its pipelines, whatever their weights. Each is a plain value in the
    body of a class, for it is read from the source as well.

    kind: the pipeline's class in diffusers; as read from the source, its name.
    unused: parts of the pipeline that are not read.
    spare: parts that it does without together, by `teacher.without`.
    autoencoder: diffusers' class of the autoencoder.
    upcasts: whether the pipeline decodes in float32 where an autoencoder in half precision would
        overflow.
    standardised: whether it reads `latents_mean` and `latents_std` of the autoencoder.
    packing: latents a side that the pipeline packs into one, of more channels, for the denoiser.
    usual_unit: of what number of pixels the sides of pictures must be multiples with the family's
        model on the hub; None where its models differ.
    flow: whether all its networks predict the flow of a rectified flow.
    addition_embed_type: as in the configuration of its UNet: what that is told besides captions.
    padded: tokenizers to whose own length captions are padded, as those of CLIP are.
    embedding_options: options of the family that change its caption embeddings.
    rounds_up: whether its image-to-image pipeline rounds steps up: see `limits.steps_left`.
    trailing: whether the pipeline steps at 1, 1 - 1/n, ..., 1/n unless it is told sigmas.
    single_file: how `export to=single_file` writes it: `pipeline`, whole and in the layout of
        Stable Diffusion's makers; `transformer`, that alone under diffusers' names; None: not.
    """

    kind: Any = None
    unused: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    autoencoder: str = "AutoencoderKL"
    upcasts: bool = False
    standardised: bool = False
    packing: int = 1
    usual_unit: int | None = None
    flow: bool = False
    addition_embed_type: str | None = None
    padded: tuple[str, ...] = ()
    embedding_options: tuple[str, ...] = ()
    rounds_up: bool = False
    trailing: bool = False
    single_file: Literal["pipeline", "transformer"] | None = None

    def kind_name(self) -> str:
        return self.kind if isinstance(self.kind, str) else str(self.kind.__name__)

    @classmethod
    def remarks(cls, call: Mapping[str, Any]) -> list[str]:
        """Sentences for a student's card on what diffusers' pipeline does with such a `call`."""
        return []

    @classmethod
    def lora_base(cls, denoiser: Mapping[str, Any], predicts_v: bool) -> tuple[str, str] | None:
        """What LoRA files of a denoiser of this configuration are for: kohya's word for the base
        model, the model specification's for the architecture; None where that is not known.
        """
        return None


def family(target: str) -> Family | None:
    """What the class of this dotted name says of itself, by its source alone; None if it is no
    teacher's.

    Raises ValueError for a value that is not plain.
    """
    if TEACHER not in source_code.lineage(target):
        return None
    found = Family()
    for name in Family.__annotations__:
        value = source_code.assigned(target, name)
        if value is None:
            continue
        try:
            said = source_code.last(value) if name == "kind" else ast.literal_eval(value)
        except ValueError:
            what = f"{name} must be a plain value, not {ast.unparse(value)}: it is read, not run"
            raise ValueError(f"teacher._target_={target}: {what}; write the value out") from None
        setattr(found, name, said)
    return found if found.kind else None


def reader_of(kind: str) -> str | None:
    """The dotted name of what reads a pipeline of this class, ours before the user's own."""
    return BUILT_IN.get(kind) or own().get(kind)


def family_of_kind(kind: str) -> Family:
    """What the family that reads a pipeline of this class says of itself; of one that nobody reads
    nothing.
    """
    reader = reader_of(kind)
    return (family(reader) if reader else None) or Family()


def teacher_class(kind: str) -> type[PipelineTeacher]:
    """The class that reads a pipeline of this class; of one that nobody reads, the base of all.

    It imports torch and diffusers.
    """
    module, _, name = (reader_of(kind) or TEACHER).rpartition(".")
    found: type[PipelineTeacher] = getattr(importlib.import_module(module), name)
    return found


def own() -> dict[str, str]:
    """Class of a pipeline -> what reads it in the packages that the user trusts."""
    found: dict[str, str] = {}
    for root in roots():
        found = {**_declared(root), **found}
    return found


@cache
def _declared(root: str) -> dict[str, str]:
    """The teachers of a module or package that say in their own body which pipeline they read."""
    found: dict[str, str] = {}
    for module in source_code.inside(root):
        read = source_code.source(module)
        for node in read[0].body if read else ():
            if not isinstance(node, ast.ClassDef):
                continue
            kinds = [value for name, value in source_code.assignments(node) if name == "kind"]
            target = f"{module}.{node.name}"
            if kinds and TEACHER in source_code.lineage(target):
                found.setdefault(source_code.last(kinds[-1]), target)
    return found


def in_one_file() -> list[str]:
    """The pipelines that are written as one file, those of which that is all first."""
    said = {kind: family_of_kind(kind).single_file for kind in {**BUILT_IN, **own()}}
    whole = [kind for kind, how in said.items() if how == "pipeline"]
    return whole + [kind for kind, how in said.items() if how == "transformer"]


def unknown(kind: str, path: str, key: str) -> ValueError:
    """What is said of a pipeline that nothing reads; `key` is what was given."""
    known = ", ".join(sorted({**BUILT_IN, **own()}))
    return ValueError(
        f"{key}={path} holds a {kind}; known are {known}, and one of your own comes in by"
        f" {TRUST}=<its package>"
    )


def embedding_options(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a teacher's configuration that change its caption embeddings."""
    found = family(str(teacher.get("_target_"))) or Family()
    return {key: teacher[key] for key in found.embedding_options if teacher.get(key) is not None}
