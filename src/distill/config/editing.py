"""Edit pairs are for models that edit, masks for those that fill. Nothing here imports torch."""

from omegaconf import DictConfig, OmegaConf

from distill.core.odds import check_masks
from distill.teachers.families import Family, family

OWN_SOURCES = "distill.data.source."
EDITS_OF_SHAPES = "distill.worlds.shapes.scenes.Edits"
EDIT_PAIRS = "distill.data.source.pairs"
UNGUIDED = "a {} is not guided by its source picture"
WITHOUT_SOURCES = ("distill.data.source.images", "distill.data.source.prompts")


def check_pairs_fit(data: DictConfig, family: Family | None) -> None:
    """Check that a model that edits has edit pairs, and no other model has."""
    edits = family is not None and family.image == "source"
    target = data.get("_target_")
    if family and not edits and target == EDIT_PAIRS:
        kind = "an inpainting" if family.image else "a text-to-image"
        what = f"are for a model that edits, and a {family.kind_name()} is {kind} model"
        raise ValueError(f"data: edit pairs {what}; choose teacher=instruct_pix2pix or the like")
    reader = OmegaConf.select(data, "reader._target_")
    if family and not edits and reader == EDITS_OF_SHAPES:
        what = f"is for a model that edits, and a {family.kind_name()} does not"
        raise ValueError(f"data.reader._target_={reader}: {what}; choose teacher=shapes_edit")
    if edits and target in WITHOUT_SOURCES:
        what = f"a {family.kind_name()} edits pictures, and these data have no source pictures"
        raise ValueError(f"data: {what}; give edit pairs by data=pairs")


def check_masks_fit(data: DictConfig, family: Family | None) -> None:
    """Check that a model that fills masks has pictures with masks, and no other model has masks."""
    target, masks = str(data.get("_target_")), data.get("masks")
    if not target.startswith(OWN_SOURCES):
        return
    if isinstance(masks, DictConfig):
        check_masks(OmegaConf.to_container(masks, resolve=True))
    if family is None:
        return
    if family.image == "mask" and not masks:
        what = "fills masked parts of pictures, and these data have no masks"
        raise ValueError(f"data: a {family.kind_name()} {what}; use data=images data.masks=true")
    if family.image != "mask" and masks:
        what = f"are for an inpainting model, and a {family.kind_name()} is none"
        raise ValueError(f"data.masks={masks}: {what}; make it false")


def check_guidance_by_source(cfg: DictConfig) -> None:
    """Check that only teachers that were trained without a source too are guided by it."""
    facts = family(str(OmegaConf.select(cfg, "teacher._target_")))
    for key in ("method.distill.image_guidance", "method.real.image_guidance"):
        given = OmegaConf.select(cfg, key)
        if facts is not None and facts.in_context and given not in (None, 1):
            raise ValueError(f"{key}={given}: {UNGUIDED.format(facts.kind_name())}; set it to 1")
        if facts is not None and facts.image != "source" and given not in (None, 1):
            what = f"is for a teacher that edits, and a {facts.kind_name()} does not"
            raise ValueError(f"{key}={given}: {what}; take one that edits, or leave it out")


def check_edit(cfg: DictConfig, edits: bool, in_context: bool = False) -> None:
    """Check the settings of `sample` that only some models take."""
    if in_context and cfg.image_guidance is not None:
        what = UNGUIDED.format("model that reads it in context")
        raise ValueError(f"image_guidance={cfg.image_guidance}: {what}; leave it out")
    if edits and cfg.image is None:
        raise ValueError(
            f"image: not given, and run={cfg.run} edits a picture; add image=<the picture>"
        )
    if not edits and cfg.image_guidance is not None:
        what = f"is for a model that edits, and run={cfg.run} does not"
        raise ValueError(f"image_guidance={cfg.image_guidance}: {what}; leave it out")
    if cfg.image_guidance is not None and cfg.guidance is None:
        what = "has no effect without guidance; add guidance="
        raise ValueError(f"image_guidance={cfg.image_guidance}: {what}")
