"""`python -m distill.sample run=... prompt="..." steps=1 seed=0`: pictures from a student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import command

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor


def draw(cfg: DictConfig) -> list[Path]:
    """Write one PNG a seed, its settings in the PNG's own text fields; returns their paths."""
    import torch
    from PIL.PngImagePlugin import PngInfo
    from torchvision.transforms.functional import to_pil_image

    from distill import build
    from distill.compose import check_counts
    from distill.sampling import check_strength, sampler_of, seeded

    check_counts(cfg, {"steps": 1, "count": 1, "seed": 0})
    if cfg.image:
        check_strength(cfg.steps, cfg.strength)
    student = build.student_of(cfg.run)
    seeds = range(cfg.seed, cfg.seed + cfg.count)
    with torch.no_grad():
        cond = student.embed([cfg.prompt] * cfg.count)
        image = student.encode(_read(cfg.image, student)).expand(cfg.count, -1, -1, -1) if cfg.image else None
        how = {"steps": cfg.steps, "image": image, "strength": cfg.strength}
        x0 = sampler_of(student.pipeline)(student, cond, seeded(seeds), shape=student.latent_shape, **how)
        pixels = (student.decode(x0) / 2 + 0.5).clamp(0, 1)
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w]+", "_", cfg.prompt).strip("_")[:60]
    paths = []
    for seed, picture in zip(seeds, pixels, strict=True):
        settings = PngInfo()
        said = {"prompt": cfg.prompt, "seed": seed, "steps": cfg.steps, "run": cfg.run}
        for key, value in (said | ({"image": cfg.image, "strength": cfg.strength} if cfg.image else {})).items():
            settings.add_text(key, str(value))
        path = folder / f"{stem}_{cfg.steps}step_seed{seed}.png"
        # Rounded, as diffusers does; to_pil_image alone would cut off.
        to_pil_image((picture * 255).round().to(torch.uint8)).save(path, pnginfo=settings)
        paths.append(path)
        print(path)
    return paths


def _read(path: str, student: Any) -> Tensor:
    """The picture as the student's autoencoder reads it: [1, 3, S, S] in [-1, 1], cut to a square."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    from torchvision.transforms.functional import to_tensor

    side = student.latent_shape[-1] * student.unit // student.patch
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"image={path}: cannot be read as a picture ({error})") from None
    return to_tensor(ImageOps.fit(picture, (side, side)))[None] * 2 - 1


@command("sample")
def main(cfg: DictConfig) -> None:
    draw(cfg)


if __name__ == "__main__":
    main()
