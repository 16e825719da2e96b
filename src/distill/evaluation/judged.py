"""Which teachers each protocol of `shapes` evaluates. Nothing here imports torch."""

from collections.abc import Mapping
from typing import Any

from distill.core.limits import DOES
from distill.storage import source_code

# Protocols of teachers that read pictures, by what they read.
OTHERS: dict[str | None, str] = {"mask": "shapes_fill", "source": "shapes_edit"}


def check_judged(protocol: str, image: str | None, *, blend: bool = False) -> None:
    """Raise ValueError for a teacher that does something else than this protocol evaluates.

    `image` is what the teacher reads beside the caption, as in `Family`. With `blend` a model of
    text to image fills masks.
    """
    if protocol == "shapes" and image in DOES:
        what = f"whole pictures are made from captions, and this teacher {DOES[image]}"
        raise ValueError(f"metrics=shapes: {what}; use metrics={OTHERS[image]}")
    if protocol == "shapes_edit" and image != "source":
        other = OTHERS.get(image, "shapes")
        what = "this teacher does not edit pictures"
        raise ValueError(f"metrics=shapes_edit: {what}; use metrics={other}")
    if protocol == "shapes_fill":
        _check_fills(image, blend)


def check_protocol(metrics: Mapping[str, Any], image: str | None) -> None:
    """The same for the protocol with these settings; nothing for one without `judges`."""
    if protocol := source_code.attribute(str(metrics.get("_target_")), "judges"):
        check_judged(protocol, image, blend=bool(metrics.get("blend")))


def _check_fills(image: str | None, blend: bool) -> None:
    if blend and image:
        what = "an ordinary model fills by blending, and this one reads picture channels"
        raise ValueError(f"metrics.blend=true: {what}; make it false")
    if not blend and image != "mask":
        how = "metrics.blend=true fills with an ordinary one"
        how = f"use metrics={OTHERS[image]}" if image in OTHERS else how
        raise ValueError(f"metrics=shapes_fill: this teacher is no inpainting model; {how}")
