"""Which models a protocol of `shapes` evaluates, by the picture that they read. Nothing here
imports torch, so that this is said before a model is loaded.
"""

from collections.abc import Mapping
from typing import Any

from distill.teachers.families import DOES, Family

# Protocols of models that read pictures, by their fact `image`.
OTHERS = {"mask": "shapes_fill", "source": "shapes_edit"}


def check_whole(family: Family) -> None:
    """Raise ValueError for a model that makes no whole pictures from captions."""
    if family.image in OTHERS:
        what = f"whole pictures are made from captions, and this teacher {DOES[family.image]}"
        raise ValueError(f"metrics=shapes: {what}; use metrics={OTHERS[family.image]}")


def check_edits(family: Family) -> None:
    """Raise ValueError for a model that does not edit."""
    if family.image != "source":
        what = "this teacher does not edit pictures"
        other = OTHERS.get(family.image or "", "shapes")
        raise ValueError(f"metrics=shapes_edit: {what}; use metrics={other}")


def check_fills(family: Family, blend: bool) -> None:
    """Raise ValueError for a model that cannot fill, by itself or with `blend` by blending."""
    if blend and family.image:
        what = "an ordinary model fills by blending, and this one reads picture channels"
        raise ValueError(f"metrics.blend=true: {what}; make it false")
    if not blend and family.image != "mask":
        how = "metrics.blend=true fills with an ordinary one"
        how = f"use metrics={OTHERS[family.image]}" if family.image in OTHERS else how
        raise ValueError(f"metrics=shapes_fill: this teacher is no inpainting model; {how}")


def check_kind(metrics: Mapping[str, Any], family: Family) -> None:
    """The check of the protocol with these settings; none for a protocol of one's own."""
    name = str(metrics.get("_target_")).removeprefix("distill.evaluation.")
    if name == "shapes.Shapes":
        check_whole(family)
    elif name == "shapes_edit.EditedShapes":
        check_edits(family)
    elif name == "shapes_fill.FilledShapes":
        check_fills(family, bool(metrics.get("blend")))
