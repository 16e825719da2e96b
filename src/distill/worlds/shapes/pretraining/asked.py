"""Settings of a pretraining: its stages, and data that they can use.

Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.config.compose import nearest
from distill.data.shards import MAX_EMPTY
from distill.worlds.shapes.world import SIDE

ORDER = (  # of execution
    "data", "clip", "vae", "latents", "reader", "vit", "vit_labels", "mmdit", "mmdit_small",
    "mmdit_tiny", "mmdit_large", "unet", "unet_inpaint", "shards", "edits", "unet_edit",
)  # fmt: skip
# stages that run only if they are named
ON_REQUEST = {"mmdit_tiny", "mmdit_large", "unet_inpaint", "edits", "unet_edit"}
MIN_PICTURES = 256  # CLIP holds 200 out
OF_CAPTIONS = {  # stages that train on captions
    "clip", "mmdit", "mmdit_small", "mmdit_tiny", "mmdit_large", "unet",
    "unet_inpaint", "shards",
}  # fmt: skip
# Stages that train on what scenes of `shapes` hold, or on edits of them.
OF_LABELS = {"reader", "vit_labels", "edits", "unet_edit"}


def check_data(path: str | None, size: int, count: int) -> None:
    """Raise ValueError for data that no stage could use; `path` None means scenes of `shapes`."""
    if not 32 <= size <= 128 or size % 8:
        raise ValueError(
            f"data.size={size}: pictures may have 32 to 128 pixels a side, in multiples of 8"
        )
    if path is None and size != SIDE:
        raise ValueError(
            f"data.size={size}: shapes have {SIDE} pixels a side; other sizes need data.path"
        )
    if count < MIN_PICTURES:
        raise ValueError(f"data.count={count}: at least {MIN_PICTURES} pictures are needed")


def trains(asked: Mapping[str, Any], stage: str) -> bool:
    """Whether a stage trains a network; it then has a learning rate."""
    return "lr" in (asked.get(stage) or {})


def teaching_stage(asked: Mapping[str, Any], stage: str) -> tuple[str, ...]:
    """The stage in the same folder whose model teaches this one, if any.

    A pipeline folder may teach too, but is no stage.
    """
    taught_by = asked["networks"].get(stage, {}).get("taught_by")
    return (taught_by,) if taught_by in ORDER else ()


def max_empty_share(stages: Sequence[str] | str | None) -> float:
    """The share of pictures without a caption that the chosen stages accept."""
    return MAX_EMPTY if OF_CAPTIONS & set(chosen(stages)) else 1.0


def chosen(stages: Sequence[str] | str | None) -> list[str]:
    """The chosen stages, in the order of execution; None: all but those of ON_REQUEST."""
    stages = [stages] if isinstance(stages, str) else stages
    for name in stages or ():
        if name not in ORDER:
            raise ValueError(
                f"stages: no stage {name!r}{nearest(name, ORDER)}; there are {', '.join(ORDER)}"
            )
    wanted = set(ORDER) - ON_REQUEST if stages is None else set(stages)
    return [name for name in ORDER if name in wanted]
