"""What every page is made of: one template, and pictures that it holds itself."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from PIL import Image

from distill.storage.formats import check_pixels
from distill.terminal.shown import in_html, lines_in_html

TEMPLATE = Path(__file__).with_name("template.html")
SECTIONS = dict.fromkeys(("status", "pictures", "evaluation", "training", "facts", "config"), "")
TILE = '<div class="tile"><span>{}</span><b>{}</b><span>{}</span></div>'
# pixels; wider pictures are shrunk to it, or the grids of a large model would make a file of 200 MB
WIDEST = 1600
MOST_PIXELS = 2**27  # ours: a grid of 64 pictures of 1024 x 1024 has half as many
COARSEST = 700  # pixels; narrower pictures are enlarged with hard edges, as what they are


def html(name: str, headline: str, tiles: Iterable[Sequence[str]] = (), **sections: str) -> str:
    """The whole page.

    A tile is (what, its value, in which circumstances); `sections` are HTML, empty if absent.
    """
    said = {"name": in_html(name), "headline": in_html(headline)}
    shown = "\n".join(TILE.format(*map(in_html, tile)) for tile in tiles)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        SECTIONS | said | sections, tiles=shown
    )


def figure(path: Path, caption: str) -> str:
    """The picture in this file with a caption.

    Raises OSError, ValueError or SyntaxError, as Pillow does.
    """
    with open_png(path) as picture:
        picture.thumbnail((WIDEST, 100 * WIDEST))
        below = f"<figcaption>{in_html(caption)}</figcaption>"
        return f"<figure>{img(picture, caption)}{below}</figure>"


def open_png(path: Path) -> Image.Image:
    """A picture of a run, of which the header is read: a PNG, as we write them, for Pillow starts
    programs for others.

    Raises OSError, and ValueError for one of too many pixels.
    """
    picture = Image.open(path, formats=("PNG",))
    check_pixels(picture, MOST_PIXELS)
    return picture


def img(picture: Image.Image, alt: str = "") -> str:
    picture.save(file := io.BytesIO(), format="PNG")
    look = (
        f'width="{picture.width}" height="{picture.height}"'
        f' class="{"crisp" * (picture.width < COARSEST)}"'
    )
    return f'<img src="{data_uri(file, "png")}" {look} alt="{in_html(alt)}">'


def data_uri(file: io.BytesIO, kind: str) -> str:
    """A picture of this kind (png, svg+xml) as its own address."""
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def collapsible(what: str, text: str, state: str = "") -> str:
    """Plain text that opens at a click; `state` open: it is so from the start."""
    return (
        "<details"
        f" {state}><summary>{in_html(what)}</summary><pre>{lines_in_html(text)}</pre></details>"
    )
