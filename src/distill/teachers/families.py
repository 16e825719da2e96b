"""Families of pipelines: which teacher class reads which diffusers pipeline, and its facts.

A family is a subclass of `PipelineTeacher`. Commands need some facts about it before torch is
imported. These facts are plain values in the class body, and are read from the source. Families in
a user's package are found if the user trusts the package (`storage/trusted.py`). Nothing here
imports a slow library.
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
BUILT_IN = {  # class of a pipeline -> teacher class
    "ChromaPipeline": "distill.teachers.chroma.Chroma",
    "Flux2KleinPipeline": "distill.teachers.flux2.Flux2Klein",
    "Flux2Pipeline": "distill.teachers.flux2.Flux2",
    "FluxFillPipeline": "distill.teachers.inpaint.FluxFill",
    "FluxKontextPipeline": "distill.teachers.edit.FluxKontext",
    "FluxPipeline": "distill.teachers.flux.Flux",
    "Lumina2Pipeline": "distill.teachers.lumina2.Lumina2",
    "KolorsPipeline": "distill.teachers.kolors.Kolors",
    "PixArtAlphaPipeline": "distill.teachers.pixart.PixArtAlpha",
    "PixArtSigmaPipeline": "distill.teachers.pixart.PixArtSigma",
    "QwenImagePipeline": "distill.teachers.qwenimage.QwenImage",
    "SanaPipeline": "distill.teachers.sana.Sana",
    "SanaSprintPipeline": "distill.teachers.sana.SanaSprint",
    "StableDiffusion3InpaintPipeline": "distill.teachers.inpaint.SD3Inpaint",
    "StableDiffusion3Pipeline": "distill.teachers.sd3.SD3",
    "StableDiffusionInpaintPipeline": "distill.teachers.inpaint.SDInpaint",
    "StableDiffusionInstructPix2PixPipeline": "distill.teachers.edit.InstructPix2Pix",
    "StableDiffusionPipeline": "distill.teachers.sd.SD",
    "StableDiffusionXLInpaintPipeline": "distill.teachers.inpaint.SDXLInpaint",
    "StableDiffusionXLInstructPix2PixPipeline": "distill.teachers.edit.InstructPix2PixXL",
    "StableDiffusionXLPipeline": "distill.teachers.sdxl.SDXL",
    "WanPipeline": "distill.teachers.wan.Wan",
    "ZImagePipeline": "distill.teachers.zimage.ZImage",
}


class Family:
    """Facts about a family's pipelines that do not depend on the weights.

    Each is a plain value in the class body, since commands read it from the source.

    kind: the pipeline's class in diffusers; its name, where it was read from the source.
    unused: parts of the pipeline that are not loaded.
    spare: parts that `teacher.without` may leave out, all of them together.
    autoencoder: name of the autoencoder's class in diffusers.
    upcasts: whether the pipeline decodes in float32 an autoencoder that would overflow in float16.
    in_float32: whether its autoencoder computes in float32 at every dtype of the teacher.
    standardised: whether the pipeline uses `latents_mean` and `latents_std` of the autoencoder.
    packing: side of the square of latents that the pipeline packs into one token for the denoiser.
    folding: side of the square of the autoencoder's latents whose channels together are one latent,
        which is noised as a whole, as for FLUX.2.
    usual_unit: picture sides are multiples of this number of pixels, for the family's model on the
        hub; None if its models differ.
    flow: whether all its networks predict the velocity of a rectified flow.
    addition_embed_type: that of its UNet's configuration: the conditioning other than captions.
    image: what its denoiser reads beside the sample: `mask`, a mask and the latents around it, as
        for inpainting; `source`, the latents of a picture, as for editing; None: nothing.
    video: whether it makes videos, with latents [C, T, H, W], and not pictures.
    whole_mask: whether it reads the mask at the picture's size, with a channel for each pixel of a
        latent; else at that of the latents.
    in_context: whether it reads the source as further tokens, and not as further channels.
    draws: how often its pipeline samples the posterior of a picture by the noise's generator,
        before it draws the noise and after.
    padded: tokenizers that pad captions to their maximum length, as CLIP's do.
    embedding_options: options of the family that change caption embeddings.
    rounds_up: whether its image-to-image pipeline rounds steps up; see `limits.steps_left`.
    trailing: whether the pipeline steps at 1, 1 - 1/n, ..., 1/n if no sigmas are passed.
    prepares: lines of Python that a student's card runs on its pipeline, `pipe`, to correct it.
    single_file: how `export to=single_file` writes it. `pipeline`: all parts, in the layout of the
        original Stable Diffusion. `transformer`: only the transformer, under diffusers' names.
        None: it cannot be written.
    untraced: why `export to=onnx` cannot write it, as a clause that begins with which or whose.
    """

    kind: Any = None
    unused: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    autoencoder: str = "AutoencoderKL"
    upcasts: bool = False
    in_float32: bool = False
    standardised: bool = False
    packing: int = 1
    folding: int = 1
    usual_unit: int | None = None
    flow: bool = False
    addition_embed_type: str | None = None
    image: Literal["mask", "source"] | None = None
    video: bool = False
    whole_mask: bool = False
    in_context: bool = False
    draws: tuple[int, int] = (0, 0)
    padded: tuple[str, ...] = ()
    embedding_options: tuple[str, ...] = ()
    rounds_up: bool = False
    trailing: bool = False
    prepares: str = ""
    single_file: Literal["pipeline", "transformer"] | None = None
    untraced: str | None = None

    def not_traced(self) -> str | None:
        """Why its students cannot be written as ONNX, as a clause; None if they can."""
        if self.image:
            return "which also reads a picture, and only a caption is exported"
        if self.video:
            return "which makes videos, and only pictures are exported"
        return self.untraced

    def autoencoder_dtype(self, dtype: str, config: Mapping[str, Any]) -> str:
        """Name of the autoencoder's dtype for a teacher of this dtype; `config` is the
        autoencoder's.
        """
        overflows = dtype == "float16" and self.upcasts and config.get("force_upcast", True)
        return "float32" if self.in_float32 or overflows else dtype

    def kind_name(self) -> str:
        """Name of the pipeline's class."""
        return self.kind if isinstance(self.kind, str) else str(self.kind.__name__)

    @classmethod
    def remarks(cls, call: Mapping[str, Any]) -> list[str]:
        """Sentences for a student's model card about a pipeline call with these arguments."""
        return []

    @classmethod
    def lora_base(cls, denoiser: Mapping[str, Any], predicts_v: bool) -> tuple[str, str] | None:
        """Names of the base model in LoRA files, for a denoiser of this configuration.

        They are kohya's name of the base model, and the architecture in the model specification
        (modelspec). None if they are unknown.
        """
        return None


def family(target: str) -> Family | None:
    """The facts of a teacher class, read from its source; None for a class that is no teacher.

    `target` is the dotted name of the class. Raises ValueError for a value that is not plain.
    """
    if TEACHER not in source_code.lineage(target):
        return None
    facts = Family()
    for name in Family.__annotations__:
        node = source_code.assigned(target, name)
        if node is None:
            continue
        try:
            value = source_code.last(node) if name == "kind" else ast.literal_eval(node)
        except ValueError:
            what = f"{name} must be a plain value, not {ast.unparse(node)}: it is read, not run"
            raise ValueError(f"teacher._target_={target}: {what}; write the value out") from None
        setattr(facts, name, value)
    return facts if facts.kind else None


def reader_of(kind: str) -> str | None:
    """Dotted name of the teacher class for a pipeline class; None if there is none.

    Built-in families come before those of trusted packages.
    """
    return BUILT_IN.get(kind) or trusted_families().get(kind)


def family_of_kind(kind: str) -> Family:
    """The facts of the family of a pipeline class; the defaults if the class is unknown."""
    reader = reader_of(kind)
    return (family(reader) if reader else None) or Family()


def teacher_class(kind: str) -> type[PipelineTeacher]:
    """The teacher class for a pipeline class; `PipelineTeacher` if the class is unknown.

    This imports torch and diffusers.
    """
    module, _, name = (reader_of(kind) or TEACHER).rpartition(".")
    reader: type[PipelineTeacher] = getattr(importlib.import_module(module), name)
    return reader


def trusted_families() -> dict[str, str]:
    """Class of a pipeline -> teacher class, for the packages that the user trusts."""
    found: dict[str, str] = {}
    for root in roots():
        found = {**_declared(root), **found}
    return found


@cache
def _declared(root: str) -> dict[str, str]:
    """The teachers of a module or package whose class body sets `kind`."""
    found: dict[str, str] = {}
    for module in source_code.inside(root):
        parsed = source_code.source(module)
        for node in parsed[0].body if parsed else ():
            if not isinstance(node, ast.ClassDef):
                continue
            kinds = [value for name, value in source_code.assignments(node) if name == "kind"]
            target = f"{module}.{node.name}"
            if kinds and TEACHER in source_code.lineage(target):
                found.setdefault(source_code.last(kinds[-1]), target)
    return found


def in_one_file() -> list[str]:
    """Pipelines that can be exported as one file: first those whose file holds all parts."""
    layouts = {
        kind: family_of_kind(kind).single_file for kind in {**BUILT_IN, **trusted_families()}
    }
    pipelines = [kind for kind, layout in layouts.items() if layout == "pipeline"]
    return pipelines + [kind for kind, layout in layouts.items() if layout == "transformer"]


def unknown(kind: str, path: str, key: str) -> ValueError:
    """The error for a pipeline without a teacher class; `key` is the setting."""
    known = ", ".join(sorted({**BUILT_IN, **trusted_families()}))
    return ValueError(
        f"{key}={path} holds a {kind}; known are {known}; to use a family of yours set"
        f" {TRUST}=<its package>"
    )


def embedding_options(teacher: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a teacher's configuration that change its caption embeddings."""
    facts = family(str(teacher.get("_target_"))) or Family()
    return {key: teacher[key] for key in facts.embedding_options if teacher.get(key) is not None}
