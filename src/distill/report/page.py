"""Parts of every HTML page: the template, embedded pictures, collapsible text."""

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
# pixels; wider pictures are reduced to it, since grids of a large model would give a 200 MB page
WIDEST = 1600
MOST_PIXELS = 2**27  # ours: a grid of 64 pictures of 1024 x 1024 has half as many
COARSEST = 700  # pixels; narrower pictures are enlarged without interpolation


def html(name: str, headline: str, tiles: Iterable[Sequence[str]] = (), **sections: str) -> str:
    """The whole page.

    A tile is (name, value, circumstances); `sections` are HTML, and empty if absent.
    """
    texts = {"name": in_html(name), "headline": in_html(headline)}
    texts["tiles"] = "\n".join(TILE.format(*map(in_html, tile)) for tile in tiles)
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(SECTIONS | texts | sections)


def figure(path: Path, caption: str) -> str:
    """HTML of the picture in this file with a caption.

    Raises OSError, ValueError or SyntaxError, as Pillow does.
    """
    with open_png(path) as picture:
        picture.thumbnail((WIDEST, 100 * WIDEST))
        below = f"<figcaption>{in_html(caption)}</figcaption>"
        return f"<figure>{img(picture, caption)}{below}</figure>"


def open_png(path: Path) -> Image.Image:
    """Open a PNG of a run; only its header is read.

    Other formats are refused: for some of them Pillow starts another program. Raises OSError, and
    ValueError for a picture of too many pixels.
    """
    picture = Image.open(path, formats=("PNG",))
    check_pixels(picture, MOST_PIXELS)
    return picture


def img(picture: Image.Image, alt: str = "") -> str:
    picture.save(file := io.BytesIO(), format="PNG")
    attributes = (
        f'width="{picture.width}" height="{picture.height}"'
        f' class="{"crisp" * (picture.width < COARSEST)}"'
    )
    return f'<img src="{data_uri(file, "png")}" {attributes} alt="{in_html(alt)}">'


def data_uri(file: io.BytesIO, kind: str) -> str:
    """A data URI of a picture of this kind, `png` or `svg+xml`."""
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def collapsible(what: str, text: str, state: str = "") -> str:
    """Plain text in <details>; with `state="open"` it starts expanded."""
    return (
        "<details"
        f" {state}><summary>{in_html(what)}</summary><pre>{lines_in_html(text)}</pre></details>"
    )
