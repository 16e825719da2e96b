"""HTML pages: templates and their macros, embedded pictures.

All values are escaped by `terminal.shown`, except Markup, which is HTML of a macro.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from distill.storage.formats import check_pixels
from distill.terminal.shown import in_html, lines_in_html

TEMPLATES = Path(__file__).with_name("templates")
SECTIONS = dict.fromkeys(("status", "pictures", "evaluation", "training", "facts", "config"), "")
# pixels; wider pictures are reduced to it, since grids of a large model would give a 200 MB page
WIDEST = 1600
MOST_PIXELS = 2**27  # ours: a grid of 64 pictures of 1024 x 1024 has half as many
LOSSLESS = 256  # ours: pixels a side up to which a PNG is small anyway
COARSEST = 700  # pixels; narrower pictures are enlarged without interpolation


class Picture(NamedTuple):
    """An embedded picture: data URI, size in pixels, and whether it is enlarged with hard edges."""

    uri: Markup
    width: int
    height: int
    small: bool


@cache
def environment(folder: Path = TEMPLATES) -> Environment:
    """The templates of a folder. All values are escaped, except Markup."""
    found = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["lines"] = lambda text: Markup(lines_in_html(text))
    return found


def _escaped(value: Any) -> Markup:
    """The value of `{{ }}`: HTML as it is, anything else escaped."""
    return value if isinstance(value, Markup) else Markup(in_html(value))


def html(name: str, headline: str, tiles: Iterable[Sequence[str]] = (), **sections: Markup) -> str:
    """The whole page.

    A tile is (name, value, circumstances); `sections` are HTML, and empty if absent.
    """
    values = {"name": name, "headline": headline, "tiles": tiles}
    return environment().get_template("page.html").render(SECTIONS | values | sections)


def render(macro: str, *arguments: Any, **options: Any) -> Markup:
    """HTML of a macro in templates/parts.html."""
    macros = environment().get_template("parts.html").module
    return getattr(macros, macro)(*arguments, **options)


def join_html(*parts: Markup) -> Markup:
    """The parts with line ends between them; text among them is escaped."""
    return Markup("\n").join(parts)


def figure(path: Path, caption: str) -> Markup:
    """HTML of the picture in this file with a caption.

    Raises OSError, ValueError or SyntaxError, as Pillow does.
    """
    with open_png(path) as picture:
        picture.thumbnail((WIDEST, 100 * WIDEST))
        return render("figure", embed(picture), caption)


def open_png(path: Path) -> Image.Image:
    """Open a PNG of a run; only its header is read.

    Other formats are refused: for some of them Pillow starts another program. Raises OSError, and
    ValueError for a picture of too many pixels.
    """
    picture = Image.open(path, formats=("PNG",))
    check_pixels(picture, MOST_PIXELS)
    return picture


def embed(picture: Image.Image) -> Picture:
    """A picture as a PNG inside the page."""
    picture.save(file := io.BytesIO(), format="PNG")
    size = picture.width, picture.height
    return Picture(data_uri(file, "png"), *size, small=picture.width < COARSEST)


def embed_small(picture: Image.Image) -> Picture:
    """A picture for pages of hundreds: beyond LOSSLESS pixels a side it is a JPEG."""
    picture.thumbnail((WIDEST, WIDEST))
    if max(picture.size) <= LOSSLESS:
        return embed(picture)
    picture.save(file := io.BytesIO(), format="JPEG", quality=95, subsampling=0)
    return Picture(data_uri(file, "jpeg"), *picture.size, small=False)


def data_uri(file: io.BytesIO, kind: str) -> Markup:
    """A data URI of a picture of this kind, `png`, `jpeg` or `svg+xml`; it needs no escapes."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
