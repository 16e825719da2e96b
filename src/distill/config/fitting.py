"""Whether the data and the teacher of a run fit each other, said before anything is trained."""

import inspect
import logging
from typing import Any

from omegaconf import DictConfig

from distill.core import limits
from distill.storage import content
from distill.teachers.families import telling

log = logging.getLogger(__name__)


def refuse_misfit(cfg: DictConfig, data: Any, teacher: Any) -> None:
    """Raise ValueError for latents, embeddings or pictures that this teacher cannot read."""
    size, (channels, *sides) = getattr(data, "size", None), getattr(data, "shape", None) or (None,)
    if channels and channels != teacher.latent_shape[0]:
        raise ValueError(
            f"data.path={cfg.data.path}: its latents have {channels} channels and this teacher's"
            f" have {teacher.latent_shape[0]}; make them with this teacher's autoencoder, or give"
            " pictures with data=images"
        )
    if any(side % teacher.patch for side in sides):
        raise ValueError(
            f"data.path={cfg.data.path}: latents of {sides[0]} x {sides[1]} do not divide into this"
            f" teacher's patches of {teacher.patch}; make them of pictures whose sides are"
            f" multiples of {teacher.unit}"
        )
    null, width = getattr(data, "null", None), teacher.network.caption_width
    if null and width and null["tokens"].shape[-1] != width:
        raise ValueError(
            f"data.path={cfg.data.path}: its embeddings are {null['tokens'].shape[-1]} wide and"
            f" this teacher reads {width}; make them with this teacher by distill.cache"
        )
    made = getattr(data, "made", {})
    if null and sorted(made.get("without", teacher.without)) != sorted(teacher.without):
        what = (
            f"teacher.without=[{','.join(made['without'])}], and this run has"
            f" [{','.join(teacher.without)}]"
        )
        raise ValueError(
            f"data.path={cfg.data.path}: its embeddings were made with {what}; give both the same"
        )
    told = telling(cfg.teacher)
    if null and made.get("told", told) != told:
        what = f"teacher options {made['told'] or 'none'}, and this run has {told or 'none'}"
        raise ValueError(
            f"data.path={cfg.data.path}: its embeddings were made with {what}; give both the same"
        )
    if made and not content.alike(made.get("vae"), cfg.teacher.get("vae")):
        what = f"teacher.vae={made.get('vae')}, and this run has {cfg.teacher.get('vae')}"
        raise ValueError(
            f"data.path={cfg.data.path}: its latents were made with {what}; give both the same"
        )
    if not content.alike(made.get("teacher", cfg.teacher.path), cfg.teacher.path):
        what = "right if both have one autoencoder and one text encoder"
        log.warning(
            "data.path=%s was made with %s, not with this run's teacher: %s",
            cfg.data.path,
            made["teacher"],
            what,
        )
    limits.check_multiples(size, data.buckets, teacher.unit if size else teacher.patch)


def say_size(data: Any, teacher: Any) -> None:
    """Warn where the data have other sides than the teacher, at whose pictures of a student are
    drawn and exported.
    """
    size, shape = getattr(data, "size", None), getattr(data, "shape", None)
    if size:
        sizes = [tuple(reversed(bucket)) for bucket in data.buckets] or [(size, size)]
    elif shape:
        latents = [tuple(reversed(bucket)) for bucket in data.buckets] or [shape[1:]]
        sizes = [teacher.sides_of(each) for each in latents]
    else:
        return
    own = teacher.sides_of(teacher.latent_shape)
    if own in sizes:
        return
    height, width = sizes[0]
    square = height == width and "size" in inspect.signature(type(teacher)).parameters
    how = f"teacher.size={width} makes both the same" if square else "make data of that size"
    what = f"the data are of {width} x {height} pixels and this teacher is of {own[1]} x {own[0]}"
    log.warning("%s, at which samples, evaluation and the student's pipeline draw: %s", what, how)
