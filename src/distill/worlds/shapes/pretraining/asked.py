"""What a pretraining may be asked for: stages, and data that they can use.

Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distill.config.compose import nearest
from distill.data.shards import MAX_EMPTY
from distill.worlds.shapes.world import SIDE

ORDER = (  # in which the stages run
    "data", "clip", "vae", "latents", "reader", "vit", "mmdit", "mmdit_small", "unet", "shards",
)  # fmt: skip
MIN_PICTURES = 256  # CLIP holds 200 back
OF_CAPTIONS = {"clip", "mmdit", "mmdit_small", "unet", "shards"}  # stages that learn from them


def check_data(path: str | None, size: int, count: int) -> None:
    """Refuse data that no stage could use; `path` None means scenes of `shapes`."""
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
    """Whether a stage trains a network: it has a rate then."""
    return "lr" in (asked.get(stage) or {})


def teaching_stage(asked: Mapping[str, Any], stage: str) -> tuple[str, ...]:
    """The stage of the same folder that teaches this one, if any.

    A pipeline folder teaches too, and is no stage.
    """
    taught_by = asked["networks"].get(stage, {}).get("taught_by")
    return (taught_by,) if taught_by in ORDER else ()


def max_empty_share(stages: Sequence[str] | str | None) -> float:
    """The share of pictures without a caption that the stages asked for can do with."""
    return MAX_EMPTY if OF_CAPTIONS & set(chosen(stages)) else 1.0


def chosen(stages: Sequence[str] | str | None) -> list[str]:
    """The stages asked for, or all, in the order in which they run."""
    stages = [stages] if isinstance(stages, str) else stages
    for name in stages or ():
        if name not in ORDER:
            raise ValueError(
                f"stages: no stage {name!r}{nearest(name, ORDER)}; there are {', '.join(ORDER)}"
            )
    return [name for name in ORDER if stages is None or name in stages]
