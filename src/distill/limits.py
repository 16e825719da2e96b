"""What numbers may be and files must hold: for those who use them, and for commands that refuse a mistake at once.

Nothing here imports a library that takes long.
"""

import math
from collections.abc import Sequence
from pathlib import Path

LOCAL_BATCH = 8  # samples, the most that share statistics in the heads of ADD
DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtype(name: str | None, key: str) -> None:
    """Raise ValueError, naming `key`, for what weights cannot be kept in; None is left to whom it concerns."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"{key}={name}: must be a dtype of torch: float32, bfloat16, float16")


def check_strength(steps: int, strength: float) -> None:
    """Raise ValueError unless an image noised to this strength leaves at least one of the steps to be made."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: must be above 0 and at most 1")
    if int(steps * strength) < 1:
        needed = math.ceil(1 / strength)
        raise ValueError(
            f"steps={steps} strength={strength}: their product must be at least 1; use steps={needed}"
        )


def check_zero_snr(prediction: str | None) -> None:
    """Raise ValueError for a network whose prediction says nothing of the data where none are left."""
    if prediction in ("eps", "epsilon"):
        what = "this network predicts eps, which says nothing of x0 where no data are left"
        raise ValueError(
            f"teacher.zero_terminal_snr=true: {what}; make it false, or take a teacher that predicts v"
        )


def check_local_batch(size: int, key: str) -> None:
    """Raise ValueError, naming `key`, for a batch that StyleGAN-T's local batch norm cannot part into equal groups."""
    groups = math.ceil(size / LOCAL_BATCH)
    if size % groups:
        less = next(n for n in range(size, 0, -1) if n % math.ceil(n / LOCAL_BATCH) == 0)
        what = f"the heads' local batch norm needs a multiple of {groups}, for groups of at most"
        more = math.ceil(size / LOCAL_BATCH) * LOCAL_BATCH
        raise ValueError(f"{key}={size}: {what} {LOCAL_BATCH}; use {less} or {more}")


def check_samples(
    limit: int | None, max_bad_share: float, buckets: Sequence[Sequence[int]] | None
) -> None:
    """Raise ValueError for options of data that no data set could have."""
    if limit is not None and limit < 1:
        raise ValueError(f"data.limit={limit}: must be at least 1")
    if not 0 <= max_bad_share <= 1:
        raise ValueError(f"data.max_bad_share={max_bad_share}: must be a share, from 0 to 1")
    if buckets is not None and not (buckets and all(len(b) == 2 and min(b) > 0 for b in buckets)):
        what = "must be null or like [[640, 384], [512, 512]], width and height"
        raise ValueError(f"data.buckets={buckets}: {what}")


def checkpoints_at(path: Path, key: str = "resume") -> list[Path]:
    """The checkpoints to go on from, newest first: `path` itself and those before it, or all of a run folder.

    Raises FileNotFoundError, naming `key`, if there is none.
    """
    named = path.name.endswith(".ckpt")
    folder = path.parent if named else path / "checkpoints"
    found = sorted(folder.glob("step_*.ckpt"), reverse=True)
    if named:
        found = [path, *(other for other in found if other.name < path.name)]
    if not found or not path.exists():
        raise FileNotFoundError(f"{key}={path}: holds no checkpoint to go on from")
    return found
