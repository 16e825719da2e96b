"""Build the objects of a run from its configuration: data, teacher, student, discriminator, method
and trainer.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from distill.config import quantizing, validate
from distill.config.compose import checked_node, make, processes
from distill.config.fitting import check_data_fits, warn_size
from distill.config.models import teacher_of
from distill.config.optimizers import check_on_device
from distill.config.score_teacher import naming_it
from distill.core.tensors import gather
from distill.core.types import Cond, Players, mask_is_ones
from distill.data.source import Source
from distill.machine.hardware import Precision, precision
from distill.machine.ranks import rank
from distill.machine.signals import REQUEUE, requeue
from distill.sampling.shifts import check_shift
from distill.storage import source_code
from distill.terminal.progress import stage
from distill.terminal.secret import masked_tree
from distill.training import loggers as trackers
from distill.training.callbacks import Samples
from distill.training.captions import embed_before
from distill.training.checkpoints import AtomicIO, Checkpoints
from distill.training.loop import TwoPlayerLoop
from distill.training.loop_settings import Optimizers
from distill.training.run_metadata import versions
from distill.training.scoring import Scores
from distill.training.speed import speed_of
from distill.training.strategies import DataParallel, FullyShardedDataParallel

log = logging.getLogger(__name__)
# Modules of classes that are built only from numbers.
NUMBERS = (
    "distill.core.times.",
    "distill.core.score_distillation.",
    "distill.training.loop_settings.",
    "distill.sampling.",
)
# Warnings that are expected in every run.
EXPECTED = (
    ".*(does not have many workers|in eval mode|logs directory.*exists and is not empty|treespec,"
    " LeafSpec|overridden `on_before_batch_transfer`|Mismatch dtype between input and weight)"
)


def check(cfg: DictConfig) -> None:
    """Raise ValueError for a configuration that cannot work, before weights are read."""
    validate.check_run(cfg)
    for key, node in cfg.items():  # nodes only: `name` and other texts may hold anything
        if isinstance(node, DictConfig):
            checked_node(node, str(key))
    accelerator = cfg.trainer.get("accelerator", "auto")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(accelerator, accelerator != "gpu" or any(available.values())):
        what = "there is no such GPU here; use trainer.accelerator=cpu or auto"
        raise ValueError(f"trainer.accelerator={accelerator}: {what}")
    check_on_device(cfg)
    quantizing.check_on_device(cfg)
    check_numbers(cfg)
    if "_target_" in (cfg.get("metrics") or {}):
        protocol(cfg.metrics, cfg)
    _check_trainer(cfg)


def _check_trainer(cfg: DictConfig) -> None:
    """Build a trainer and drop it: Lightning's errors come before anything is written."""
    _quiet_lightning()
    copy = cfg.copy()
    if copy.trainer.precision == "auto":
        copy.trainer.precision = "32-true"  # chosen later; any value serves here
    OmegaConf.update(copy, "logger", None, force_add=True)  # some connect when they are built
    trainer(copy, Path("nowhere"), {})


def check_numbers(cfg: DictConfig) -> None:
    """Build the objects that need no network. Raises ValueError, naming the key, for a number that
    their classes refuse.
    """
    of_method = {f"method.{key}": node for key, node in cfg.method.items()}
    for key, node in {"loop": cfg.loop, "sampler": cfg.sampler, **of_method}.items():
        if not isinstance(node, DictConfig) or not str(node.get("_target_")).startswith(NUMBERS):
            continue
        try:
            make(node, key)
        except InstantiationException as error:
            cause = error.__cause__
            if not isinstance(cause, ValueError):
                raise
            message = str(cause)
            names_key = message.startswith(tuple(f"{group}." for group in cfg))
            raise ValueError(message if names_key else f"{key}: {message}") from None


def protocol(metrics: DictConfig, run: DictConfig | None) -> Any:
    """The evaluation protocol, for the run of this configuration.

    Raises ValueError for one that cannot work, or would favour the run.
    """
    validate.check_metrics(metrics)
    found = make(metrics, "metrics")
    if run and hasattr(found, "check"):
        features = "discriminator.features"
        target, path = (OmegaConf.select(run, f"{features}.{key}") for key in ("_target_", "path"))
        found.check(str(target), str(path))
    return found


def build_training(cfg: DictConfig) -> tuple[Any, Any]:
    """The data and the method of a run. Seeds the global generators, and silences hints of
    Lightning.
    """
    source = data_of(cfg)  # first: its errors come quickly
    if not isinstance(source, Source):
        what = f"makes a {type(source).__name__}, and must make a distill.data.source.Source"
        raise ValueError(f"data._target_={cfg.data._target_}: {what}; return one")
    null = getattr(source.dataset, "null", None)
    once = getattr(source.dataset, "embed_once", False)
    space = source_code.attribute(str(cfg.method._target_), "space")
    decodes = space == "pixels" and not cfg.method.get("decoder")
    unread = ["vae"] if null and not decodes else []
    teacher = teacher_of(cfg, deferred=["text_encoder", *unread] if null or once else [])
    if once:  # before the seed is set: loading may draw random numbers
        teacher.embed([""])
    check_and_fit(cfg, source.dataset, teacher)
    metrics = OmegaConf.select(cfg, "metrics._target_")
    # Only protocols with `fits`: others read data when they are built, which `check` has done.
    if metrics and hasattr(get_object(metrics), "fits"):
        make(cfg.metrics, "metrics").fits(teacher)
    seed(cfg)
    student = student_of(cfg, teacher)
    with stage("building the discriminator"):
        players = players_of(cfg, teacher, student)
    method = make(cfg.method, "method")(players, loop=loop_of(cfg))
    for key, part in {
        "levels": getattr(method, "levels", None),
        "real": method.teacher_samples,
    }.items():
        if shift := getattr(part, "shift", None):
            check_shift(shift, teacher, f"method.{key}.shift")
    embed_before(source.dataset, method)
    return source, method


def seed(cfg: DictConfig) -> None:
    """Seed the global generators, and silence Lightning's usual hints.

    Call it after the teacher is loaded. Loading some families draws random numbers, and the initial
    weights of heads and adapters must not depend on how many.
    """
    lightning.seed_everything(cfg.seed, verbose=False)
    _quiet_lightning()


def data_of(cfg: DictConfig) -> Any:
    """The data, a `data.source.Source`."""
    with stage("opening the data"):
        return make(cfg.data, "data")


def check_and_fit(cfg: DictConfig, data: Any, teacher: Any) -> None:
    """Give the data the teacher's size, and the teacher the data's embedded empty caption.

    Raises ValueError for data that this teacher cannot use.
    """
    if hasattr(data, "fit"):  # data that take the size of the teacher
        data.fit(teacher)
    check_data_fits(cfg, data, teacher)
    warn_size(data, teacher)
    if null := getattr(data, "null", None):
        embedded = {name: x.float() for name, x in null.items()}
        teacher.null = Cond(**embedded, all_ones=mask_is_ones(embedded))


def student_of(cfg: DictConfig, teacher: Any) -> Any:
    """The student of this teacher. Raises ValueError if the sampler does not fit it."""
    student = make(cfg.student, "student")(teacher=teacher)
    make(cfg.sampler, "sampler").check(student)
    return student


def players_of(
    cfg: DictConfig, teacher: Any, student: Any, score_teacher: Any = None, **own: Any
) -> Players:
    """Teacher, student and discriminator. `score_teacher`, and the parts in `own`, replace those of
    the configuration: see `_discriminator`.
    """
    discriminator = _discriminator(cfg.discriminator, teacher, **own)
    other = score_teacher if score_teacher is not None else score_teacher_of(cfg)
    return Players(teacher=teacher, student=student, score_teacher=other, **discriminator)


def score_teacher_of(cfg: DictConfig) -> Any:
    """The teacher of another family that scores the student's samples, or None."""
    if not cfg.get("score_teacher"):
        return None
    with naming_it():
        return make(cfg.score_teacher, "score_teacher")


def loop_of(cfg: DictConfig) -> TwoPlayerLoop:
    """The training loop, with its optimisers."""
    fake_score = cfg.optimizer.get("fake_score")
    optimizers = Optimizers(
        student=make(cfg.optimizer.student, "optimizer.student"),
        discriminator=make(cfg.optimizer.discriminator, "optimizer.discriminator"),
        fake_score=make(fake_score, "optimizer.fake_score") if fake_score else None,
    )
    return TwoPlayerLoop(optimizers, make(cfg.loop, "loop"), seed=cfg.seed)


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=EXPECTED)


def _discriminator(
    cfg: DictConfig, teacher: Any, features: Any = None, heads: Any = None, condition: Any = None
) -> dict[str, Any]:
    """Frozen features, trainable heads, and a conditioning of the heads if it is not the teacher's
    embedding.

    {} if the features are null. Arguments replace the configuration's parts: `features` and
    `condition` are objects, `heads` is a module, or a class that is called with the widths.
    """
    if features is None and cfg.get("features") is None:
        return {}
    if features is None:
        features = make(cfg.features, "discriminator.features")
    if isinstance(features, partial):  # features that are built from the teacher
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
    """The heads that a node builds, or a class itself.

    Raises ValueError for heads with the former attribute `split`, which is no longer read.
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
    """Replace `trainer.precision=auto` by the best of this machine; returns it with the reason."""
    accelerator = cfg.trainer.get("accelerator", "auto")
    chosen = precision(cfg.trainer.precision, accelerator, key="trainer.precision")
    cfg.trainer.precision = chosen.name
    return chosen


def trainer(
    cfg: DictConfig,
    folder: Path,
    models: Mapping[str, str],
    checkpoint: Mapping[str, Any] | None = None,
) -> Any:
    """The Lightning trainer, with loggers and checkpoints inside the run folder.

    `models` are fingerprints of the models that the run reads (`resuming.marks`). `checkpoint` is
    the one to resume from: its loggers are continued.
    """
    step, known = None, {}
    if checkpoint:
        step = checkpoint.get("global_step")
        known = checkpoint.get("about", {}).get("loggers")
    loggers = trackers.made(cfg, folder, known, step)
    if rank() == 0:
        trackers.begin(cfg, loggers, known)
    callbacks = [make(node, key) for key, node in nodes_of(cfg, "callbacks")]
    for callback in callbacks:
        if isinstance(callback, Checkpoints):
            callback.folder = folder / "checkpoints"
            callback.logger_runs = partial(trackers.names, loggers)
            callback.about = {
                "config": masked_tree(OmegaConf.to_container(cfg, resolve=True)),
                "versions": versions(),
                "content": models,
            }
        if isinstance(callback, Scores) and callback.every:
            _prepare_scores(callback, cfg)
    _share_writer(callbacks)
    # Checkpoints come last: a checkpoint includes what other callbacks log at its step.
    callbacks.sort(key=lambda callback: isinstance(callback, Checkpoints))
    if cfg.trainer.precision == "auto":
        settle_precision(cfg)
    build = make(cfg.trainer, "trainer")
    callbacks = [*speed_of(build.keywords), *callbacks]
    strategy = build.keywords.pop("strategy", None) or (
        DataParallel() if processes(cfg) > 1 else "auto"
    )
    sharded = isinstance(strategy, FullyShardedDataParallel)  # which writes its own files
    return build(
        strategy=strategy,
        plugins=[] if sharded else [AtomicIO()],
        callbacks=callbacks,
        logger=list(loggers.values()),
        default_root_dir=str(folder),
        max_epochs=-1,
        enable_checkpointing=False,  # our callback writes atomically and counts student steps
        enable_progress_bar=False,  # our callback counts student steps
        enable_model_summary=False,
        use_distributed_sampler=False,  # our loader shards the samples
    )


def _prepare_scores(callback: Scores, cfg: DictConfig) -> None:
    """Give the callback the run's protocol. Raises ValueError where it cannot be used."""
    key = f"callbacks.scores.every={callback.every}"
    if "_target_" not in (cfg.get("metrics") or {}):
        raise ValueError(
            f"{key}: this run has no metrics to score by; leave ~metrics out, or set 0"
        )
    strategy = str(OmegaConf.select(cfg, "trainer.strategy._target_"))
    if strategy.endswith(FullyShardedDataParallel.__name__):
        what = "one process evaluates, and this strategy shards the student"
        raise ValueError(f"{key}: {what}; use trainer=ddp, or set 0")
    callback.protocol = protocol(cfg.metrics, cfg)
    callback.sampler = make(cfg.sampler, "sampler")


def _share_writer(callbacks: Sequence[Any]) -> None:
    """Have the thread that writes the checkpoints also write the sample pictures, in their order:
    the pictures of a step are complete before its checkpoint.
    """
    writer = next((c.writer for c in callbacks if isinstance(c, Checkpoints)), None)
    for callback in callbacks:
        if isinstance(callback, Samples):
            callback.writer = writer


def nodes_of(cfg: DictConfig, group: str) -> list[tuple[str, DictConfig]]:
    """Dotted key and node of every callback or logger of a run."""
    named = (cfg.get(group) or {}).items()
    return [(f"{group}.{name}", node) for name, node in named if node]


def averaged_weights(method: Any, *, first: bool) -> dict[str, Any]:
    """The unsharded EMA weights of the student, in process 0; all processes must call it."""
    return gather(method.ema.state_dict(), keep=first)


def unsharded_models(cfg: DictConfig, method: Any, average: dict[str, Any]) -> tuple[Any, Any]:
    """Teacher and averaged student for use in one process; rebuilt if the strategy sharded them.

    Both are on the teacher's device: Lightning moves the trained modules back to the CPU.
    """
    teacher, student, device = method.teacher, method.student, method.teacher.device
    if method.sharded:
        teacher = make(cfg.teacher, "teacher")
        student = make(cfg.student, "student")(teacher=teacher)
    student.load_state_dict(average, strict=False)
    return teacher.to(device), student.to(device).eval()


def stop_code(trainer: Any, method: Any, folder: Path) -> int:
    """The exit code if a signal stopped the run, which is then printed; 0 otherwise."""
    number = next((c.stopped_by for c in trainer.callbacks if isinstance(c, Checkpoints)), None)
    if number and trainer.is_global_zero:
        print(
            f"stopped by {number.name} at step {method.step}; go on with: python -m distill.run"
            f" resume={folder}"
        )
        if number == REQUEUE:
            requeue()
    return 128 + number if number and number != REQUEUE else 0
