"""Check the pictures that a model is asked to go on from or to fill, before torch is imported."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from PIL import Image, ImageOps

from distill.config.compose import config_of, shipped
from distill.core import limits
from distill.storage import formats
from distill.teachers import families
from distill.teachers.loading import locate
from distill.teachers.loading.settings import configurations, pixels_of, sides_of

READERS = {"mask": "image= and mask=", "source": "image="}  # keys of `sample` for pictures


def family_of_run(run: str) -> families.Family | None:
    """The facts of the pipeline's family; None for a pipeline on the hub."""
    index = locate.pipeline_folder(Path(shipped(run))) / locate.INDEX
    if not index.is_file():
        return None
    kind = locate.index_of(str(index.parent), "run").get("_class_name")
    return families.family_of_kind(str(kind))


def check_has_start(image: str | None, strength: float | None, edits: bool) -> None:
    """Check that a strength is given only with an image that the sample starts at."""
    if strength is not None and image is None:
        what = "has no effect without a start image; add image=, or leave it out"
        raise ValueError(f"strength={strength}: {what}")
    if strength is not None and edits:
        what = "a model that edits starts at pure noise beside its picture"
        raise ValueError(f"strength={strength}: {what}; leave it out")


def check_strength(run: str, steps: int, strength: float) -> None:
    """Check that this strength leaves at least one step, by the rounding of the pipeline of `run`.

    For a pipeline on the hub the rounding is not known yet: the one that leaves more steps is used.
    """
    family = family_of_run(run)
    limits.check_strength(steps, strength, family is None or family.rounds_up)


def check_fills(family: families.Family, run: str, mask: str | None) -> None:
    """Check that a mask is given to a model that fills masks, and to no other."""
    fills = family.image == "mask"
    if fills and mask is None:
        what = "fills masked parts of pictures; add image=<picture> mask=<white where to fill>"
        raise ValueError(f"run={run}: {what}")
    if mask is not None and not fills:
        what = f"run={run} is no inpainting model and fills no masks"
        raise ValueError(f"mask={mask}: {what}; leave mask out, or give an inpainting model")


def refuse_readers(run: str, command: str, key: str = "run") -> None:
    """Raise ValueError for a model that fills masks or edits, where a command makes whole pictures
    from captions.
    """
    family = family_of_run(run)
    if family is not None and family.image in READERS:
        what = f"{limits.DOES[family.image]}, and {command} makes whole ones"
        keys = READERS[family.image]
        raise ValueError(f"{key}={run}: {what}; use the sample command with {keys}")


def check_size_fits(run: str, size: Any, key: str = "") -> None:
    """Check that the model makes pictures of this size, as far as its files are here. `key` is the
    dotted prefix of the setting.
    """
    folder, family = locate.pipeline_folder(Path(shipped(run))), family_of_run(run)
    sides = sides_of(family, configurations(folder), f"run={run}") if family else None
    plain = list(size) if isinstance(size, ListConfig) else size
    if sides and size is not None:
        limits.check_sides(plain, None, *sides, key)
    limits.check_pixels(plain, f"{key}size")


def check_guidance(cfg: DictConfig, few: bool | None) -> None:
    """Check that a model of few steps is not guided, and that any other one is; and that what only
    guidance reads is not given without. `few`: whether it is one, where that is known already.
    """
    if cfg.guidance is not None and few:
        what = f"run={cfg.run} was distilled to work without; leave it out"
        raise ValueError(f"guidance={cfg.guidance}: {what}")
    for key in ("negative", "image_guidance"):
        if cfg[key] is not None and few:
            what = f"run={cfg.run} was distilled to work without guidance; leave it out"
            raise ValueError(f"{key}={cfg[key]}: {what}")
        if cfg[key] is not None and cfg.guidance is None:
            what = "has no effect without guidance; add guidance="
            raise ValueError(f"{key}={cfg[key]}: {what}")
    if cfg.guidance is None and few is False:
        what = "was not distilled to few steps; add guidance=5 steps=28 or the like"
        raise ValueError(f"run={cfg.run}: {what}")


def is_few_step(run: str) -> bool | None:
    """Whether the model is of few steps, by its files; None where they do not say it."""
    folder = locate.pipeline_folder(Path(shipped(run)))
    said = (folder / locate.INDEX, folder / "scheduler" / "scheduler_config.json")
    return locate.is_distilled(folder) if all(file.is_file() for file in said) else None


def check_room(run: str, size: Any, tiling: bool, room: float) -> None:
    """Check that a picture of this size can be decoded in `room` bytes."""
    if size is None:
        return
    width, height = (size, size) if isinstance(size, int) else size
    taken = width * height * _bytes_per_pixel(run, tiling)
    if taken > room:
        what = f"a picture of {width}x{height} takes {taken / 1e9:.1f} GB or more to decode"
        raise ValueError(f"size={size}: {what}, and {room / 1e9:.1f} GB are free; make it smaller")


def _bytes_per_pixel(run: str, tiling: bool) -> int:
    """What decoding takes at least.

    Ours: the picture in float32, and without tiles the input and the output of the decoder's last
    layers, in two bytes a number. More is taken, so what passes may still not fit.
    """
    vae = configurations(locate.pipeline_folder(Path(shipped(run))))("vae")
    widths = vae.get("block_out_channels")
    layers = str(vae.get("_class_name")) == "AutoencoderKL" and widths and not tiling
    return 3 * 4 + (2 * 2 * widths[0] if layers else 0)


def check_image(image: str) -> tuple[int, int]:
    """Width and height of a picture. Raises FileNotFoundError or ValueError for other files."""
    if not Path(image).is_file():
        raise FileNotFoundError(f"image={image}: no such file; give a picture")
    return _opened("image", image).size


def check_mask(image: str | None, size: tuple[int, int] | None, mask: str) -> None:
    """Check that there is a picture of this size and a mask of the same, without transparent parts
    and with something to fill.

    Raises FileNotFoundError or ValueError.
    """
    if image is None:
        raise ValueError(f"mask={mask}: there is no picture to fill; add image=")
    if not Path(mask).is_file():
        what = "no such file; give a picture of the size of image=, white where to fill"
        raise FileNotFoundError(f"mask={mask}: {what}")
    painted = _opened("mask", mask)
    if size != painted.size:
        said = ["{}x{}".format(*each) for each in (painted.size, size)]
        what = f"is {said[0]}, and image={image} is {said[1]}"
        raise ValueError(f"mask={mask}: {what}; make them of one size")
    if painted.has_transparency_data and painted.convert("RGBA").getextrema()[3][0] < 255:
        # Some programs fill what is transparent, others what is painted.
        what = "has transparent parts, which may mean both"
        raise ValueError(f"mask={mask}: {what}; save it white where to fill, and black elsewhere")
    if painted.convert("RGB").convert("L").getextrema()[1] < 128:
        raise ValueError(f"mask={mask}: has no white, so nothing to fill; paint what to fill white")


def check_white_in_crop(run: str, size: Any, mask: str) -> None:
    """Check that there is something to fill in the crop of the picture to what the model makes."""
    sides = _made_by(run, size)
    if sides is None:
        return
    painted = _opened("mask", mask).convert("RGB").convert("L")
    if ImageOps.fit(painted, sides).getextrema()[1] < 128:
        raise without_white(mask, *sides)


def without_white(mask: str, width: int, height: int) -> ValueError:
    """The error for a mask with nothing to fill in the crop of the picture to these sides."""
    what = f"its white lies outside of the crop of the picture to {width}x{height}"
    return ValueError(f"mask={mask}: {what}; give size=[width,height] of its shape")


def _made_by(run: str, size: Any) -> tuple[int, int] | None:
    """Width and height of the pictures of a model; None where its files do not say them."""
    if size is not None:
        width, height = (size, size) if isinstance(size, int) else size
        return width, height
    folder, family = locate.pipeline_folder(Path(shipped(run))), family_of_run(run)
    if family is None or family.packing * family.folding > 1:
        return None
    info = locate.index_of(str(folder)).get(locate.STUDENT_INFO)
    options = info.get("options") if isinstance(info, dict) else None
    of_run = config_of(run, "teacher")
    given = [each.get("size") for each in (options, of_run and of_run.teacher) if each]
    side = next((x for x in given if x is not None), pixels_of(configurations(folder)))
    return (side, side) if isinstance(side, int) else None


def _opened(key: str, path: str) -> Image.Image:
    """The picture of this key, read as the command reads it later."""
    try:
        with formats.open_picture(Path(path), Path(path).suffix.lower()) as opened:
            return formats.upright(opened)
    except Exception as error:  # Pillow raises nearly anything on damaged files
        what = f"cannot be read as a picture ({error}); give another"
        raise ValueError(f"{key}={path}: {what}") from None
