"""Check before training that the data of a run fit its teacher."""

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from distill.config.editing import check_cached_pairs
from distill.config.sources import LATENTS
from distill.core import limits
from distill.data.write import EDIT_PAIRS
from distill.storage import fingerprints as content
from distill.teachers.families import embedding_options

log = logging.getLogger(__name__)


def check_data_fits(cfg: DictConfig, data: Any, teacher: Any) -> None:
    """Raise ValueError for latents, embeddings or pictures that this teacher cannot read."""
    size, shape = getattr(data, "size", None), getattr(data, "shape", None) or ()
    channels, sides = shape[0] if shape else None, shape[-2:]
    if channels and channels != teacher.latent_shape[0]:
        raise ValueError(
            f"data.path={cfg.data.path}: its latents have {channels} channels and this teacher's"
            f" have {teacher.latent_shape[0]}; make them with this teacher's autoencoder, or give"
            " pictures with data=images"
        )
    if shape:
        _check_frames(cfg, shape[1:-2], teacher.latent_shape[1:-2])
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
    _check_pairs(cfg, made.get("what") == EDIT_PAIRS, teacher)
    options = embedding_options(cfg.teacher)
    if null and made.get("told", options) != options:
        what = f"teacher options {made['told'] or 'none'}, and this run has {options or 'none'}"
        raise ValueError(
            f"data.path={cfg.data.path}: its embeddings were made with {what}; give both the same"
        )
    if made and not content.maybe_same_path(made.get("vae"), cfg.teacher.get("vae")):
        what = f"teacher.vae={made.get('vae')}, and this run has {cfg.teacher.get('vae')}"
        raise ValueError(
            f"data.path={cfg.data.path}: its latents were made with {what}; give both the same"
        )
    if not content.maybe_same_path(made.get("teacher", cfg.teacher.path), cfg.teacher.path):
        what = "right if both share the autoencoder and the text encoders"
        log.warning(
            "data.path=%s was made with %s, not with this run's teacher: %s",
            cfg.data.path,
            made["teacher"],
            what,
        )
    unit = teacher.unit if size else teacher.patch
    limits.check_sides(size, data.buckets, unit, unit * (teacher.network.positions or math.inf))


def _check_frames(cfg: DictConfig, found: Sequence[int], own: Sequence[int]) -> None:
    """Raise ValueError for latents of videos with another number of frames than the teacher's, and
    for pictures in place of videos; both arguments are [T], or [] for pictures.
    """
    if tuple(found) == tuple(own):
        return
    what = f"its latents have {found[0] if found else 'no'} frames"
    wanted = f"this teacher's have {own[0] if own else 'none: it makes pictures'}"
    advice = "make them by distill.synthesize with this teacher and its options"
    raise ValueError(f"data.path={cfg.data.path}: {what} and {wanted}; {advice}")


def _check_pairs(cfg: DictConfig, of_edits: bool, teacher: Any) -> None:
    """Raise ValueError for latents of edit pairs without an editing teacher, or the reverse."""
    if cfg.data.get("_target_") == LATENTS:
        check_cached_pairs(cfg.data.path, of_edits, teacher.image == "source")


def warn_size(data: Any, teacher: Any) -> None:
    """Warn if the data have another size than the teacher.

    Samples, the evaluation and the exported pipeline use the size of the teacher.
    """
    size, shape = getattr(data, "size", None), getattr(data, "shape", None)
    if size:
        sizes = [tuple(reversed(bucket)) for bucket in data.buckets] or [(size, size)]
    elif shape:
        latents = [tuple(reversed(bucket)) for bucket in data.buckets] or [shape[-2:]]
        sizes = [teacher.sides_of(each) for each in latents]
    else:
        return
    of_teacher = teacher.sides_of(teacher.latent_shape)
    if of_teacher in sizes:
        return
    height, width = sizes[0]
    square = height == width and "size" in inspect.signature(type(teacher)).parameters
    hint = f"++teacher.size={width} makes both the same" if square else "make data of that size"
    size_of_teacher = f"{of_teacher[1]} x {of_teacher[0]}"
    what = f"the data are of {width} x {height} pixels and this teacher is of {size_of_teacher}"
    # Sample pictures of a model that edits or fills are of the data's pictures.
    users = "evaluation" if teacher.image else "samples, evaluation"
    log.warning("%s, which %s and the student's pipeline use: %s", what, users, hint)
