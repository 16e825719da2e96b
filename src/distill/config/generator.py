"""Check what belongs to a GAN's generator as the student: a method that can train it, a teacher
whose pipeline can call it, and pure noise as its only input.

Nothing here imports torch.
"""

from collections.abc import Sequence

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.storage import source_code
from distill.teachers.families import family
from distill.teachers.loading.locate import holds_generator

STUDENT = "distill.students.stylegan.stylegan"
PIPELINE = "StableDiffusion3Pipeline"  # the only one that can call it
DISCRETE = "distill.core.times.Discrete"
SHARDED = "FullyShardedDataParallel"
# Key -> what it must hold: the numbers of steps that are evaluated after a training and along it.
EVALUATED = {"metrics.student_steps": "[1]", "callbacks.scores.steps": "1"}
WHAT = "student=stylegan makes a picture in one step from pure noise"


def check_generator(cfg: DictConfig) -> None:
    """Raise ValueError for a generator with a method, teacher, levels or data that do not fit."""
    if cfg.student._target_ != STUDENT:
        return
    method = str(cfg.method._target_)
    if source_code.attribute(method, "takes_generator") is not True:
        name = method.rpartition(".")[2]
        what = f"{name} needs a student that knows every noise level, and {WHAT}"
        raise ValueError(f"student=stylegan: {what}; use method=add")
    facts = family(str(cfg.teacher._target_))
    kind = facts.kind_name() if facts else str(cfg.teacher._target_)
    if kind != PIPELINE:
        what = f"is called by a {PIPELINE}, and the teacher is a {kind}"
        raise ValueError(f"student=stylegan: {what}; choose teacher=shapes, sd3 or the like")
    if cfg.data.get("buckets"):
        what = "student=stylegan makes pictures of one size"
        raise ValueError(f"data.buckets={cfg.data.buckets}: {what}; leave it out")
    if str(OmegaConf.select(cfg, "trainer.strategy._target_")).endswith(SHARDED):
        raise ValueError("trainer=fsdp2: a GAN's generator is not sharded; use trainer=ddp")
    if cfg.method.get("levels") is not None:  # a method of the user's may have none
        _check_levels(cfg.method.levels)
    _check_evaluated(cfg)


def _check_levels(node: DictConfig) -> None:
    """Raise ValueError unless the student is trained at level 1 alone."""
    key, levels = "method.levels", node.get("levels")
    if node._target_ != DISCRETE or levels is None:
        raise ValueError(f"{key}._target_={node._target_}: {WHAT}; use {DISCRETE}, levels=[1.0]")
    names = ["odds", *(["warmup_odds"] if node.get("warmup_steps") else [])]
    for name in names:
        odds = node.get(name) or ()
        if any(level != 1 and share for level, share in zip(levels, odds, strict=False)):
            advice = f"set {key}.{name}={_at_one(levels)}"
            raise ValueError(f"{key}.{name}={list(odds)}: {WHAT}; {advice}")


def _check_evaluated(cfg: DictConfig) -> None:
    """Raise ValueError for an evaluation that has no row of one step."""
    for key, advice in EVALUATED.items():
        steps = OmegaConf.select(cfg, key)
        numbers = steps if isinstance(steps, ListConfig) else [steps]
        if steps not in (None, []) and 1 not in numbers:
            raise ValueError(f"{key}={steps}: {WHAT}; set {key}={advice}")


def _at_one(levels: Sequence[float]) -> str:
    """Odds of these levels that draw level 1 alone, as they are typed."""
    odds = [int(level == 1) for level in levels]
    return str(odds).replace(" ", "") if any(odds) else "[1] and method.levels.levels=[1.0]"


def refuse_generator(path: str, where: str, advice: str) -> None:
    """Raise ValueError, starting with `where`, for a run or pipeline folder with a generator."""
    if holds_generator(path):
        raise ValueError(
            f"{where}: holds a GAN's generator (student=stylegan), no denoiser; {advice}"
        )
