"""Pictures: any that Pillow opens as RGB, and several as one PNG."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.utils import save_image

from distill.storage import formats
from distill.storage.aside import put

# Mean and standard deviation of its pixels in [0, 1], by channel.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PADDING = 2  # pixels between the pictures of torchvision's grids


def upright(picture: Image.Image) -> Image.Image:
    """As RGB: turned as its EXIF says, transparency on white, 16-bit grey scaled.

    Raises ValueError for too many pixels, of which a JPEG's are decoded fewer (see
    `formats.reduced`), and for numbers whose white is not known: floats, and integers of more than
    16 bits.
    """
    picture = ImageOps.exif_transpose(formats.reduced(picture))
    if picture.mode == "F":  # Pillow would clip it, to black where it lies in [0, 1]
        raise ValueError("its pixels are floats; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # Pillow would clip it to white
        grey = np.asarray(picture)
        if grey.size and (grey.min() < 0 or grey.max() >= 2**16):
            raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits")
        picture = Image.fromarray((grey // 256).astype(np.uint8))
    if (
        picture.has_transparency_data
    ):  # what lies under full transparency is arbitrary: do not teach it
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture.convert("RGB")


def put_grid(pictures: Tensor, path: Path, nrow: int) -> None:
    """Pictures [N, 3, H, W] in [0, 1] as one PNG, `nrow` of them in a row, there only when
    whole.
    """
    save_image(pictures, content := io.BytesIO(), nrow=nrow, format="png")
    put(path, content.getvalue())
