"""Check that sides of pictures are multiples of the teacher's unit: pixels per latent times latents
per token. Nothing here imports torch.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distill.config import editing
from distill.config.compose import shipped
from distill.config.preference import PREFERENCES
from distill.core import limits
from distill.teachers import families
from distill.teachers.loading import locate
from distill.teachers.loading.settings import in_folder, unit_of

IMAGES = "distill.data.source.images"
DRAWN = "distill.data.source.drawn"


def check_fit(data: DictConfig, teacher: DictConfig, *, published: bool = False) -> None:
    """Check that the sides of pictures are multiples of the teacher's unit, if its files are here.

    For a teacher on the hub, the unit of its family is used if `published`: another model of the
    same class may have another one.
    """
    family = families.family(str(teacher._target_))
    unit = _unit(teacher, family) or (family.usual_unit if family and published else None)
    editing.check_pairs_fit(data, family)
    of_pictures = data.get("_target_") in (IMAGES, DRAWN, editing.EDIT_PAIRS)
    # Pairs of a preference without a size are latents.
    of_pictures |= data.get("_target_") == PREFERENCES and data.get("size") is not None
    if unit and of_pictures and not teacher.get("vae"):
        plain = OmegaConf.to_container(data, resolve=True)
        limits.check_multiples(plain.get("size"), plain.get("buckets"), unit)


def check_made(teacher: DictConfig, made: DictConfig, key: str = "") -> None:
    """Check that `size` and `buckets` of pictures that the teacher makes are multiples of its unit,
    if its files are here. `key` is the dotted prefix of both.
    """
    unit = _unit(teacher, families.family(str(teacher._target_)))
    if unit and not teacher.get("vae"):
        plain = OmegaConf.to_container(made, resolve=True)
        limits.check_multiples(plain.get("size"), plain.get("buckets"), unit, key)


def _unit(teacher: DictConfig, family: families.Family | None) -> int | None:
    """The unit of a teacher's pictures; None if its files are not here or lack it."""
    path = shipped(str(teacher.path))
    folder = shipped(str(teacher.get("config"))) if Path(path).suffix in locate.SINGLE else path
    if family is None or not (Path(folder) / locate.INDEX).is_file():
        return None
    return unit_of(family, in_folder(Path(folder)), f"teacher.path={teacher.path}")
