"""What numbers may be and files must hold: for those who use them, and for commands that refuse a
mistake at once.

Nothing here imports a library that takes long.
"""

import math
from collections.abc import Sequence
from pathlib import Path

LOCAL_BATCH = 8  # samples, the most that share statistics in the heads of ADD
DTYPES = ("float32", "bfloat16", "float16", "float64")
AT_ONCE = 1024 * 1024  # ours: pixels through an autoencoder together; in bfloat16 1.5 to 2.2 GiB
EACH = (
    4 * 2**30
)  # ours: bytes for a picture of AT_ONCE pixels, of any family and dtype: more than counted


def at_once(height: int, width: int, most: int | None = None) -> int:
    """How many pictures of so many pixels go through an autoencoder or a network together.

    As many as make AT_ONCE pixels: 1 of 1024x1024, 4 of 512x512, 16 of 256x256; not above `most`,
    and one at least.
    """
    many = max(1, AT_ONCE // (height * width))
    return many if most is None else min(many, most)


def drawn_at_once(height: int, width: int, most: int, room: float | None = None) -> int:
    """How many pictures of so many pixels a model draws together where nobody says.

    As many as make four times AT_ONCE pixels: 4 of 1024x1024, 16 of 512x512. Not above `most`, nor
    above what fits in `room` bytes at EACH for AT_ONCE pixels; one at least.
    """
    many = min(most, at_once(height, width, most) * 4)
    if room is None:
        return max(1, many)
    return max(1, min(many, int(room / (EACH * height * width / AT_ONCE))))


def check_space(wanted: str | None, given: str | None) -> None:
    """Raise ValueError where a method reads a discriminator of other things than this one.

    Both are pixels, latents or nothing; None is unknown, and passes.
    """
    if wanted and given and wanted != given:
        what = f"method reads a discriminator of {wanted}, and this discriminator looks at {given}"
        raise ValueError(f"{what}; choose another discriminator=")


def check_dtype(name: str | None, key: str, *more: str) -> None:
    """Raise ValueError, naming `key`, for what weights cannot be kept in; None is left to whom it
    concerns.

    `more` are other words that the key may have.
    """
    if name is not None and name not in (*DTYPES, *more):
        words = ", ".join([*more, "float32", "bfloat16", "float16"])
        raise ValueError(f"{key}={name}: must be a dtype of torch: {words}")


def after_divergence(folder: Path, precision: str, learning: Sequence[str]) -> str:
    """How a run goes on whose gradients stay not finite: from a checkpoint where it has one, and by
    what is not so yet.

    `learning` are the keys of the rates, `precision` is the run's.
    """
    ways = [f"a lower {' and '.join(learning)}"]
    ways += [] if precision == "32-true" else ["trainer.precision=32-true"]
    how = " or ".join(ways)
    if any((folder / "checkpoints").glob("step_*.ckpt")):
        return f"go on from before that by resume={folder}, or one of its checkpoints, with {how}"
    return f"it has no checkpoint yet: begin anew with {how}"


def steps_left(steps: int, strength: float, rounds_up: bool = False) -> int:
    """How many of `steps` are made of an image that is noised to `strength`, in (0, 1], as
    diffusers counts them.

    Its pipelines of Stable Diffusion and SDXL make int(steps * strength); those of SD3 and FLUX
    leave int(steps - steps * strength) out, which `rounds_up` what is made.
    """
    return steps - int(steps - steps * strength) if rounds_up else int(steps * strength)


def check_strength(steps: int, strength: float, rounds_up: bool = False) -> None:
    """Raise ValueError unless an image noised to this strength leaves at least one of the steps to
    be made.

    And unless something is left of the image in one step, which SD3's pipeline would make of noise
    alone.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: must be above 0 and at most 1")
    if steps_left(steps, strength, rounds_up) < 1 or (steps == 1 and strength < 1):
        needed = 2 if rounds_up else math.ceil(1 / strength)
        what = "their product must be at least 1"
        raise ValueError(f"steps={steps} strength={strength}: {what}; use steps={needed}")


def check_zero_snr(prediction: str | None) -> None:
    """Raise ValueError for a network whose prediction says nothing of the data where none are
    left.
    """
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
    """Raise ValueError, naming `key`, for a batch that StyleGAN-T's local batch norm cannot part
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
    """Raise ValueError for options of data that no data set could have."""
    if limit is not None and limit < 1:
        raise ValueError(f"data.limit={limit}: must be at least 1")
    for key, share in (("max_bad_share", max_bad_share), ("max_empty_share", max_empty_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"data.{key}={share}: must be a share, from 0 to 1")
    if buckets is not None and not (buckets and all(map(_is_bucket, buckets))):
        what = "must be null or like [[640, 384], [512, 512]], width and height"
        raise ValueError(f"data.buckets={buckets}: {what}")


def check_multiples(size: int | None, buckets: Sequence[Sequence[int]] | None, unit: int) -> None:
    """Raise ValueError for sides of pictures or latents that are not multiples of what the teacher
    makes a token of.
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
