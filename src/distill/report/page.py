"""What every page is made of: one template, and pictures that it holds itself."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

TEMPLATE = Path(__file__).with_name("template.html")
SECTIONS = dict.fromkeys(("status", "pictures", "evaluation", "training", "facts", "config"), "")
TILE = '<div class="tile"><span>{}</span><b>{}</b><span>{}</span></div>'
WIDEST = 1600  # pixels; wider pictures are shrunk to it, or the grids of a large model would make a file of 200 MB
COARSEST = 700  # pixels; narrower pictures are enlarged with hard edges, as what they are


def html(name: str, headline: str, tiles: Iterable[Sequence[str]] = (), **sections: str) -> str:
    """The whole page. A tile is (what, its value, in which circumstances); `sections` are HTML, empty if absent."""
    said = {"name": escape(name), "headline": escape(headline)}
    shown = "\n".join(TILE.format(*map(escape, tile)) for tile in tiles)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        SECTIONS | said | sections, tiles=shown
    )


def figure(path: Path, caption: str) -> str:
    """The picture in this file with a caption. Raises OSError, ValueError or SyntaxError, as Pillow does."""
    with Image.open(path) as picture:
        picture.thumbnail((WIDEST, 100 * WIDEST))
        return f"<figure>{img(picture, caption)}<figcaption>{caption}</figcaption></figure>"


def img(picture: Image.Image, alt: str = "") -> str:
    picture.save(file := io.BytesIO(), format="PNG")
    look = f'width="{picture.width}" height="{picture.height}" class="{"crisp" * (picture.width < COARSEST)}"'
    return f'<img src="{data_uri(file, "png")}" {look} alt="{alt}">'


def data_uri(file: io.BytesIO, kind: str) -> str:
    """A picture of this kind (png, svg+xml) as its own address."""
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def folded(what: str, text: str, state: str = "") -> str:
    """Plain text that opens at a click; `state` open: it is so from the start."""
    return f"<details {state}><summary>{what}</summary><pre>{escape(text)}</pre></details>"
