"""Shifts of the noise levels by the size of the picture: which networks have them, and those of
exported students.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from distill.core.times import ResolutionShift


def check_shift(shift: Any, network: Any, key: str) -> None:
    """Raise ValueError for a shift of another token size, or for a network whose pipeline does not
    tell its scheduler the size of the picture.
    """
    network = getattr(network, "network", network)
    if not getattr(network, "shifts", False):
        what = "take a shift by the size of a picture"
        what = f"only the pipelines of FLUX.1, SD3, Chroma, Qwen-Image and Z-Image {what}"
        raise ValueError(f"{key}: {what}, and this one is of another family; make it null")
    if shift.patch != network.patch:
        what = f"a token of this network is {network.patch} latents a side"
        raise ValueError(f"{key}.patch={shift.patch}: {what}; use {network.patch}")


def shift_of(config: Mapping[str, Any], saved: Mapping[str, Any]) -> ResolutionShift | None:
    """The shift of an exported student's sampler, from its scheduler's settings, and from what its
    index says of the sampler.
    """
    patch = saved.get("patch")
    if not config.get("use_dynamic_shifting") or not patch:  # a student's index names the patch
        return None
    names = [field.name for field in fields(ResolutionShift) if field.name in config]
    return ResolutionShift(**{name: config[name] for name in names}, patch=patch)
