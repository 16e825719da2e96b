"""Whether the files of `data.path` are there, and are what the chosen data read, by their names and
by the first samples. Nothing here imports torch.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config.compose import shipped
from distill.config.sources import EDIT_PAIRS, IMAGES, LATENTS, PREFERENCES, PROMPTS
from distill.data import first
from distill.data.kinds import check_holds_latents, check_holds_pairs, check_holds_preferences
from distill.data.lines import Lines
from distill.data.named import expand
from distill.data.shards import check_images, check_pictures

CHECKS = {  # of a sample of these data
    IMAGES: first.image_check,
    EDIT_PAIRS: first.edit_check,
    LATENTS: first.latent_check,
    PREFERENCES: first.preference_check,
}


def check_side(data: DictConfig) -> None:
    """Check that data of pictures have a side: `buckets` replace it, and do not unset it."""
    if data.get("_target_") in (IMAGES, EDIT_PAIRS) and data.get("size", 1) is None:
        what = "must be pixels a side; leave it out, also with data.buckets, which replace it"
        raise ValueError(f"data.size=null: {what}")


def check_files(data: DictConfig) -> None:
    """Check that the files exist, and by their names that the chosen data read them."""
    plain: Any = OmegaConf.to_container(data, resolve=True)
    if "path" not in plain:  # rendered on demand
        return
    path = shipped(str(data.path))
    if data.get("_target_") == PROMPTS:
        Lines(path, column=plain.get("column"))
    elif data.get("_target_") == LATENTS:
        expand(path)
        check_holds_latents(path)
        if plain.get("seeded"):
            first.check_seeded(path, first.made_as(path))
    elif data.get("_target_") == EDIT_PAIRS:
        check_pictures(path)
        check_holds_pairs(path)
    elif data.get("_target_") == PREFERENCES:
        check_pictures(path)
        check_holds_preferences(path)
    elif data.get("_target_") == IMAGES:  # what a source of one's own reads, it alone knows
        keys = ("repeats", "caption_key", "max_empty_share", "image_column", "caption_column")
        check_pictures(path, **{key: plain[key] for key in keys if key in plain})


def check_first_samples(data: DictConfig) -> None:
    """Check that some of the first samples are usable."""
    plain: Any = OmegaConf.to_container(data, resolve=True)
    target = plain.get("_target_")
    if "path" not in plain or target not in CHECKS:
        return
    explain = check_images if target == IMAGES else None
    first.check_first(shipped(str(data.path)), plain, CHECKS[target](plain), explain)
