"""Numbers of a run that no class could do with, known before a weight is read."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

# Whole numbers, and the least that each may be: of a run, and of its judging.
COUNTS = dict.fromkeys(
    ("seed", "data.num_workers", "optimizer.warmup_steps", "optimizer.head_start"), 0
) | dict.fromkeys(
    (
        "data.batch_size", "data.size", "optimizer.accumulate", "optimizer.discriminator_updates",
        "optimizer.stop_after_bad", "trainer.max_steps", "trainer.num_nodes",
        "trainer.log_every_n_steps", "callbacks.samples.every", "callbacks.samples.count", "callbacks.checkpoint.every",
    ),
    1,
)  # fmt: skip
JUDGING = {"prompts": 4, "seed": 0, "size": 1, "batch_size": 1, "workers": 0}
SHARE = (0, 1)
# Key -> least and largest value; None leaves a side open.
RANGES: dict[str, tuple[float | None, float | None]] = {
    "callbacks.checkpoint.archive": (0, None),
    "callbacks.checkpoint.keep": (0, None),
    "discriminator.features.crop": SHARE,
    "discriminator.features.patch": SHARE,
    "discriminator.features.size": (1, None),
    "discriminator.heads.kernel": (1, None),
    "discriminator.heads.layers": (1, None),
    "discriminator.heads.refresh": SHARE,
    "discriminator.heads.size": (1, None),
    "discriminator.heads.width": (1, None),
    "method.adversarial_weight": (0, None),
    "method.crop": (1, None),
    "method.distill.guidance": (0, None),
    "method.distill.high": SHARE,
    "method.distill.low": SHARE,
    "method.distill_weight": (0, None),
    "method.guidance": (0, None),
    "method.huber": (0, None),
    "method.keep": SHARE,
    "method.misaligned": (0, None),
    "method.opening": (0, None),
    "method.pairs_weight": (0, None),
    "method.r1_every": (1, None),
    "method.r1_weight": (0, None),
    "method.real.guidance": (0, None),
    "method.renoise.s": (0, None),
    "method.steps": (1, None),
    "metrics.guidance": (0, None),
    "optimizer.clip_discriminator": (0, None),
    "optimizer.clip_student": (0, None),
    "optimizer.discriminator.lr": (0, None),
    "optimizer.discriminator.weight_decay": (0, None),
    "optimizer.ema_decay": SHARE,
    "optimizer.final_rate": SHARE,
    "optimizer.student.lr": (0, None),
    "optimizer.student.weight_decay": (0, None),
    "student.alpha": (0, None),
    "teacher.guidance": (0, None),
}


def check_ranges(cfg: DictConfig) -> None:
    """Raise ValueError for a number outside its range, NaN among them; what is no number is said elsewhere."""
    for key, (least, most) in RANGES.items():
        value: Any = OmegaConf.select(cfg, key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low = -float("inf") if least is None else least
        high = float("inf") if most is None else most
        if not low <= value <= high:
            what = f"from {least} to {most}" if most is not None else f"{least} or more"
            raise ValueError(f"{key}={value}: must be {what}")
