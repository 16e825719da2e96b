"""Limits of numbers and files, checked where they are used and by commands before a run starts.

Nothing here imports a slow library.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOCAL_BATCH = 8  # samples, at most, that share batch norm statistics in the heads of ADD
DTYPES = ("float32", "bfloat16", "float16", "float64")
AT_ONCE = 1024 * 1024  # ours: pixels of one autoencoder batch; in bfloat16 1.5 to 2.2 GiB
# ours: bytes for one picture of AT_ONCE pixels; an upper bound over families and dtypes
BYTES_AT_ONCE = 4 * 2**30


def at_once(height: int, width: int, most: int | None = None) -> int:
    """Number of pictures of this size that pass through an autoencoder or a network in one batch.

    As many as have AT_ONCE pixels together: 1 of 1024x1024, 4 of 512x512, 16 of 256x256. At most
    `most`, and at least one.
    """
    count = max(1, AT_ONCE // (height * width))
    return count if most is None else min(count, most)


def drawn_at_once(height: int, width: int, most: int, room: float | None = None) -> int:
    """Default batch size for generating pictures of this size.

    As many as have four times AT_ONCE pixels: 4 of 1024x1024, 16 of 512x512. At most `most`, at
    most what fits in `room` bytes at BYTES_AT_ONCE for AT_ONCE pixels, and at least one.
    """
    count = min(most, at_once(height, width, most) * 4)
    if room is None:
        return max(1, count)
    return max(1, min(count, int(room / (BYTES_AT_ONCE * height * width / AT_ONCE))))


def check_space(wanted: str | None, given: str | None) -> None:
    """Raise ValueError if a method needs a discriminator of another space than the given one.

    Each is pixels, latents or nothing; None is unknown, and passes.
    """
    if wanted and given and wanted != given:
        what = f"method needs a discriminator of {wanted}, and this one works on {given}"
        raise ValueError(f"{what}; choose another discriminator=")


def check_dtype(name: str | None, key: str, *more: str) -> None:
    """Raise ValueError, naming `key`, for a dtype in which weights cannot be kept. None passes.

    `more` are other values that the key accepts.
    """
    if name is not None and name not in (*DTYPES, *more):
        words = ", ".join([*more, "float32", "bfloat16", "float16"])
        raise ValueError(f"{key}={name}: must be a dtype of torch: {words}")


def check_reduction(dtype: Any, bucket_mib: Any = 1.0, key: str = "trainer.strategy") -> None:
    """Raise ValueError for a dtype or a bucket in which gradients cannot be summed over ranks.

    float16 is none of them: gradients are not scaled, and their sum could overflow.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"{key}.reduce_dtype={dtype}: must be float32 or bfloat16")
    if isinstance(bucket_mib, bool) or not isinstance(bucket_mib, int | float):
        raise ValueError(f"{key}.bucket_mib={bucket_mib}: must be a number of MiB")
    if not 0 < bucket_mib < math.inf:
        raise ValueError(f"{key}.bucket_mib={bucket_mib}: must be above 0")


def after_divergence(folder: Path, precision: str, learning: Sequence[str]) -> str:
    """Advice for a run whose gradients stay not finite: where to resume, and which setting to
    change.

    `learning` are the keys of the learning rates, `precision` is that of the run.
    """
    changes = [f"a lower {' and '.join(learning)}"]
    changes += [] if precision == "32-true" else ["trainer.precision=32-true"]
    how = " or ".join(changes)
    if any((folder / "checkpoints").glob("step_*.ckpt")):
        return f"resume an earlier state by resume={folder}, or one of its checkpoints, with {how}"
    return f"it has no checkpoint yet: start anew with {how}"


def steps_left(steps: int, strength: float, rounds_up: bool = False) -> int:
    """Number of `steps` that remain for an image noised to `strength`, in (0, 1], as in diffusers.

    The pipelines of Stable Diffusion and SDXL take int(steps * strength). Those of SD3 and FLUX
    skip int(steps - steps * strength), which rounds the rest up: `rounds_up`.
    """
    return steps - int(steps - steps * strength) if rounds_up else int(steps * strength)


def check_strength(steps: int, strength: float, rounds_up: bool = False) -> None:
    """Raise ValueError unless an image noised to this strength leaves at least one step.

    Also for one step with a strength below 1: SD3's pipeline would start from pure noise.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: must be above 0 and at most 1")
    if steps_left(steps, strength, rounds_up) < 1 or (steps == 1 and strength < 1):
        needed = 2 if rounds_up else math.ceil(1 / strength)
        what = "their product must be at least 1"
        raise ValueError(f"steps={steps} strength={strength}: {what}; use steps={needed}")


def check_zero_snr(prediction: str | None) -> None:
    """Raise ValueError for a network whose prediction does not determine x0 at pure noise."""
    if prediction in ("eps", "epsilon"):
        what = "this network predicts eps, which says nothing of x0 where no data are left"
        raise ValueError(
            f"teacher.zero_terminal_snr=true: {what}; make it false, or take a teacher that"
            " predicts v"
        )
    if str(prediction).startswith("flow"):
        raise ValueError(
            "teacher.zero_terminal_snr=true: this network predicts a flow, which ends in noise;"
            " make it false"
        )


def check_local_batch(size: int, key: str) -> None:
    """Raise ValueError, naming `key`, for a batch that StyleGAN-T's local batch norm cannot split
    into equal groups.
    """
    groups = math.ceil(size / LOCAL_BATCH)
    if size % groups:
        less = next(n for n in range(size, 0, -1) if n % math.ceil(n / LOCAL_BATCH) == 0)
        what = f"the heads' local batch norm needs a multiple of {groups}, for groups of at most"
        more = math.ceil(size / LOCAL_BATCH) * LOCAL_BATCH
        raise ValueError(f"{key}={size}: {what} {LOCAL_BATCH}; use {less} or {more}")


def check_samples(
    limit: int | None,
    max_bad_share: float,
    buckets: Sequence[Sequence[int]] | None,
    max_empty_share: float = 1.0,
) -> None:
    """Raise ValueError for data options that no data set could satisfy."""
    if limit is not None and limit < 1:
        raise ValueError(f"data.limit={limit}: must be at least 1")
    for key, share in (("max_bad_share", max_bad_share), ("max_empty_share", max_empty_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"data.{key}={share}: must be a share, from 0 to 1")
    if buckets is not None and not (buckets and all(map(_is_bucket, buckets))):
        what = "must be null or like [[640, 384], [512, 512]], width and height"
        raise ValueError(f"data.buckets={buckets}: {what}")


def check_multiples(size: int | None, buckets: Sequence[Sequence[int]] | None, unit: int) -> None:
    """Raise ValueError for sides of pictures or latents that are not multiples of the teacher's
    token size.
    """
    for bucket in buckets or ():
        if any(side % unit for side in bucket):
            what = f"must be multiples of {unit} for this teacher"
            near = [max(unit, side // unit * unit) for side in bucket]
            raise ValueError(f"data.buckets: {list(bucket)} {what}; use {near}")
    if size and size % unit and not buckets:
        near = max(unit, size // unit * unit)
        what = f"must be a multiple of {unit} for this teacher"
        raise ValueError(f"data.size={size}: {what}; use {near} or {near + unit}")


def _is_bucket(sides: object) -> bool:
    pair = isinstance(sides, Sequence) and len(sides) == 2
    return pair and all(type(side) is int and 0 < side < 2**31 for side in sides)
