"""From a configuration to objects, in the order of the sentence: a teacher teaches a student
against a discriminator by a method, on data."""

import logging
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from distill.config import signatures, validate
from distill.config.compose import allowed, make, processes
from distill.config.fitting import refuse_misfit, say_size
from distill.config.models import teacher_of
from distill.core.tensors import gather
from distill.core.types import Cond, Players
from distill.machine.hardware import Precision, precision
from distill.machine.signals import REQUEUE, requeue
from distill.terminal.progress import stage
from distill.terminal.secret import hidden
from distill.training import loggers as trackers
from distill.training.checkpoints import AtomicIO, Checkpoints
from distill.training.loop import TwoPlayerLoop
from distill.training.run_metadata import versions
from distill.training.strategies import DataParallel, FullyShardedDataParallel

log = logging.getLogger(__name__)
# Classes that are made of numbers alone.
NUMBERS = (
    "distill.core.times.",
    "distill.core.score_distillation.",
    "distill.training.engine.",
    "distill.sampling.",
)
# Warnings that say nothing new about a run of ours.
EXPECTED = (
    ".*(does not have many workers|in eval mode|logs directory.*exists and is not empty|treespec,"
    " LeafSpec)"
)


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work before any weight is loaded.

    Raises ValueError that says what would.
    """
    validate.check_run(cfg)
    for key, node in cfg.items():  # what is made; a run itself may be called by any text
        if isinstance(node, DictConfig):
            allowed(node, str(key))
    accelerator = cfg.trainer.get("accelerator", "auto")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(accelerator, accelerator != "gpu" or any(there.values())):
        what = "there is no such GPU here; use trainer.accelerator=cpu or auto"
        raise ValueError(f"trainer.accelerator={accelerator}: {what}")
    check_numbers(cfg)
    if "_target_" in (cfg.get("metrics") or {}):
        protocol(cfg.metrics, cfg)
    _check_trainer(cfg)


def _check_trainer(cfg: DictConfig) -> None:
    """Build the trainer once for nothing: what Lightning has against it is said while nothing is
    written.
    """
    _hush()
    quiet = cfg.copy()
    if quiet.trainer.precision == "auto":
        quiet.trainer.precision = "32-true"  # settled later; any will do
    OmegaConf.update(quiet, "logger", None, force_add=True)  # some connect as soon as they are made
    trainer(quiet, Path("nowhere"), {})


def check_numbers(cfg: DictConfig) -> None:
    """Make what needs no network, so that it says now what is wrong with its numbers: ValueError,
    naming the key.
    """
    own = {f"method.{key}": node for key, node in cfg.method.items()}
    for key, node in {"optimizer": cfg.optimizer, "sampler": cfg.sampler, **own}.items():
        if not isinstance(node, DictConfig) or not str(node.get("_target_")).startswith(NUMBERS):
            continue
        try:
            make(node, key)
        except InstantiationException as error:
            cause = error.__cause__
            if not isinstance(cause, ValueError):
                raise
            said = str(cause)
            named = said.startswith(tuple(f"{group}." for group in cfg))
            raise ValueError(said if named else f"{key}: {said}") from None


def protocol(metrics: DictConfig, run: DictConfig | None) -> Any:
    """How the run of this configuration is judged.

    Raises ValueError where that cannot be, or would not be fair.
    """
    validate.check_metrics(metrics)
    made = make(metrics, "metrics")
    if run and hasattr(made, "check"):
        eyes = (
            str(OmegaConf.select(run, f"discriminator.features.{key}"))
            for key in ("_target_", "path")
        )
        made.check(*eyes)
    return made


def parts(cfg: DictConfig) -> tuple[Any, Any]:
    """The data and the method of a run; seeds the global generators, and silences Lightning's usual
    hints.
    """
    _hush()
    source = data_of(cfg)  # first: what is wrong with it shows in a moment
    null = getattr(source.dataset, "null", None)
    space = signatures.attribute(str(cfg.method._target_), "space")
    decodes = space == "pixels" and not cfg.method.get("decoder")
    teacher = teacher_of(
        cfg, deferred=["text_encoder", *([] if decodes else ["vae"])] if null else []
    )
    suit(cfg, source.dataset, teacher)
    judge = OmegaConf.select(cfg, "metrics._target_")
    # others read data when they are made, as `check` has done
    if judge and hasattr(get_object(judge), "fits"):
        make(cfg.metrics, "metrics").fits(teacher)
    seed(cfg)
    student = student_of(cfg, teacher)
    with stage("building the discriminator"):
        players = players_of(cfg, teacher, student)
    return source, make(cfg.method, "method")(players, loop=loop_of(cfg))


def seed(cfg: DictConfig) -> None:
    """Seed the global generators, and silence Lightning's usual hints.

    After the teacher is read: some families draw weights as they are read, and those of heads and
    adapters would depend on how many.
    """
    lightning.seed_everything(cfg.seed, verbose=False)
    _hush()


def data_of(cfg: DictConfig) -> Any:
    """The data, a `data.source.Source`."""
    with stage("opening the data"):
        return make(cfg.data, "data")


def suit(cfg: DictConfig, data: Any, teacher: Any) -> None:
    """Give data and teacher what they have from each other: the size, and the embedded empty
    caption.

    Raises ValueError for data that this teacher cannot read.
    """
    if hasattr(data, "fit"):  # data that are of any teacher's size
        data.fit(teacher)
    refuse_misfit(cfg, data, teacher)
    say_size(data, teacher)
    if null := getattr(data, "null", None):
        teacher.null = Cond(**{name: x.float() for name, x in null.items()})


def student_of(cfg: DictConfig, teacher: Any) -> Any:
    """The student of this teacher. Raises ValueError for one that cannot be sampled as it is to
    be.
    """
    student = make(cfg.student, "student")(teacher=teacher)
    make(cfg.sampler, "sampler").check(student)
    return student


def players_of(cfg: DictConfig, teacher: Any, student: Any, **own: Any) -> Players:
    """Teacher, student and discriminator; `own` parts take the place of the configuration's: see
    `_discriminator`.
    """
    return Players(
        teacher=teacher, student=student, **_discriminator(cfg.discriminator, teacher, **own)
    )


def loop_of(cfg: DictConfig) -> TwoPlayerLoop:
    """What trains the players."""
    return TwoPlayerLoop(make(cfg.optimizer, "optimizer"), seed=cfg.seed)


def _hush() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=EXPECTED)


def _discriminator(
    cfg: DictConfig, teacher: Any, features: Any = None, heads: Any = None, condition: Any = None
) -> dict[str, Any]:
    """Frozen features, trainable heads, and what tells the heads of a sample where the teacher's
    embedding does not.

    Nothing of it where the features are null. What is given takes the place of the configuration's:
    `features` and `condition` are objects, `heads` a module, or what is called with the widths.
    """
    if features is None and cfg.get("features") is None:
        return {}
    if features is None:
        features = make(cfg.features, "discriminator.features")
    if isinstance(features, partial):  # those that are made from the teacher
        features = features(teacher=teacher)
    if condition is None and cfg.get("condition") is not None:
        condition = make(cfg.condition, "discriminator.condition")
        condition = condition(teacher=teacher, features=features)
    if condition is None:
        pooled = teacher.embed([""]).pooled
        widths = {"pooled": 0 if pooled is None else pooled.shape[1]}
    else:
        widths = {"pooled": condition.pooled_width, "image": condition.image_width}
    if not isinstance(heads, torch.nn.Module):
        heads = _heads(heads or cfg.heads, channels=features.channels, **widths)
    found = {"features": features, "heads": heads}
    return found if condition is None else {**found, "condition": condition}


def _heads(node: Any, **widths: Any) -> Any:
    """The heads that a node, or a class itself, stands for.

    Raises ValueError for heads that say by `split` which logits are whose, as they once did: all
    would be one's.
    """
    of_node = isinstance(node, DictConfig)
    build = make(node, "discriminator.heads") if of_node else node
    heads = build(**widths)
    if hasattr(heads, "split"):
        what = (
            "its `split` is no longer read; answer with distill.core.types.Logits and leave it out"
        )
        name = node._target_ if of_node else getattr(node, "__name__", node)
        raise ValueError(f"discriminator.heads._target_={name}: {what}")
    return heads


def settle_precision(cfg: DictConfig) -> Precision:
    """Replace `trainer.precision=auto` by what is best on this machine; returns what the run has,
    and why.
    """
    accelerator = cfg.trainer.get("accelerator", "auto")
    chosen = precision(cfg.trainer.precision, accelerator, key="trainer.precision")
    cfg.trainer.precision = chosen.name
    return chosen


def trainer(
    cfg: DictConfig,
    folder: Path,
    models: Mapping[str, str],
    kept: Mapping[str, Any] | None = None,
) -> Any:
    """The Lightning trainer, with loggers and checkpoints inside the run folder.

    `models` are the marks of those that it reads (`resuming.marks`). `kept` is the checkpoint that
    the run goes on from: its loggers go on with it.
    """
    step, known = (
        (kept.get("global_step"), kept.get("about", {}).get("loggers")) if kept else (None, {})
    )
    loggers = trackers.made(cfg, folder, known, step)
    callbacks = [make(node, key) for key, node in nodes_of(cfg, "callbacks")]
    for callback in callbacks:
        if isinstance(callback, Checkpoints):
            callback.folder = folder / "checkpoints"
            callback.tracked = partial(trackers.names, loggers)
            callback.about = {
                "config": hidden(OmegaConf.to_container(cfg, resolve=True)),
                "versions": versions(),
                "content": models,
            }
    # A checkpoint holds all that was logged up to it: whoever else logs at its step does so before.
    callbacks.sort(key=lambda callback: isinstance(callback, Checkpoints))
    if cfg.trainer.precision == "auto":
        settle_precision(cfg)
    build = make(cfg.trainer, "trainer")
    strategy = build.keywords.pop("strategy", None) or (
        DataParallel() if processes(cfg) > 1 else "auto"
    )
    return build(
        strategy=strategy,
        plugins=(
            [] if isinstance(strategy, FullyShardedDataParallel) else [AtomicIO()]
        ),  # that one has its own files
        callbacks=callbacks,
        logger=list(loggers.values()),
        default_root_dir=str(folder),
        max_epochs=-1,
        enable_checkpointing=False,  # ours are atomic and count student steps
        enable_progress_bar=False,  # ours counts student steps
        enable_model_summary=False,
        use_distributed_sampler=False,  # the stream shares out samples by itself
    )


def nodes_of(cfg: DictConfig, group: str) -> list[tuple[str, DictConfig]]:
    """Dotted key and node of every callback or logger that a run has."""
    named = (cfg.get(group) or {}).items()
    return [(f"{group}.{name}", node) for name, node in named if node]


def averaged(method: Any, *, first: bool) -> dict[str, Any]:
    """The averages of the student, whole, in the first process; all processes must call this."""
    return gather(method.ema.state_dict(), keep=first)


def whole(cfg: DictConfig, method: Any, average: dict[str, Any]) -> tuple[Any, Any]:
    """Teacher and averaged student as one process can use them; made anew where the strategy has
    cut them up.

    Both where the teacher is: Lightning takes what it has trained back to the CPU.
    """
    teacher, student, device = method.teacher, method.student, method.teacher.device
    if method.sharded:
        teacher = make(cfg.teacher, "teacher")
        student = make(cfg.student, "student")(teacher=teacher)
    student.load_state_dict(average, strict=False)
    return teacher.to(device), student.to(device).eval()


def stopped(trainer: Any, method: Any, folder: Path) -> int:
    """The exit code of a run that a signal has ended, said in words; 0 if none has."""
    by = next((c.stopped_by for c in trainer.callbacks if isinstance(c, Checkpoints)), None)
    if by and trainer.is_global_zero:
        print(
            f"stopped by {by.name} at step {method.step}; go on with: python -m distill.run"
            f" resume={folder}"
        )
        if by == REQUEUE:
            requeue()
    return 128 + by if by and by != REQUEUE else 0
