"""From a configuration to objects, in the order of the sentence: a teacher teaches a student against a discriminator
by a method, on data."""

import inspect
import logging
import re
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

from distill import sampling
from distill.config import signatures, validate
from distill.config.compose import allowed, config_of, make, processes, shipped
from distill.core import limits
from distill.core.tensors import gather
from distill.core.types import Cond, Players
from distill.machine import hardware
from distill.machine.hardware import Precision, precision
from distill.machine.signals import REQUEUE, requeue
from distill.storage import content
from distill.teachers.loading.locate import family_of, pipeline_folder, telling
from distill.teachers.loading.reading import class_of, fetched, lineage, told_of
from distill.teachers.loading.sizes import of_pipeline
from distill.terminal.console import note
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
EXPECTED = ".*(does not have many workers|in eval mode|logs directory.*exists and is not empty|treespec, LeafSpec)"
# What leaves a part of a teacher out, and the same for a folder that is read without a teacher's options.
WITHOUT = re.compile(r"add teacher\.without=\[\S+\]")
IN_INDEX = "write [null, null] for it in model_index.json"


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work before any weight is loaded. Raises ValueError that says what would."""
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
    """Build the trainer once for nothing: what Lightning has against it is said while nothing is written."""
    _hush()
    quiet = cfg.copy()
    if quiet.trainer.precision == "auto":
        quiet.trainer.precision = "32-true"  # settled later; any will do
    OmegaConf.update(quiet, "logger", None, force_add=True)  # some connect as soon as they are made
    trainer(quiet, Path("nowhere"), {})


def check_numbers(cfg: DictConfig) -> None:
    """Make what needs no network, so that it says now what is wrong with its numbers: ValueError, naming the key."""
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
    """How the run of this configuration is judged. Raises ValueError where that cannot be, or would not be fair."""
    validate.check_metrics(metrics)
    made = make(metrics, "metrics")
    if run and hasattr(made, "check"):
        eyes = (
            str(OmegaConf.select(run, f"discriminator.features.{key}"))
            for key in ("_target_", "path")
        )
        made.check(*eyes)
    return made


def sampler_of(run: str, student: Any) -> Any:
    """The few-step sampler of a run, or the one that an exported pipeline's scheduler stands for."""
    if own := (config_of(run, "sampler") or {}).get("sampler"):
        return make(own, "sampler")
    return sampling.sampler_of(student.pipeline)


def parts(cfg: DictConfig) -> tuple[Any, Any]:
    """The data and the method of a run; seeds the global generators first, and silences Lightning's usual hints."""
    lightning.seed_everything(cfg.seed, verbose=False)
    _hush()
    with stage("opening the data"):
        source = make(cfg.data, "data")  # first: what is wrong with it shows in a moment
    null = getattr(source.dataset, "null", None)
    space = signatures.attribute(str(cfg.method._target_), "space")
    decodes = space == "pixels" and not cfg.method.get("decoder")
    teacher = teacher_of(
        cfg, deferred=["text_encoder", *([] if decodes else ["vae"])] if null else []
    )
    if hasattr(source.dataset, "fit"):  # data that are of any teacher's size
        source.dataset.fit(teacher)
    refuse_misfit(cfg, source.dataset, teacher)
    say_size(source.dataset, teacher)
    judge = OmegaConf.select(cfg, "metrics._target_")
    # others read data when they are made, as `check` has done
    if judge and hasattr(get_object(judge), "fits"):
        make(cfg.metrics, "metrics").fits(teacher)
    if null:
        teacher.null = Cond(**{name: x.float() for name, x in null.items()})
    student = make(cfg.student, "student")(teacher=teacher)
    make(cfg.sampler, "sampler").check(student)
    with stage("building the discriminator"):
        discriminator = _discriminator(cfg.discriminator, teacher)
    players = Players(teacher=teacher, student=student, **discriminator)
    loop = TwoPlayerLoop(make(cfg.optimizer, "optimizer"), seed=cfg.seed)
    return source, make(cfg.method, "method")(players, loop=loop)


def _hush() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=EXPECTED)


def _discriminator(cfg: DictConfig, teacher: Any) -> dict[str, Any]:
    """Frozen features, trainable heads, and what tells the heads of a sample where the teacher's embedding does not.

    Nothing of it where the features are null.
    """
    if cfg.get("features") is None:
        return {}
    features = make(cfg.features, "discriminator.features")
    if isinstance(features, partial):  # those that are made from the teacher
        features = features(teacher=teacher)
    if cfg.get("condition") is None:
        pooled = teacher.embed([""]).pooled
        width = 0 if pooled is None else pooled.shape[1]
        return {
            "features": features,
            "heads": _heads(cfg.heads, channels=features.channels, pooled=width),
        }
    condition = make(cfg.condition, "discriminator.condition")(teacher=teacher, features=features)
    widths = {"pooled": condition.pooled_width, "image": condition.image_width}
    heads = _heads(cfg.heads, channels=features.channels, **widths)
    return {"features": features, "heads": heads, "condition": condition}


def _heads(node: DictConfig, **widths: Any) -> Any:
    """Raises ValueError for heads that say by `split` which logits are whose, as they once did: all would be one's."""
    heads = make(node, "discriminator.heads")(**widths)
    if hasattr(heads, "split"):
        what = (
            "its `split` is no longer read; answer with distill.core.types.Logits and leave it out"
        )
        raise ValueError(f"discriminator.heads._target_={node._target_}: {what}")
    return heads


def teacher_of(cfg: DictConfig, deferred: Sequence[str] = ()) -> Any:
    """The teacher; parts of it whose names begin so are read only if they are asked for."""
    more = {"deferred": list(deferred)} if deferred else {}
    return make(OmegaConf.create({**cfg.teacher, **more}), "teacher")


def refuse_misfit(cfg: DictConfig, data: Any, teacher: Any) -> None:
    """Raise ValueError for latents, embeddings or pictures that this teacher cannot read."""
    size, (channels, *sides) = getattr(data, "size", None), getattr(data, "shape", None) or (None,)
    if channels and channels != teacher.latent_shape[0]:
        raise ValueError(
            f"data.path={cfg.data.path}: its latents have {channels} channels and this teacher's have "
            f"{teacher.latent_shape[0]}; make them with this teacher's autoencoder, or give pictures with data=images"
        )
    if any(side % teacher.patch for side in sides):
        raise ValueError(
            f"data.path={cfg.data.path}: latents of {sides[0]} x {sides[1]} do not divide into this teacher's patches "
            f"of {teacher.patch}; make them of pictures whose sides are multiples of {teacher.unit}"
        )
    null, width = getattr(data, "null", None), teacher.network.caption_width
    if null and width and null["tokens"].shape[-1] != width:
        raise ValueError(
            f"data.path={cfg.data.path}: its embeddings are {null['tokens'].shape[-1]} wide and this teacher reads "
            f"{width}; make them with this teacher by distill.cache"
        )
    made = getattr(data, "made", {})
    if null and sorted(made.get("without", teacher.without)) != sorted(teacher.without):
        what = f"teacher.without=[{','.join(made['without'])}], and this run has [{','.join(teacher.without)}]"
        raise ValueError(
            f"data.path={cfg.data.path}: its embeddings were made with {what}; give both the same"
        )
    told = telling(cfg.teacher)
    if null and made.get("told", told) != told:
        what = f"teacher options {made['told'] or 'none'}, and this run has {told or 'none'}"
        raise ValueError(
            f"data.path={cfg.data.path}: its embeddings were made with {what}; give both the same"
        )
    if made and not content.alike(made.get("vae"), cfg.teacher.get("vae")):
        what = f"teacher.vae={made.get('vae')}, and this run has {cfg.teacher.get('vae')}"
        raise ValueError(
            f"data.path={cfg.data.path}: its latents were made with {what}; give both the same"
        )
    if not content.alike(made.get("teacher", cfg.teacher.path), cfg.teacher.path):
        what = "right if both have one autoencoder and one text encoder"
        log.warning(
            "data.path=%s was made with %s, not with this run's teacher: %s",
            cfg.data.path,
            made["teacher"],
            what,
        )
    limits.check_multiples(size, data.buckets, teacher.unit if size else teacher.patch)


def say_size(data: Any, teacher: Any) -> None:
    """Warn where the data have other sides than the teacher, at whose pictures of a student are drawn and exported."""
    size, shape = getattr(data, "size", None), getattr(data, "shape", None)
    if size:
        sizes = [tuple(reversed(bucket)) for bucket in data.buckets] or [(size, size)]
    elif shape:
        latents = [tuple(reversed(bucket)) for bucket in data.buckets] or [shape[1:]]
        sizes = [teacher.sides_of(each) for each in latents]
    else:
        return
    own = teacher.sides_of(teacher.latent_shape)
    if own in sizes:
        return
    height, width = sizes[0]
    square = height == width and "size" in inspect.signature(type(teacher)).parameters
    how = f"teacher.size={width} makes both the same" if square else "make data of that size"
    what = f"the data are of {width} x {height} pixels and this teacher is of {own[1]} x {own[0]}"
    log.warning("%s, at which samples, evaluation and the student's pipeline draw: %s", what, how)


def settle_precision(cfg: DictConfig) -> Precision:
    """Replace `trainer.precision=auto` by what is best on this machine; returns what the run has, and why."""
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

    `models` are the marks of those that it reads (`resuming.marks`). `kept` is the checkpoint that the run goes on
    from: its loggers go on with it.
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
        plugins=[]
        if isinstance(strategy, FullyShardedDataParallel)
        else [AtomicIO()],  # that one has its own files
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
    """Teacher and averaged student as one process can use them; made anew where the strategy has cut them up.

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
            f"stopped by {by.name} at step {method.step}; go on with: python -m distill.run resume={folder}"
        )
        if by == REQUEUE:
            requeue()
    return 128 + by if by and by != REQUEUE else 0


def fitting_dtype(dtype: str, path: str, kind: Any = None) -> str:
    """`dtype` itself; for auto float32, and bfloat16 where the weights at `path` would take over half of the memory.

    `path` is a pipeline folder, or a hub id, which is fetched as a pipeline of class `kind`.
    """
    if dtype != "auto":
        return dtype
    if kind is not None and not Path(path).exists():
        path = fetched("run", path, kind.download, use_safetensors=True)
    needed = 4 * sum(of_pipeline(Path(path)).values())
    there = hardware.memory(hardware.device().type)
    if needed <= there / 2:
        return "float32"
    note(
        f"dtype: bfloat16, for in float32 the weights take {needed / 1e9:.1f} of {there / 1e9:.1f} GB"
    )
    return "bfloat16"


def teacher_behind(run: str, dtype: str = "float32") -> Any | None:
    """The teacher that a run folder names, or that a shipped student leaves its parts to; None where none is named."""
    if config := config_of(run, "teacher"):
        dtype = fitting_dtype(dtype, str(pipeline_folder(Path(run))))
        return make(OmegaConf.create({**config.teacher, "dtype": dtype}), "teacher")
    _, *bases = lineage(pipeline_folder(Path(shipped(run))))
    return student_of(str(bases[0]), dtype) if bases else None


def student_of(run: str, dtype: str = "float32") -> Any:
    """The student of a run folder, or any pipeline of a family we know, a folder or hub id, by our own adapter.

    `dtype` of its weights; auto is what `fitting_dtype` says.
    """
    folder = pipeline_folder(Path(shipped(run)))
    path = str(folder) if folder.exists() else run
    family = family_of(class_of(path), run)
    adapter = get_object(family)
    dtype = fitting_dtype(dtype, path, adapter.kind)
    node = {"_target_": family, "path": path, "dtype": dtype}
    chosen = told_of(path)["options"]
    own = [f"teacher.{key}" for key in adapter.own]
    if own and (config := config_of(run, *own)):
        chosen |= config.teacher  # what a family lets one choose is as in the run
    node |= {key: chosen[key] for key in adapter.own if key in chosen}
    try:
        return make(OmegaConf.create(node), "teacher")
    except InstantiationException as error:  # which names teacher.path, and nobody has typed that
        if isinstance(error.__cause__, (ValueError, OSError)):
            said = str(error.__cause__).replace(f"teacher.path={path}", f"run={run}")
            said = said.replace("teacher.dtype=", "dtype=")
            raise ValueError(WITHOUT.sub(IN_INDEX, said)) from None
        raise
