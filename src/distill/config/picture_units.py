"""Check that the teacher can make pictures of these sides: multiples of its unit, and within its
embedded positions. Nothing here imports torch.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config import editing
from distill.config.compose import shipped
from distill.config.sources import DRAWN, EDIT_PAIRS, IMAGES, PREFERENCES
from distill.core import limits
from distill.teachers import families
from distill.teachers.loading import locate
from distill.teachers.loading.settings import Sides, in_folder, sides_of


def check_fit(data: DictConfig, teacher: DictConfig, *, published: bool = False) -> None:
    """Check that the sides of pictures are some that the teacher makes, if its files are here.

    For a teacher on the hub, the unit of its family is used if `published`: another model of the
    same class may have another one.
    """
    family = families.family(str(teacher._target_))
    sides = _sides(teacher, family)
    if sides is None and published and family and family.usual_unit:
        sides = Sides(family.usual_unit)
    editing.check_pairs_fit(data, family)
    of_pictures = data.get("_target_") in (IMAGES, DRAWN, EDIT_PAIRS)
    # Pairs of a preference without a size are latents.
    of_pictures |= data.get("_target_") == PREFERENCES and data.get("size") is not None
    if of_pictures:
        _check(data, teacher, sides, "data.")


def check_made(teacher: DictConfig, made: DictConfig, key: str = "") -> None:
    """Check that the teacher can make pictures of this `size` and these `buckets`, if its files are
    here. `key` is the dotted prefix of both.
    """
    _check(made, teacher, _sides(teacher, families.family(str(teacher._target_))), key)


def _check(pictures: DictConfig, teacher: DictConfig, sides: Sides | None, key: str) -> None:
    """Raise ValueError for a size or buckets that the teacher cannot make, or nobody; an
    autoencoder in the place of its own may have another unit.
    """
    plain: Any = OmegaConf.to_container(pictures, resolve=True)
    size, buckets = plain.get("size"), plain.get("buckets") or []
    if sides and not teacher.get("vae"):
        limits.check_sides(size, buckets, *sides, key)
    for bucket in buckets:
        limits.check_pixels(bucket, f"{key}buckets")
    if not buckets:
        limits.check_pixels(size, f"{key}size")


def _sides(teacher: DictConfig, family: families.Family | None) -> Sides | None:
    """The sides of a teacher's pictures; None if its files are not here or lack them."""
    path = shipped(str(teacher.path))
    folder = shipped(str(teacher.get("config"))) if Path(path).suffix in locate.SINGLE else path
    if family is None or not (Path(folder) / locate.INDEX).is_file():
        return None
    return sides_of(family, in_folder(Path(folder)), f"teacher.path={teacher.path}")
