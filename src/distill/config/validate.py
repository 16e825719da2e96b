"""Check a configuration before torch, Lightning and diffusers are imported.

Each function raises ValueError or FileNotFoundError that names the key and says what to type
instead. The objects check the rest when they are built.
"""

import logging
import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config import editing, signatures, trust
from distill.config.compose import check_counts, check_run_dir_free, nearest, overrides, shipped
from distill.config.data_files import check_files, check_first_samples, check_side
from distill.config.draws import check_draws
from distill.config.evaluation_networks import check_networks
from distill.config.generator import check_generator, refuse_generator
from distill.config.leaving_out import leave_out
from distill.config.noise_pairs import check_noise
from distill.config.optimizers import check_optimizers
from distill.config.paths import TEACHERS_OWN
from distill.config.picture_units import check_fit, check_made
from distill.config.preference import check_captions_alone, check_preference
from distill.config.quantizing import check_quantize
from distill.config.ranges import (
    COUNTS,
    LARGEST,
    METRICS_COUNTS,
    STUDENT_COUNTS,
    check_lists,
    check_most,
    check_ranges,
)
from distill.config.score_teacher import check_score_teacher
from distill.config.trainer_keys import check_trainer, has_target
from distill.config.videos import check_videos
from distill.config.watched import check_samples_prompts, check_watched
from distill.core import limits
from distill.data.lines import Lines
from distill.evaluation import references as material
from distill.machine.hardware import check_precision
from distill.storage import source_code
from distill.storage.bounded import mapping_of
from distill.teachers import families
from distill.teachers.loading import locate
from distill.teachers.loading.settings import check_settings, in_folder

NEEDED = ("method", "teacher", "student", "data", "loop", "trainer", "sampler")
PARTS = ("features", "heads", "condition")  # of a discriminator
OPTIMIZED = ("student", "discriminator")  # what has an optimiser
FAKE_SCORE = "fake_score"  # and what has one in methods that train a fake score
LOCAL_HEADS = "distill.discriminators.stylegan_t.StyleGANTHeads"
PICTURES = "distill.discriminators.images.ImageFeatures"

log = logging.getLogger(__name__)


def check_run(cfg: DictConfig) -> None:
    """Check the whole configuration of a run."""
    check_targets(cfg)  # first: nothing else looks at a class that is not allowed
    check_groups(cfg)
    check_space(cfg)
    check_players(cfg.discriminator)
    check_counts(cfg, COUNTS)
    check_most(cfg, LARGEST)
    check_side(cfg.data)
    check_preference(cfg)  # first: no key mends data that are none of the method's
    check_keys(cfg)
    check_ranges(cfg)
    check_lists(cfg)
    check_draws(cfg)
    check_watched(cfg)
    check_trainer(cfg.trainer)
    check_optimizers(cfg)
    check_quantize(cfg)
    check_teacher(cfg.teacher)
    check_score_teacher(cfg, check_teacher)
    check_student(cfg.student)
    check_generator(cfg)
    check_features(cfg.discriminator)
    check_decoder(cfg.method)
    check_pairs(cfg.method)
    check_batches(cfg)
    check_start(cfg)
    check_noise(cfg)
    check_data(cfg.data)
    check_fit(cfg.data, cfg.teacher)
    if isinstance(made := cfg.method.get("real"), DictConfig):
        check_made(cfg.teacher, made, "method.real.")
    editing.check_masks_fit(cfg.data, families.family(str(cfg.teacher._target_)))
    check_captions_alone(cfg)
    check_videos(cfg)
    check_samples_prompts(cfg)
    if has_target(cfg.get("metrics")):
        check_metrics(cfg.metrics)
        check_made(cfg.teacher, cfg.metrics, "metrics.")
        editing.check_judged(cfg)
    editing.check_guidance_by_source(cfg)
    check_first_samples(cfg.data)
    check_run_dir_free(cfg)


def check_groups(cfg: DictConfig) -> None:
    """Check that required groups are present, that keys are known, and that nodes have targets."""
    for group in NEEDED:
        if not has_target(cfg.get(group)):  # a recipe may have set other keys of the group
            raise ValueError(f"{group}: a run needs it; choose one by {group}=...")
    for group in ("discriminator", "optimizer", "callbacks", "logger", "metrics"):
        if not isinstance(node := cfg.get(group), DictConfig | None):
            raise ValueError(f"{group}={node}: must be an option's name or a node with keys")
    optimized = (*OPTIMIZED, FAKE_SCORE) if trains_fake_score(cfg) else OPTIMIZED
    for group, known in {"discriminator": PARTS, "optimizer": optimized}.items():
        for key, node in (cfg.get(group) or {}).items():
            if key not in known:
                near = nearest(str(key), known)
                how = leave_out(f"{group}.{key}", overrides())
                raise ValueError(f"{group}.{key}: nothing reads this key{near}; {how}")
            if not isinstance(node, DictConfig | None):
                raise ValueError(f"{group}.{key}={node}: must be a node with a _target_")
    for key in optimized:
        if not has_target(OmegaConf.select(cfg, f"optimizer.{key}")):
            raise ValueError(f"optimizer.{key}: a run cannot be without; choose optimizer=...")
    for group in ("callbacks", "logger"):
        for name, node in (cfg.get(group) or {}).items():
            if node is not None and not has_target(node):
                raise ValueError(
                    f"{group}.{name}: has no _target_; give one, or leave it out by ~{group}.{name}"
                )


def trains_fake_score(cfg: DictConfig) -> bool:
    """Whether the method trains a fake score, by the discriminator that it needs."""
    space = source_code.attribute(str(OmegaConf.select(cfg, "method._target_")), "space")
    return space == limits.FAKE_SCORE


def check_players(discriminator: DictConfig) -> None:
    """Check that parts of the discriminator are nodes or null, and that features have heads."""
    for key, node in discriminator.items():
        if node is not None and not has_target(node):
            how = leave_out(f"discriminator.{key}", overrides())
            what = f"must be a node with a _target_; give one, or {how}"
            raise ValueError(f"discriminator.{key}={node}: {what}")
    if discriminator.get("features") is not None and discriminator.get("heads") is None:
        what = "features need heads; give some, or discriminator=none"
        raise ValueError(f"discriminator.heads=null: {what}")


def check_space(cfg: DictConfig) -> None:
    """Check that method and discriminator work in the same space: pixels, latents, or nothing."""
    has_discriminator = OmegaConf.select(cfg, "discriminator.features") is not None
    method = str(OmegaConf.select(cfg, "method._target_"))
    features = str(OmegaConf.select(cfg, "discriminator.features._target_"))
    given = source_code.attribute(features, "space") if has_discriminator else "nothing"
    limits.check_space(source_code.attribute(method, "space"), given)
    if not has_discriminator and (lead := cfg.loop.get("head_start")):
        raise ValueError(
            f"loop.head_start={lead}: there is no discriminator to train first; make it 0"
        )


def check_targets(cfg: DictConfig) -> None:
    """Check that every target is allowed at its key."""
    trust.check_targets(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def check_batches(cfg: DictConfig) -> None:
    """Check that the batch is large enough for the heads and the loss terms."""
    size = cfg.data.batch_size
    if OmegaConf.select(cfg, "discriminator.heads._target_") == LOCAL_HEADS:
        limits.check_local_batch(size, "data.batch_size")
    if cfg.method.get("misaligned") and size < 2:
        what = f"method.misaligned={cfg.method.misaligned} gives a sample the caption of another"
        raise ValueError(f"data.batch_size={size}: {what}; make it 2, or that 0")


def check_pairs(method: DictConfig) -> None:
    """Warn of a paired loss whose pairs differ by their noise too, not by the sample alone."""
    if method.get("loss") == "relativistic" and method.get("shared") is False:
        what = "compares real and fake logits in pairs, and method.shared=false noises the two"
        log.warning("method.loss=relativistic %s differently; set method.shared=true", what)


def check_start(cfg: DictConfig) -> None:
    """Check that the method can train the student from its initial weights.

    Under a timestep shift the teacher's weights read noise as an almost clean picture, and return
    the noise. Learning one step from there needs `method.warm_start` or regression; a discriminator
    is not enough.
    """
    shift, scheduler = cfg.student.get("shift"), _scheduler_of(str(cfg.teacher.path))
    if shift in (None, scheduler.get("shifted_timestep")):
        return
    if cfg.student.get("init") not in TEACHERS_OWN:
        return
    if OmegaConf.select(cfg, "discriminator.features") is None or cfg.method.get("warm_start"):
        return
    what = f"student.shift={shift}: the student starts as its teacher, which was trained without it"
    if "warm_start" in cfg.method:
        hint = "add method.warm_start=<steps>, or student.init=<a regression run with it>"
        raise ValueError(f"{what} and returns noise; {hint}")
    log.warning("%s: its first samples are noise; start from a run of method=regression", what)


def _scheduler_of(path: str) -> dict[str, Any]:
    """The scheduler configuration of the pipeline folder at this path; {} if there is none."""
    file = Path(shipped(path)) / "scheduler" / "scheduler_config.json"
    return mapping_of(file) if file.is_file() else {}


def check_keys(cfg: DictConfig) -> None:
    """Check that every target is allowed, takes the keys of its node, and accepts the types of
    their values.
    """
    tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    trust.check_targets(tree)
    _keys(tree, "")


def _keys(value: Any, path: str) -> None:
    for inner in value if isinstance(value, list) else ():
        _keys(inner, path)
    if not isinstance(value, dict):
        return
    if "_target_" in value:
        name = str(value["_target_"])
        check_taken(value, name, path)
        taken = signatures.signature(name)
        if taken and (
            missing := sorted(taken.needed - signatures.given_by_program(path) - set(value))
        ):
            raise ValueError(f"{path}{missing[0]}: not given; {name} needs it")
    for key, inner in value.items():
        _keys(inner, f"{path}{key}.")


def check_taken(node: dict[str, Any], name: str, path: str) -> None:
    """Check that a class or function takes these keys and values; `path` is a prefix of the keys in
    errors.
    """
    if (taken := signatures.signature_at(path, name)) is None:
        return
    given = signatures.given_by_program(path)
    for key, value in node.items():
        if key.startswith("_"):
            continue
        if key in given:
            how = leave_out(f"{path}{key}", overrides())
            raise ValueError(f"{path}{key}={value}: the program sets it itself; {how}")
        if key not in taken.keys and not taken.open:
            near = nearest(key, taken.keys)
            how = leave_out(f"{path}{key}", overrides())
            raise ValueError(f"{path}{key}: {name} takes no such key{near}; {how}")
        if what := signatures.expected(taken, key, value):
            raise ValueError(f"{path}{key}={value}: must be {what}")
        for name_of, inner in value.items() if signatures.of_nodes(taken, key) else ():
            if not isinstance(inner, dict) or "_target_" not in inner:
                raise ValueError(f"{path}{key}.{name_of}={inner}: must be a node with a _target_")


def check_teacher(teacher: DictConfig) -> None:
    """Check that its files exist or may be on the hub, and are of a pipeline that it reads."""
    path, family = shipped(str(teacher.path)), families.family(str(teacher._target_))
    locate.check_pipeline(path)
    if (Path(path) / locate.INDEX).is_file() and family:
        locate.check_kind(locate.index_of(path).get("_class_name"), family.kind_name(), path)
        check_settings(family, in_folder(Path(path)), f"teacher.path={path}")
        refuse_generator(path, f"teacher.path={teacher.path}", "choose a diffusion model")
    if teacher.get("zero_terminal_snr"):
        limits.check_zero_snr(_scheduler_of(path).get("prediction_type"))
    if teacher.get("weights"):
        locate.check_weights(shipped(str(teacher.weights)))
    if teacher.get("vae"):
        locate.check_autoencoder(shipped(str(teacher.vae)))
    limits.check_dtype(teacher.get("dtype"), "teacher.dtype")


def check_student(student: DictConfig) -> None:
    """Check that the initial weights exist, and that something is trained."""
    limits.check_adapted(student.get("targets"))
    init = student.get("init")
    if student.get("_target_") == "distill.students.full" and init not in ("teacher", "random"):
        locate.denoiser_in(shipped(str(init)), "student.init", "must be teacher, random, or")
    check_counts(OmegaConf.create({"student": student}), STUDENT_COUNTS)


def check_features(discriminator: DictConfig) -> None:
    """Check that a feature network of pictures exists, or may be on the hub."""
    for key in ("features", "condition.image"):
        node = OmegaConf.select(discriminator, key)
        if isinstance(node, DictConfig) and node.get("_target_") == PICTURES:
            path = shipped(str(node.path))
            if not Path(path).exists() and not locate.is_hub_id(path):
                what = f"no such folder{locate.near(path)}; give one, or a hub id"
                raise FileNotFoundError(f"discriminator.{key}.path={path}: {what}")


def check_data(data: DictConfig) -> None:
    """Check the options of the data, and that their files exist."""
    check_side(data)
    check_keys(OmegaConf.create({"data": data}))
    check_counts(OmegaConf.create({"data": data}), {k: v for k, v in COUNTS.items() if "data" in k})
    plain = OmegaConf.to_container(data, resolve=True)
    share, empty = plain.get("max_bad_share", 0.1), plain.get("max_empty_share", 1.0)
    limits.check_samples(plain.get("limit"), share, plain.get("buckets"), empty)
    check_files(data)


def check_metrics(metrics: DictConfig) -> None:
    """Check the numbers of the protocol, and that its captions and pictures exist."""
    node = OmegaConf.create({"metrics": metrics})
    least = {f"metrics.{key}": least for key, least in METRICS_COUNTS.items()}
    for key in ("size", "student_steps", "teacher_steps"):  # lists of numbers, or one
        if isinstance(metrics.get(key), ListConfig):
            least.pop(f"metrics.{key}", None)
            least |= {f"metrics.{key}[{i}]": 1 for i in range(len(metrics[key]))}
    check_counts(node, least)
    check_precision(metrics.get("precision", "auto"), "metrics.precision")
    prompted = "measures" in metrics
    if prompted:
        material.check_variety(metrics.variety)
    check_keys(node)
    check_ranges(node)
    if not prompted:
        return
    material.check_measures(metrics.measures, metrics.scores)
    path = shipped(str(metrics.path))
    if Path(path).is_dir():
        material.coco(path, metrics.prompts)
    else:
        Lines(path, "metrics.path", metrics.get("column"), metrics.get("category"), True)
    material.check_reference(metrics.reference and shipped(metrics.reference))
    check_networks(metrics)


def check_decoder(method: DictConfig) -> None:
    """Check that the small decoder exists, or may be on the hub."""
    node = method.get("decoder")
    path = shipped(str(node.get("path"))) if isinstance(node, DictConfig) else None
    if path and not Path(path).exists() and not locate.is_hub_id(path):
        raise locate.no_folder(path, "method.decoder.path")


def check_model(run: str, key: str = "run") -> None:
    """Check that this is a run folder with a student, a readable pipeline, or may be a hub id.

    Also check the keys of the run's configuration that are needed to sample from its student.
    """
    path = shipped(run)
    file = Path(path) / "config.yaml"
    if file.is_file():  # the class of its teacher may be the user's; the student does not need it
        trust.read(file, "sampler", "teacher", ignored={"teacher._target_"})
    folder = locate.pipeline_folder(Path(path))
    locate.check_model(str(folder), run, key)


def check_size(size: Any, key: str = "size") -> None:
    """Check that a size is pixels a side, or [width, height]."""
    sides = list(size) if isinstance(size, ListConfig) else [size, size]
    if size is not None and (len(sides) != 2 or any(type(x) is not int or x < 1 for x in sides)):
        raise ValueError(f"{key}={size}: must be pixels a side, or [width,height]")


def check_number(cfg: DictConfig, *keys: str) -> None:
    """Check that the values of these keys are numbers from 0 on, or null."""
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key}={value}: must be a number")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key}={value}: must be a finite number, 0 or more")


def check_word(cfg: DictConfig, key: str, *words: str) -> None:
    """Check that the value of this key is one of the options `words`, or null."""
    value = OmegaConf.select(cfg, key)
    if value is not None and value not in words:
        near = nearest(str(value), words)
        raise ValueError(f"{key}={value}: must be {' or '.join(words)}{near}")
