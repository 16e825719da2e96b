"""Generate pictures with a student, or with any supported pipeline. Each PNG says how it was made.

    python -m distill.sample run=runs/... prompt="a large red star on black" steps=1 seed=0
    python -m distill.sample run=runs/... prompts=prompts.txt count=4 out=pictures
    python -m distill.sample run=runs/... prompts='["a red star","a blue ring"]'
    python -m distill.sample run=runs/... prompt="a large red star" image=photo.png steps=2
    python -m distill.sample run=runs/... prompt="a red star" image=photo.png mask=mask.png
    python -m distill.sample run=editor prompt="make it snow" image=photo.png
    python -m distill.sample run=owner/pipeline prompt="a cat" guidance=5 negative="a drawing"
    python -m distill.sample run=runs/... prompt="a cat" lora=style.safetensors lora_scale=0.7

A model that was not distilled needs guidance, and about steps=28. Several pictures also give a
grid. A video is an animated WebP, and its EXIF says how it was made; the grid has some frames of it
in a row. A prompt is taken as you type it, [a, b] and ${5} included. For several use prompts=[...].
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from distill.config import editing, picture_keys, validate
from distill.config.compose import check_counts, file_name
from distill.config.errors import command
from distill.config.preference import check_lora
from distill.config.videos import check_text_alone
from distill.core.limits import check_dtype, check_guidance_scale, drawn_at_once
from distill.data.lines import Lines
from distill.machine.hardware import check_precision
from distill.storage.atomic import write_atomic
from distill.storage.locks import check_free, one_writer
from distill.terminal.console import note, print_to_stderr
from distill.terminal.progress import Bar, importing
from distill.training.run_folders import check_ours

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 64  # pictures in the grid


def generate(cfg: DictConfig) -> list[Path]:
    """Write a PNG for every prompt and seed, with its settings as text fields, and a grid of
    several.

    Returns the paths.
    """
    prompts = check(cfg)
    with importing("torch"):
        from distill.config import models
        from distill.machine.hardware import device, precision, room

    picture_keys.check_room(cfg.run, cfg.size, cfg.tiling, room(device().type))
    model = models.student_of(cfg.run, cfg.dtype, cfg.lora, cfg.lora_scale).to(device())
    chosen = precision(cfg.precision, "cpu" if model.device.type == "cpu" else "auto")
    cfg.precision = chosen.name
    make = _picture_function(cfg, model)
    note(f"precision: {chosen.name} ({chosen.reason})")
    with one_writer(Path(cfg.out), "out"):  # creates the folder, after everything was checked
        return _generate_all(cfg, prompts, model, make)


def _generate_all(
    cfg: DictConfig, prompts: list[str], model: Any, make: Callable[..., Tensor]
) -> list[Path]:
    """Write the pictures and the grid; returns their paths."""
    import torch
    from torchvision.utils import make_grid

    from distill.core.tensors import strips
    from distill.machine.hardware import memory_left

    folder, paths, shown = Path(cfg.out), [], []
    jobs = [(i, prompt, cfg.seed + j) for i, prompt in enumerate(prompts) for j in range(cfg.count)]
    height, width = model.sides_of(model.shape_of(cfg.size))
    sides = (height, width * model.frames)
    batch_size = cfg.batch_size or drawn_at_once(*sides, most=8, room=memory_left(model))
    others = [cfg[key] for key in ("run", "guidance", "size", "image", "strength", "precision")]
    others += [cfg[key] for key in ("negative", "image_guidance", "mask") if cfg[key]]
    others += [cfg.lora, cfg.lora_scale] if cfg.lora else []
    settings = {"steps": cfg.steps, "run": cfg.run}
    if cfg.image and model.image != "source":
        settings["strength"] = cfg.strength
    suffix = ".webp" if model.video else ".png"
    if model.video:
        settings |= {"frames": model.frames, "fps": model.fps}
    with Bar("generating", len(jobs), unit="image", rate="images") as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            pictures = make([prompt for _, prompt, _ in batch], [seed for *_, seed in batch])
            for (i, prompt, seed), picture in zip(batch, pictures, strict=True):
                stem = file_name(re.sub(r"\W+", "_", prompt)[:60])
                number = f"{i:04d}_" if cfg.prompts else ""  # two prompts may start the same way
                # A hash of the settings: pictures of two models may go into one folder.
                digest = hashlib.sha256(str([prompt, *others]).encode()).hexdigest()[:4]
                paths.append(folder / f"{number}{stem}_{cfg.steps}step_seed{seed}_{digest}{suffix}")
                _write(picture, paths[-1], {"prompt": prompt, "seed": seed, **settings}, cfg)
                shown += strips(picture[None]) if len(shown) < SHOWN else []
            bar.advance(len(batch))
    if len(paths) > 1:
        row = cfg.count if 1 < cfg.count <= SHOWN else math.ceil(math.sqrt(len(shown)))
        row = 1 if model.video else row
        paths.append(folder / "grid.png")
        _write(make_grid(torch.stack(shown), nrow=row), paths[-1], settings, cfg)
    return paths


def check(cfg: DictConfig) -> list[str]:
    """The prompts. Raises ValueError or OSError for wrong settings, before slow imports."""
    check_counts(cfg, {"steps": 1, "count": 1, "seed": 0, "batch_size": 1})
    for key in ("guidance", "image_guidance"):
        if cfg[key] is not None:
            check_guidance_scale(cfg[key], key)
    validate.check_number(cfg, "strength")
    validate.check_size(cfg.size)
    check_dtype(cfg.dtype, "dtype", "auto")
    check_precision(cfg.precision)
    check_lora(cfg)
    prompts = _prompts(cfg)
    size = None if cfg.image is None else picture_keys.check_image(cfg.image)
    family = picture_keys.family_of_run(cfg.run)
    edits = family is not None and family.image == "source"
    if family is not None:
        check_text_alone(family, cfg)
        picture_keys.check_fills(family, cfg.run, cfg.mask)
        editing.check_edit(cfg, edits, family.in_context)
    if cfg.mask is not None:
        picture_keys.check_mask(cfg.image, size, cfg.mask)
    picture_keys.check_has_start(cfg.image, cfg.strength, edits)
    if cfg.strength is None:
        cfg.strength = 0.5 if cfg.mask is None else 1.0
    if cfg.image is not None and not edits:
        picture_keys.check_strength(cfg.run, cfg.steps, cfg.strength)
    if Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        raise ValueError(f"out={cfg.out}: is a file, and pictures go into a folder; name another")
    validate.check_model(cfg.run)
    picture_keys.check_size_fits(cfg.run, cfg.size)
    if cfg.mask is not None:
        picture_keys.check_white_in_crop(cfg.run, cfg.size, cfg.mask)
    picture_keys.check_guidance(cfg, picture_keys.is_few_step(cfg.run))
    check_ours(Path(cfg.out), "out", "grid.png")
    check_free(Path(cfg.out), "out")
    return prompts


def _prompts(cfg: DictConfig) -> list[str]:
    if (cfg.prompt is None) == (cfg.prompts is None):
        what = "not given" if cfg.prompt is None else "given, and prompts too"
        raise ValueError(
            f"prompt: {what}; add prompt=... to the command, or prompts=<file with one a line>"
        )
    if cfg.prompts is not None:
        return Lines(cfg.prompts, "prompts", cfg.column).lines
    if not isinstance(cfg.prompt, str):
        raise ValueError(
            f"prompt={cfg.prompt}: must be one text; several are a list, prompts=[...]"
        )
    return [cfg.prompt]


def _picture_function(cfg: DictConfig, model: Any) -> Callable[[list[str], list[int]], Tensor]:
    """A function from B prompts and seeds to pictures, uint8 [B, 3, height, width], or to videos
    [B, 3, frames, height, width].
    """
    import torch

    from distill.config.models import sampler_of
    from distill.evaluation.features import open_rgb, to_model_input
    from distill.machine.hardware import autocast
    from distill.sampling import distilled, seeded, to_bytes
    from distill.sampling.guided import guided

    options, image = {"shape": model.shape_of(cfg.size), "steps": cfg.steps}, None
    check_text_alone(model, cfg)
    picture_keys.check_fills(model, cfg.run, cfg.mask)
    picture_keys.check_guidance(cfg, distilled(model.pipeline))
    if cfg.image:
        height, width = model.sides_of(options["shape"])
        image = to_model_input(open_rgb(Path(cfg.image), "image="), width, height).to(model.device)
    edits = model.image == "source"
    editing.check_edit(cfg, edits, model.in_context)
    around = _around(cfg, model, image)
    if around is not None and cfg.strength == 1:
        image = None  # the sample starts at pure noise, as in diffusers
    model.save_memory(slicing=cfg.slicing, tiling=cfg.tiling)
    few_steps = partial(sampler_of(cfg.run, model), model, **options)

    @torch.no_grad()
    def make(prompts: list[str], seeds: list[int]) -> Tensor:
        cond = model.embed(prompts)
        if cfg.negative is not None:
            cond = replace(cond, null=model.embed_negative(cfg.negative))
        img2img = {}
        if edits:
            source = model.image_of({"source": image}).expand(len(seeds), -1, -1, -1)
            cond = replace(cond, image=source)
        elif around is not None:
            cond = replace(cond, image=around.expand(len(seeds), -1, -1, -1))
        if image is not None and not edits:
            start = model.encode(image).expand(len(seeds), -1, -1, -1)
            img2img = {"image": start, "strength": cfg.strength}
        with autocast(cfg.precision, model.device.type):
            if cfg.guidance is not None:
                settings = {**options, **img2img, "guidance": cfg.guidance}
                image_guidance = cfg.image_guidance
                settings["image_guidance"] = 1.0 if image_guidance is None else image_guidance
                x0 = guided(model, cond, seeded(seeds), **settings)
            else:
                x0 = few_steps(cond, seeded(seeds), **img2img)
        return to_bytes(model.decoded(x0))

    return make


def _around(cfg: DictConfig, model: Any, pixels: Tensor | None) -> Tensor | None:
    """What an inpainting model reads of the picture, pixels [1, 3, H, W], beside the sample:
    `Cond.image` [1, C', h, w]; None without a mask.
    """
    import torch

    from distill.core.types import FILL
    from distill.evaluation.features import open_rgb, to_model_input

    if cfg.mask is None or pixels is None:
        return None
    height, width = pixels.shape[-2:]
    mask = open_rgb(Path(cfg.mask), "mask=").convert("L").convert("RGB")
    white = to_model_input(mask, width, height)[:, :1].to(pixels.device) >= 0
    if not white.any():
        raise picture_keys.without_white(cfg.mask, width, height)
    with torch.no_grad():
        around: Tensor = model.image_of({"pixels": pixels, FILL: white.to(pixels.dtype)})
    return around


def _write(picture: Tensor, path: Path, fields: dict[str, Any], cfg: DictConfig) -> None:
    """Write a picture, uint8 [3, H, W], or a video [3, F, H, W], with `fields` and the optional
    settings that were given.
    """
    from PIL.PngImagePlugin import PngInfo
    from torchvision.transforms.functional import to_pil_image

    from distill.storage.pictures import animation

    optional = ("precision", "guidance", "image_guidance", "negative", "size", "image", "mask")
    optional += ("lora",)
    fields = fields | {key: cfg[key] for key in optional if cfg[key] is not None}
    if cfg.lora:
        fields["lora_scale"] = cfg.lora_scale
    settings = PngInfo()
    texts = {key: str(x).encode("utf-8", "backslashreplace").decode() for key, x in fields.items()}
    for key, text in texts.items():  # a path may hold any bytes
        settings.add_text(key, text)
    if picture.ndim == 4:
        write_atomic(path, animation(picture, fields["fps"], texts))
    else:
        to_pil_image(picture).save(content := io.BytesIO(), format="PNG", pnginfo=settings)
        write_atomic(path, content.getvalue())
    print(path)


@command("sample")
def main(cfg: DictConfig) -> None:
    with print_to_stderr():  # stdout only gets the paths, for other programs
        generate(cfg)


if __name__ == "__main__":
    main()
