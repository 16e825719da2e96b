"""What every page is made of: a template, the parts put into it, and pictures that it holds itself.

Whatever is no part is text: the templates escape it by `terminal.shown`, as everything else does.
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
# pixels; wider pictures are shrunk to it, or the grids of a large model would make a file of 200 MB
WIDEST = 1600
MOST_PIXELS = 2**27  # ours: a grid of 64 pictures of 1024 x 1024 has half as many
COARSEST = 700  # pixels; narrower pictures are enlarged with hard edges, as what they are


class Picture(NamedTuple):
    """A picture within a page: its data as an address, its size, whether its pixels are shown."""

    address: Markup
    width: int
    height: int
    small: bool


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["lines"] = lambda text: Markup(lines_in_html(text))
    return found


def _escaped(value: Any) -> Markup:
    """What stands between `{{ }}`: a part of the page as it is, anything else as text."""
    return value if isinstance(value, Markup) else Markup(in_html(value))


def html(name: str, headline: str, tiles: Iterable[Sequence[str]] = (), **sections: Markup) -> str:
    """The whole page.

    A tile is (what, its value, in which circumstances); `sections` are parts, empty if absent.
    """
    said = {"name": name, "headline": headline, "tiles": tiles}
    return _templates().get_template("page.html").render(SECTIONS | said | sections)


def part(name: str, *arguments: Any, **more: Any) -> Markup:
    """HTML of a macro in templates/parts.html."""
    return getattr(_templates().get_template("parts.html").module, name)(*arguments, **more)


def joined(*parts: Markup) -> Markup:
    """Parts one below the other."""
    return Markup("\n").join(parts)


def figure(path: Path, caption: str) -> Markup:
    """The picture in this file with a caption.

    Raises OSError, ValueError or SyntaxError, as Pillow does.
    """
    with opened(path) as picture:
        picture.thumbnail((WIDEST, 100 * WIDEST))
        return part("figure", within(picture), caption)


def opened(path: Path) -> Image.Image:
    """A picture of a run, of which the header is read: a PNG, as we write them, for Pillow starts
    programs for others.

    Raises OSError, and ValueError for one of too many pixels.
    """
    picture = Image.open(path, formats=("PNG",))
    check_pixels(picture, MOST_PIXELS)
    return picture


def within(picture: Image.Image) -> Picture:
    """A picture as a page holds it."""
    picture.save(file := io.BytesIO(), format="PNG")
    size = picture.width, picture.height
    return Picture(data_uri(file, "png"), *size, small=picture.width < COARSEST)


def data_uri(file: io.BytesIO, kind: str) -> Markup:
    """A picture of this kind (png, svg+xml) as its own address, in letters that need no escape."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}")
