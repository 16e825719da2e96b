"""Edit pairs are for models that edit, masks for those that fill. Nothing here imports torch."""

from omegaconf import DictConfig, OmegaConf

from distill.config.compose import shipped
from distill.config.paths import SHIPPED
from distill.config.sources import DRAWN, EDIT_PAIRS, IMAGES, LATENTS, OWN, PROMPTS
from distill.core.limits import DOES
from distill.core.odds import check_masks
from distill.data import write
from distill.data.first import made_as
from distill.evaluation import judged
from distill.storage import source_code
from distill.teachers.families import Family, family

EDITS = "distill.worlds.shapes.scenes.Edits"  # renders for teachers that edit
SHIPPED_DATA = "shapes:latents"
UNGUIDED = "a {} is not guided by its source picture"
WITHOUT_SOURCES = (IMAGES, PROMPTS)
GIVE_PAIRS = "give edit pairs by data=pairs data.path=<shards>"
MASKABLE = (IMAGES, DRAWN)
GIVE_MASKED = "use data=images data.masks=true data.path=<folder>"
OF_SHAPES = "use experiment={} without data=, which has data of shapes, or "
GUIDANCES = ("method.distill", "method.real", "metrics")  # nodes with `image_guidance`


def check_pairs_fit(data: DictConfig, family: Family | None) -> None:
    """Check that a model that edits has edit pairs, and no other model has."""
    if family is None:
        return
    target, reader = data.get("_target_"), str(OmegaConf.select(data, "reader._target_"))
    if target == DRAWN:
        _check_rendered(reader, family)
    if target == LATENTS:
        _check_cached(str(data.path), family)
    if family.image != "source" and target == EDIT_PAIRS:
        raise ValueError(f"data: {_no_editor(family)}; choose teacher=instruct_pix2pix or the like")
    if family.image == "source" and target in WITHOUT_SOURCES:
        raise ValueError(f"data: {_no_sources(family)}; {GIVE_PAIRS}")


def _check_rendered(reader: str, family: Family) -> None:
    """Check that renders are edits for a model that edits, and for no other."""
    edits = EDITS in source_code.lineage(reader)
    if edits and family.image != "source":
        what = f"data.reader._target_={reader}: {_no_editor(family)}"
        raise ValueError(f"{what}; choose teacher=shapes_edit")
    # What a reader of the user's own gives, it alone knows.
    if not edits and family.image == "source" and reader.startswith("distill."):
        what = f"data.reader._target_={reader}: {_no_sources(family)}"
        raise ValueError(f"{what}; make it {EDITS}, or {GIVE_PAIRS}")


def _check_cached(path: str, family: Family) -> None:
    """Check latents by their manifest, if it is on this disk."""
    if family.image == "source" and path == SHIPPED_DATA:
        how = OF_SHAPES.format("edit_shapes") + GIVE_PAIRS
        raise ValueError(f"data: {_no_sources(family)} (they are {SHIPPED_DATA}); {how}")
    if (made := made_as(shipped(path))) is not None:
        check_cached_pairs(path, made == write.EDIT_PAIRS, family.image == "source")


def check_cached_pairs(path: str, of_edits: bool, edits: bool) -> None:
    """Raise ValueError for latents of edit pairs without an editing teacher, or the reverse."""
    if edits == of_edits:
        return
    what = "this teacher edits, and these latents have no source pictures; make them by"
    what = f"{what} distill.cache data=pairs data.path=<shards>"
    if of_edits:
        what = "they are of edit pairs, and this teacher does not edit; choose one that does"
    raise ValueError(f"data.path={path}: {what}")


def _no_editor(family: Family) -> str:
    kind = "an inpainting" if family.image else "a text-to-image"
    what = f"are for a model that edits, and a {family.kind_name()} is {kind} model"
    return f"edit pairs {what}"


def _no_sources(family: Family) -> str:
    return f"a {family.kind_name()} edits pictures, and these data have no source pictures"


def check_masks_fit(data: DictConfig, family: Family | None) -> None:
    """Check that a model that fills masks has pictures with masks, and no other model has masks."""
    target, masks = str(data.get("_target_")), data.get("masks")
    if not target.startswith(OWN):
        return
    if isinstance(masks, DictConfig):
        check_masks(OmegaConf.to_container(masks, resolve=True))
    if family is None:
        return
    if family.image == "mask" and not masks:
        what = f"a {family.kind_name()} {DOES['mask']}, and these data have no masks"
        of_shapes = data.get("path") == SHIPPED_DATA
        how = (OF_SHAPES.format("inpaint_shapes") if of_shapes else "") + GIVE_MASKED
        if target in MASKABLE:
            how = "give data.masks=true"
        raise ValueError(f"data: {what}; {how}")
    if family.image != "mask" and masks:
        what = f"are for an inpainting model, and a {family.kind_name()} is none"
        other = "shapes_inpaint" if target == DRAWN else "sd_inpaint or the like"
        raise ValueError(f"data.masks={masks}: {what}; make it false, or choose teacher={other}")


def check_guidance_by_source(cfg: DictConfig) -> None:
    """Check that only teachers that were trained without a source too are guided by it."""
    facts = family(str(OmegaConf.select(cfg, "teacher._target_")))
    for key in (f"{node}.image_guidance" for node in GUIDANCES):
        given = OmegaConf.select(cfg, key)
        if facts is None or given in (None, 1):
            continue
        if facts.in_context:
            raise ValueError(f"{key}={given}: {UNGUIDED.format(facts.kind_name())}; set it to 1")
        if facts.image != "source":
            own = str(cfg.teacher.get("path")).startswith(SHIPPED)
            other = "shapes_edit" if own else "instruct_pix2pix or the like"
            what = f"is for a teacher that edits, and a {facts.kind_name()} does not"
            raise ValueError(f"{key}={given}: {what}; set it to 1, or choose teacher={other}")


def check_judged(cfg: DictConfig) -> None:
    """Check that the evaluation is one of what the teacher does."""
    metrics, facts = cfg.metrics, family(str(cfg.teacher._target_))
    if facts is None:
        return
    try:
        judged.check_protocol(metrics, facts.image)
    except ValueError as error:  # no protocol of `shapes` fits other pictures
        raise ValueError(f"{error}, or ~metrics to train without") from None
    if facts.image and "measures" in metrics:
        what = f"they make whole pictures from captions, and this teacher {DOES[facts.image]}"
        how = "leave them out by ~metrics, or for pictures of shapes use metrics="
        raise ValueError(f"metrics: {what}; {how}{judged.OTHERS[facts.image]}")


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
