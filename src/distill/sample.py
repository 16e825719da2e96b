"""`python -m distill.sample run=... prompt="..." steps=1 seed=0`: pictures from a student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def draw(cfg: DictConfig) -> list[Path]:
    """Write one PNG a seed, its settings in the PNG's own text fields; returns their paths."""
    import torch
    from PIL.PngImagePlugin import PngInfo
    from torchvision.transforms.functional import to_pil_image

    from distill import build
    from distill.compose import check_counts
    from distill.sampling import consistency, seeded

    check_counts(cfg, {"steps": 1, "count": 1, "seed": 0})
    student = build.student_of(cfg.run)
    seeds = range(cfg.seed, cfg.seed + cfg.count)
    with torch.no_grad():
        cond = student.embed([cfg.prompt] * cfg.count)
        x0 = consistency(student, cond, seeded(seeds), shape=student.latent_shape, steps=cfg.steps)
        pixels = (student.decode(x0) / 2 + 0.5).clamp(0, 1)
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w]+", "_", cfg.prompt).strip("_")[:60]
    paths = []
    for seed, picture in zip(seeds, pixels, strict=True):
        settings = PngInfo()
        for key, value in {"prompt": cfg.prompt, "seed": seed, "steps": cfg.steps, "run": cfg.run}.items():
            settings.add_text(key, str(value))
        path = folder / f"{stem}_{cfg.steps}step_seed{seed}.png"
        # Rounded, as diffusers does; to_pil_image alone would cut off.
        to_pil_image((picture * 255).round().to(torch.uint8)).save(path, pnginfo=settings)
        paths.append(path)
        print(path)
    return paths


@command("sample")
def main(cfg: DictConfig) -> None:
    draw(cfg)


if __name__ == "__main__":
    main()
