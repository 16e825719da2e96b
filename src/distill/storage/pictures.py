"""Convert pictures to RGB, and write several as one PNG, or those of a video as one WebP."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.utils import make_grid

from distill.storage import formats
from distill.storage.atomic import write_atomic

QUALITY = 90  # ours: of the WebP files of videos, from 1 to 100
# Mean and standard deviation of ImageNet's pixels in [0, 1], by channel.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert to RGB: rotated by its EXIF, transparency on white, 16-bit grey scaled to 8 bits.

    Of its size and of its numbers see `formats.upright`, which raises ValueError.
    """
    picture = formats.upright(picture)
    if picture.has_transparency_data:
        # Colours of transparent pixels are arbitrary, and must not be trained on.
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def write_grid(pictures: Tensor, path: Path, nrow: int) -> None:
    """Write pictures [N, 3, H, W] in [0, 1] as one PNG atomically, `nrow` of them in a row."""
    write_png(grid_of(pictures, nrow), path)


def grid_of(pictures: Tensor, nrow: int) -> np.ndarray:
    """Pictures [N, 3, H, W] in [0, 1] as one, `nrow` of them in a row: uint8 [height, width, 3]."""
    grid = make_grid(pictures, nrow=nrow)
    rounded = grid.mul(255).add(0.5).clamp(0, 255).permute(1, 2, 0)
    return rounded.to("cpu", torch.uint8).numpy()


def animation(video: Tensor, fps: float, about: Mapping[str, str]) -> bytes:
    """A video, uint8 [3, F, H, W], as an animated WebP of `fps` frames per second, for ever.

    Pillow writes no video with a codec of its own, and browsers play this one. `about` is the image
    description in its EXIF, as JSON.
    """
    frames = [Image.fromarray(x) for x in video.permute(1, 2, 3, 0).cpu().numpy()]
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps(dict(about))
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "loop": 0}
    options |= {"duration": round(1000 / fps), "quality": QUALITY, "exif": exif}
    frames[0].save(content := io.BytesIO(), format="webp", **options)
    return content.getvalue()


def write_png(picture: np.ndarray, path: Path) -> None:
    """Write a picture, uint8 [height, width, 3], atomically."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="png")
    write_atomic(path, content.getvalue())
