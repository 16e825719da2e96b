"""What a teacher of videos cannot be given. Nothing here imports torch."""

from typing import Any

from omegaconf import DictConfig

from distill.config.compose import check_counts
from distill.config.picture_keys import family_of_run
from distill.config.sources import EDIT_PAIRS, IMAGES
from distill.core.limits import PIXELS, check_frames
from distill.storage import source_code
from distill.teachers.families import Family, family


def of_videos(teacher: Any) -> bool:
    """Whether the teacher of this configuration makes videos."""
    facts = family(str(teacher.get("_target_"))) if teacher else None
    return facts is not None and facts.video


def check_videos(cfg: DictConfig) -> None:
    """Check the method, the data and the metrics of a run whose teacher makes videos."""
    if not of_videos(cfg.teacher):
        return
    check_counts(cfg, {f"teacher.{key}": 1 for key in ("height", "width", "length", "fps")})
    if isinstance(frames := cfg.teacher.get("frames"), int):
        check_frames(frames)
    target, what = str(cfg.method._target_), "and this teacher makes videos"
    if source_code.attribute(target, "space") == PIXELS:
        # Ours: a gradient through the decoder of all frames takes more memory than the denoiser.
        other = "use method=ladd or method=nitrofusion, whose heads read latents"
        raise ValueError(f"method._target_={target}: judges pictures, {what}; {other}")
    if cfg.data.get("_target_") in (IMAGES, EDIT_PAIRS):
        other = "generate samples by distill.synthesize for data=synthetic, or use data=prompts"
        raise ValueError(f"data: these are pictures, {what}; {other}")
    if "measures" in (cfg.get("metrics") or {}):  # those of `shapes` refuse it by `fits`
        raise ValueError(f"metrics: they score pictures, {what}; leave them out by ~metrics")


def refuse_videos(run: str, command: str) -> None:
    """Raise ValueError for a model of videos, where a command reads or shows pictures."""
    facts = family_of_run(run)
    if facts is not None and facts.video:
        what = f"makes videos, and {command} is for pictures"
        raise ValueError(f"run={run}: {what}; use the sample command")


def check_text_alone(family: Family, cfg: DictConfig) -> None:
    """Check that `sample` is given no picture for a model of videos."""
    for key in ("image", "mask"):
        if family.video and cfg[key] is not None:
            what = f"run={cfg.run} makes videos from text alone"
            raise ValueError(f"{key}={cfg[key]}: {what}; leave it out")
