"""Limits of numbers and files, checked where they are used and by commands before a run starts.

Nothing here imports a slow library.
"""

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PIXELS = "pixels"  # what ADD's discriminator works on
FAKE_SCORE = "a fake score"  # what DMD2's discriminator works on
FRAMES = 4  # of a video that an autoencoder encodes together, after the first one
LOCAL_BATCH = 8  # samples, at most, that share batch norm statistics in the heads of ADD
# What a model that also reads pictures does, by the fact `image` of its family.
DOES = {"mask": "fills masked parts of pictures", "source": "edits pictures"}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Settings of a shift by the size of the picture, their types and these in words.
SHIFT: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("base_shift", "max_shift"), (int | float, "a number")),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len", "patch"), (int, "a whole number")),
    "time_shift_type": (str, "exponential or linear"),
}
LARGEST_SCALE = 1000  # ours: of guidance and of a LoRA; far above any use, far below overflow
MOST_PIXELS = 2**26  # ours: of a picture that is read or made, 8192 x 8192
AT_ONCE = 1024 * 1024  # ours: pixels of one autoencoder batch; in bfloat16 1.5 to 2.2 GiB
# ours: bytes for one picture of AT_ONCE pixels; an upper bound over families and dtypes
BYTES_AT_ONCE = 4 * 2**30
NO_SAMPLES = (
    "method.real=null: these data are captions alone, without samples; set method.real, by which"
    " the teacher generates them, as in experiment=nitrosd_realism, or give data with samples"
)


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

    Each is pixels, latents, a fake score or nothing; None is unknown, and passes.
    """
    if wanted and given and wanted != given:
        what = f"method needs a discriminator of {wanted}, and this one works on {given}"
        raise ValueError(f"{what}; choose another discriminator=")


def check_distillation(weight: float, space: str, crop: int | None, *, across: bool) -> None:
    """Raise ValueError for options of ADD's distillation term; `across`: there is a score_teacher,
    a teacher of another family than the student's.
    """
    if space not in ("pixels", "latents"):
        raise ValueError(f"method.distill_space={space}: must be pixels or latents")
    if not across:
        return
    if not weight:
        what = "leaves score_teacher without work; raise it, or leave score_teacher out"
        raise ValueError(f"method.distill_weight={weight:g}: {what}")
    if space != "pixels":
        what = "score_teacher has other latents than the student; make it pixels"
        raise ValueError(f"method.distill_space={space}: {what}")
    if crop is not None:
        what = "score_teacher sees the whole picture; make it null"
        raise ValueError(f"method.crop={crop}: {what}")


def check_score_teacher(method: str, takes: bool) -> None:
    """Raise ValueError for a second teacher of a method that reads its teacher in latents."""
    if not takes:
        what = (
            f"{method} reads its one teacher in the student's own latents; use method=add, whose"
            " distillation goes through pixels"
        )
        raise ValueError(f"score_teacher: {what}")


def check_adapted(targets: Sequence[str] | None) -> None:
    """Raise ValueError for a LoRA of no layer; None: the family's layers."""
    if targets is not None and not targets:
        what = "names no layer, so nothing would be trained"
        raise ValueError(f"student.targets=[]: {what}; name some, or leave it out")


def check_falling(levels: Sequence[float], key: str) -> None:
    """Raise ValueError, naming `key`, for levels of sampling steps that do not fall from 1 to above
    0.
    """
    falling = all(a > b for a, b in itertools.pairwise([*levels, 0.0]))
    if not levels or levels[0] != 1 or not falling:
        raise ValueError(f"{key}={list(levels)}: must fall from 1, and stay above 0")


def check_frames(frames: int, key: str = "teacher.frames") -> None:
    """Raise ValueError, naming `key`, unless an autoencoder of videos can encode so many frames."""
    if frames > 0 and frames % FRAMES == 1:
        return
    near = max(1, frames // FRAMES * FRAMES + 1)
    what = f"must be 1 more than a multiple of {FRAMES}"
    raise ValueError(f"{key}={frames}: {what}; use {near} or {near + FRAMES}")


def check_guidance_scale(value: Any, key: str, least: int = 0) -> None:
    """Raise ValueError, naming `key`, for a guidance that is no number from `least` to
    LARGEST_SCALE.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value}: must be a number")
    if not least <= value <= LARGEST_SCALE:
        raise ValueError(f"{key}={value}: must be from {least} to {LARGEST_SCALE}")


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


def check_replicas(replicas: Any, processes: int | None = None) -> None:
    """Raise ValueError for a number of replicas into which so many processes cannot be divided; for
    None the processes are not known yet.
    """
    key = f"trainer.strategy.replicas={replicas}"
    if type(replicas) is not int or replicas < 1:
        raise ValueError(f"{key}: must be a whole number of at least 1")
    if processes is not None and processes % replicas:
        raise ValueError(f"{key}: must divide the number of processes, which is {processes}")


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
    if buckets is not None:
        _check_sizes(buckets, "data.buckets")


def check_buckets(buckets: object, shares: Any, key: str = "") -> None:
    """Raise ValueError for sizes that are no [width, height], or for shares that do not fit them.

    `key` is the dotted prefix of both settings. None stands for one size, and for equal shares.
    """
    if buckets is None:
        if shares is not None:
            raise ValueError(f"{key}shares={shares}: has no buckets to share; give {key}buckets=")
        return
    sizes = _check_sizes(buckets, f"{key}buckets")
    if shares is None:
        return
    numbers = isinstance(shares, Sequence) and all(_is_share(share) for share in shares)
    if not numbers or len(shares) != len(sizes) or not sum(shares) > 0:
        what = f"must be {len(sizes)} numbers, 0 or more, one for each of {key}buckets"
        raise ValueError(f"{key}shares={shares}: {what}")


def drawn_bucket(
    buckets: Sequence[Sequence[int]], shares: Sequence[float] | None, u: float
) -> tuple[int, int]:
    """The bucket, (width, height), at u in [0, 1) of the line that their shares divide."""
    sums = list(itertools.accumulate(shares or [1.0] * len(buckets)))
    # A share of 0 is never drawn: u * total is below the last sum, and bisect passes equal ones.
    width, height = buckets[min(bisect.bisect_right(sums, u * sums[-1]), len(buckets) - 1)]
    return width, height


def check_shift(settings: Mapping[str, Any], key: str) -> None:
    """Raise ValueError for settings of a shift by the size of the picture that cannot be; `key` is
    theirs. See `times.ResolutionShift`.
    """
    for name, value in settings.items():
        if name not in SHIFT:
            what = f"is no setting of a shift, which are {', '.join(SHIFT)}"
            raise ValueError(f"{key}.{name}: {what}; leave it out")
        kind, word = SHIFT[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ValueError(f"{key}.{name}={value}: must be {word}")
    kind_of = settings.get("time_shift_type", "exponential")
    if kind_of not in ("exponential", "linear"):
        raise ValueError(f"{key}.time_shift_type={kind_of}: must be exponential or linear")
    for name in ("base_shift", "max_shift"):
        shift = settings.get(name, 1.0)
        if not math.isfinite(shift) or (kind_of == "linear" and shift <= 0):
            raise ValueError(f"{key}.{name}={shift}: must be finite, and above 0 if it is linear")
    for name in ("base_image_seq_len", "max_image_seq_len", "patch"):
        if settings.get(name, 1) < 1:
            raise ValueError(f"{key}.{name}={settings[name]}: must be at least 1")
    base, most = (
        settings.get(f"{end}_image_seq_len", n) for end, n in (("base", 256), ("max", 4096))
    )
    if base >= most:
        what = f"must be below max_image_seq_len={most}"
        raise ValueError(f"{key}.base_image_seq_len={base}: {what}")


def check_pixels(size: Any, key: str) -> None:
    """Raise ValueError, naming `key`, for a size of too many pixels: a side, or [width, height].
    None passes.
    """
    pixels = math.prod(size if isinstance(size, Sequence) else [size or 1] * 2)
    if pixels > MOST_PIXELS:
        most = f"at most {MOST_PIXELS // 10**6} million are made"
        what = f"is {pixels // 10**6} million pixels, and {most}; make it smaller"
        raise ValueError(f"{key}={size}: {what}")


def check_sides(
    size: Any,
    buckets: Sequence[Sequence[int]] | None,
    unit: int,
    most: float = math.inf,
    key: str = "data.",
) -> None:
    """Raise ValueError for sides of pictures or latents that are not multiples of the teacher's
    token size, or larger than `most`. `key` is the dotted prefix of both settings; size is a side,
    or [width, height].
    """
    for bucket in buckets or ():
        near = [_near(side, unit, most) for side in bucket]
        if near != list(bucket):
            what = f"must be {_allowed(bucket, unit, most)} for this teacher"
            raise ValueError(f"{key}buckets: {list(bucket)} {what}; use {near}")
    sides = list(size) if isinstance(size, Sequence) else [size] if size else []
    near = [_near(side, unit, most) for side in sides]
    if near != sides and not buckets:
        use = near if len(near) > 1 else f"{near[0]}"
        if len(near) == 1 and near[0] + unit <= most:
            use = f"{near[0]} or {near[0] + unit}"
        what = f"must be {_allowed(sides, unit, most)}"
        raise ValueError(f"{key}size={size}: {what} for this teacher; use {use}")


def _near(side: int, unit: int, most: float) -> int:
    """The largest side that is allowed and not above this one, or the smallest."""
    return max(unit, int(min(side, most)) // unit * unit)


def _allowed(sides: Sequence[int], unit: int, most: float) -> str:
    """In words, the first of two rules that these sides break."""
    if any(side % unit for side in sides):
        return f"{'a multiple' if len(sides) == 1 else 'multiples'} of {unit}"
    return f"at most {most}"


def _is_share(share: object) -> bool:
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    return is_number and 0 <= share < math.inf  # type: ignore[operator]


def _check_sizes(buckets: Any, key: str) -> Sequence[Sequence[int]]:
    """The sizes, if they are [width, height] each, one or more, and none is there twice."""
    if not isinstance(buckets, Sequence) or not buckets or not all(map(_is_bucket, buckets)):
        what = "must be null or like [[640, 384], [512, 512]], width and height"
        raise ValueError(f"{key}={buckets}: {what}")
    sizes = [list(size) for size in buckets]
    if twice := [size for i, size in enumerate(sizes) if size in sizes[:i]]:
        raise ValueError(f"{key}={sizes}: has {twice[0]} twice; name each size once")
    return sizes


def _is_bucket(sides: object) -> bool:
    pair = isinstance(sides, Sequence) and len(sides) == 2
    return pair and all(type(side) is int and 0 < side < 2**31 for side in sides)
