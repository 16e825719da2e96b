"""What can be known of a configuration without torch, Lightning and diffusers, and is checked
before they are imported.

Each function raises ValueError or FileNotFoundError that names the key and says what to type
instead. The rest, what only the objects themselves know, is said when they are built.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from distill.config import signatures, trust
from distill.config.compose import check_counts, nearest, refuse_taken, shipped
from distill.config.paths import TEACHERS_OWN
from distill.config.ranges import COUNTS, JUDGING, LARGEST, check_lists, check_most, check_ranges
from distill.config.trainer_keys import check_trainer, has_target
from distill.config.watched import check_samples_prompts, check_watched
from distill.core import limits
from distill.data.lines import Lines
from distill.data.shards import check_pictures, expand
from distill.evaluation import references as material
from distill.machine.hardware import check_precision
from distill.storage.bounded import mapping_of
from distill.teachers.loading import locate
from distill.teachers.loading.settings import UNITS, check_settings, in_folder, unit_of

PROMPTS = "distill.data.source.prompts"
LATENTS = "distill.data.source.latents"
NEEDED = ("method", "teacher", "student", "data", "optimizer", "trainer", "sampler")
PLAYERS = ("features", "heads", "condition")  # what a discriminator is made of
LOCAL_HEADS = "distill.discriminators.stylegan_t.StyleGANTHeads"
PICTURES = "distill.discriminators.images.ImageFeatures"

log = logging.getLogger(__name__)


def check_run(cfg: DictConfig) -> None:
    """All of a run's configuration."""
    check_targets(cfg)  # first: a stranger's file gets no advice
    check_groups(cfg)
    check_sides(cfg)
    check_players(cfg.discriminator)
    check_counts(cfg, COUNTS)
    check_most(cfg, LARGEST)
    check_keys(cfg)
    check_ranges(cfg)
    check_lists(cfg)
    check_watched(cfg)
    check_trainer(cfg.trainer)
    check_teacher(cfg.teacher)
    check_student(cfg.student)
    check_features(cfg.discriminator)
    check_decoder(cfg.method)
    check_batches(cfg)
    check_start(cfg)
    check_data(cfg.data)
    check_fit(cfg.data, cfg.teacher)
    check_samples_prompts(cfg)
    if has_target(cfg.get("metrics")):
        check_metrics(cfg.metrics)
    refuse_taken(cfg)


def check_groups(cfg: DictConfig) -> None:
    """That no group is left out which every run needs, that none has what nobody reads, and what
    must have a target.
    """
    for group in NEEDED:
        if not has_target(cfg.get(group)):  # a recipe may have left other keys of it
            raise ValueError(f"{group}: a run cannot be without; choose one by {group}=...")
    for group in ("discriminator", "callbacks", "logger", "metrics"):
        if not isinstance(node := cfg.get(group), DictConfig | None):
            raise ValueError(f"{group}={node}: must be an option's name or a node with keys")
    for key, node in cfg.discriminator.items():
        if key not in PLAYERS:
            near = nearest(str(key), PLAYERS)
            raise ValueError(f"discriminator.{key}: nothing reads this key{near}; leave it out")
        if not isinstance(node, DictConfig | None):
            raise ValueError(f"discriminator.{key}={node}: must be a node with a _target_")
    for group in ("callbacks", "logger"):
        for name, node in (cfg.get(group) or {}).items():
            if node is not None and not has_target(node):
                raise ValueError(
                    f"{group}.{name}: has no _target_; give one, or leave it out by ~{group}.{name}"
                )


def check_players(discriminator: DictConfig) -> None:
    """That what a discriminator is made of are nodes with a target, or null, and that features have
    heads.
    """
    for key, node in discriminator.items():
        if node is not None and not has_target(node):
            raise ValueError(f"discriminator.{key}={node}: must be a node with a _target_")
    if discriminator.get("features") is not None and discriminator.get("heads") is None:
        what = "features are judged by heads; give some, or discriminator=none"
        raise ValueError(f"discriminator.heads=null: {what}")


def check_sides(cfg: DictConfig) -> None:
    """That the method reads what the discriminator looks at: pixels, latents, or nothing."""
    alone = OmegaConf.select(cfg, "discriminator.features") is None
    target = str(OmegaConf.select(cfg, "method._target_"))
    looks_at = str(OmegaConf.select(cfg, "discriminator.features._target_"))
    wanted = signatures.attribute(target, "space")
    given = "nothing" if alone else signatures.attribute(looks_at, "space")
    if wanted and given and wanted != given:
        what = f"method reads a discriminator of {wanted}, and this discriminator looks at {given}"
        raise ValueError(f"{what}; choose another discriminator=")
    if alone and (lead := cfg.optimizer.get("head_start")):
        raise ValueError(
            f"optimizer.head_start={lead}: there is no discriminator to lead; make it 0"
        )


def check_targets(cfg: DictConfig) -> None:
    """That every target is one that its key may hold."""
    trust.check_targets(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def check_batches(cfg: DictConfig) -> None:
    """That a batch is one that the heads and the terms of the losses can do with."""
    size = cfg.data.batch_size
    if OmegaConf.select(cfg, "discriminator.heads._target_") == LOCAL_HEADS:
        limits.check_local_batch(size, "data.batch_size")
    if cfg.method.get("misaligned") and size < 2:
        what = f"method.misaligned={cfg.method.misaligned} gives a sample the caption of another"
        raise ValueError(f"data.batch_size={size}: {what}; make it 2, or that 0")


def check_start(cfg: DictConfig) -> None:
    """That a student begins where its method can go on from.

    Under a timestep shift the teacher's weights take noise for an almost clean picture, and answer
    with the noise: what teaches them one step is an opening, or regression; a discriminator alone
    does not.
    """
    shift, own = cfg.student.get("shift"), _scheduler_of(str(cfg.teacher.path))
    if shift in (None, own.get("shifted_timestep")) or cfg.student.get("init") not in TEACHERS_OWN:
        return
    if OmegaConf.select(cfg, "discriminator.features") is None or cfg.method.get("opening"):
        return
    what = (
        f"student.shift={shift}: the student begins as its teacher, which was not trained under it"
    )
    if "opening" in cfg.method:
        how = (
            "give it method.opening=<steps>, or student.init=<a run of method=regression under it>"
        )
        raise ValueError(f"{what} and answers with noise; {how}")
    log.warning("%s: its first answers are noise; begin from a run of method=regression", what)


def _scheduler_of(path: str) -> dict[str, Any]:
    """The scheduler's configuration in the pipeline folder at this path, empty where there is
    none.
    """
    file = Path(shipped(path)) / "scheduler" / "scheduler_config.json"
    return mapping_of(file) if file.is_file() else {}


def check_keys(cfg: DictConfig) -> None:
    """That every target is allowed, takes its keys, and that their values are of the kind that it
    wants.
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
        if taken and (missing := sorted(taken.needed - signatures.given(path) - set(value))):
            raise ValueError(f"{path}{missing[0]}: not given; {name} needs it")
    for key, inner in value.items():
        _keys(inner, f"{path}{key}.")


def check_taken(node: dict[str, Any], name: str, path: str) -> None:
    """That the class or function of this name takes these keys and values; `path` stands before
    them in an error.
    """
    if (taken := signatures.signature(name)) is None:
        return
    given = signatures.given(path)
    for key, value in node.items():
        if key.startswith("_"):
            continue
        if key in given:
            raise ValueError(f"{path}{key}={value}: the program gives that itself; leave it out")
        if key not in taken.keys and not taken.open:
            near = nearest(key, taken.keys)
            raise ValueError(f"{path}{key}: {name} takes no such key{near}; leave it out")
        if what := signatures.wanted(taken, key, value):
            raise ValueError(f"{path}{key}={value}: must be {what}")
        for name_of, inner in value.items() if signatures.of_nodes(taken, key) else ():
            if not isinstance(inner, dict) or "_target_" not in inner:
                raise ValueError(f"{path}{key}.{name_of}={inner}: must be a node with a _target_")


def check_teacher(teacher: DictConfig) -> None:
    """That its files are here, or may be on the hub, and are of a pipeline that it reads."""
    path, kinds = shipped(str(teacher.path)), {v: k for k, v in locate.FAMILIES.items()}
    locate.check_pipeline(path)
    if (Path(path) / locate.INDEX).is_file() and (kind := kinds.get(str(teacher._target_))):
        locate.check_kind(locate.index_of(path).get("_class_name"), kind, path)
        check_settings(kind, in_folder(Path(path)), f"teacher.path={path}")
    if teacher.get("zero_terminal_snr"):
        limits.check_zero_snr(_scheduler_of(path).get("prediction_type"))
    if teacher.get("weights"):
        locate.check_weights(shipped(str(teacher.weights)))
    if teacher.get("vae"):
        locate.check_autoencoder(shipped(str(teacher.vae)))
    limits.check_dtype(teacher.get("dtype"), "teacher.dtype")


def check_student(student: DictConfig) -> None:
    """That what it begins from is there."""
    init = student.get("init")
    if student.get("_target_") == "distill.students.full" and init not in ("teacher", "random"):
        locate.denoiser_in(shipped(str(init)), "student.init", "must be teacher, random, or")
    check_counts(OmegaConf.create({"student": student}), {"student.rank": 1, "student.shift": 1})


def check_features(discriminator: DictConfig) -> None:
    """That a network of pictures is here, or may be on the hub."""
    for key in ("features", "condition.image"):
        node = OmegaConf.select(discriminator, key)
        if isinstance(node, DictConfig) and node.get("_target_") == PICTURES:
            path = shipped(str(node.path))
            if not Path(path).exists() and not locate.is_hub_id(path):
                what = f"no such folder{locate.near(path)}; give one, or a hub id"
                raise FileNotFoundError(f"discriminator.{key}.path={path}: {what}")


def check_data(data: DictConfig) -> None:
    """That what the data name is there, and their options can be."""
    check_keys(OmegaConf.create({"data": data}))
    check_counts(OmegaConf.create({"data": data}), {k: v for k, v in COUNTS.items() if "data" in k})
    plain = OmegaConf.to_container(data, resolve=True)
    share, empty = plain.get("max_bad_share", 0.1), plain.get("max_empty_share", 1.0)
    limits.check_samples(plain.get("limit"), share, plain.get("buckets"), empty)
    if "path" not in plain:  # drawn as they are asked for
        return
    path = shipped(str(data.path))
    if data.get("_target_") == PROMPTS:
        Lines(path)
    elif data.get("_target_") == LATENTS:
        expand(path)
    else:
        keys = ("repeats", "caption_key", "max_empty_share")
        check_pictures(path, **{key: plain[key] for key in keys if key in plain})


def check_fit(data: DictConfig, teacher: DictConfig, *, published: bool = False) -> None:
    """That the sides of pictures are multiples of what the teacher makes a token of, where its
    files are here.

    Of a hub's those of its family, if `published`: another model of its class may have others.
    """
    kind = {v: k for k, v in locate.FAMILIES.items()}.get(str(teacher._target_), "")
    path = shipped(str(teacher.path))
    folder = shipped(str(teacher.get("config"))) if Path(path).suffix in locate.SINGLE else path
    unit = UNITS.get(kind) if published else None
    if kind and (Path(folder) / locate.INDEX).is_file():
        unit = unit_of(kind, in_folder(Path(folder)), f"teacher.path={teacher.path}")
    if unit and not teacher.get("vae") and data.get("_target_") not in (LATENTS, PROMPTS):
        plain = OmegaConf.to_container(data, resolve=True)
        limits.check_multiples(plain.get("size"), plain.get("buckets"), unit)


def check_metrics(metrics: DictConfig) -> None:
    """Numbers of the protocol, and that its captions and pictures are there."""
    node = OmegaConf.create({"metrics": metrics})
    least = {f"metrics.{key}": least for key, least in JUDGING.items()}
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
    if not prompted:
        return
    material.check_measures(metrics.measures, metrics.scores)
    path = shipped(str(metrics.path))
    if Path(path).is_dir():
        material.coco(path, metrics.prompts)
    else:
        Lines(path, "metrics.path")
    material.check_reference(metrics.reference and shipped(metrics.reference))
    check_networks(metrics)


def check_networks(metrics: DictConfig) -> None:
    """That the networks of the measures asked for are here, or may be on the hub."""
    asked = {metrics.scores[name].get("network") for name in metrics.measures}
    for name in sorted(asked & set(metrics.networks)):
        node = metrics.networks[name]
        for key in ("path", "processor"):
            path = shipped(str(node.get(key) or "")).removeprefix("local-dir:")
            if locate.is_local(path) and not Path(path).exists():
                what = f"no such file or folder{locate.near(path)}; give one, or a name of the hub"
                raise FileNotFoundError(f"metrics.networks.{name}.{key}={node[key]}: {what}")


def check_decoder(method: DictConfig) -> None:
    """That a small decoder is here, or may be on the hub."""
    node = method.get("decoder")
    path = shipped(str(node.get("path"))) if isinstance(node, DictConfig) else None
    if path and not Path(path).exists() and not locate.is_hub_id(path):
        raise locate.no_folder(path, "method.decoder.path")


def check_model(run: str, key: str = "run") -> None:
    """That this is a run folder with a student, a pipeline folder that we read, or may be a hub id.

    And that what is made of a run's configuration to draw with its student is what a file may say.
    """
    path = shipped(run)
    file = Path(path) / "config.yaml"
    if file.is_file():  # its teacher may be a class of its own, and not what reads the student
        trust.read(file, "sampler", "teacher", but={"teacher._target_"})
    folder = locate.pipeline_folder(Path(path))
    locate.check_model(str(folder), run, key)


def check_strength(run: str, steps: int, strength: float) -> None:
    """That an image noised to this strength leaves a step, by the count of the pipeline in the
    folder of `run`.

    One of the hub is asked once it is here: until then the count that leaves more.
    """
    index = locate.pipeline_folder(Path(shipped(run))) / locate.INDEX
    kind = locate.index_of(str(index.parent), "run").get("_class_name") if index.is_file() else None
    limits.check_strength(steps, strength, kind is None or kind in locate.ROUNDING_UP)


def check_size(size: Any, key: str = "size") -> None:
    """Pixels a side, or width and height."""
    sides = list(size) if isinstance(size, ListConfig) else [size, size]
    if size is not None and (len(sides) != 2 or any(type(x) is not int or x < 1 for x in sides)):
        raise ValueError(f"{key}={size}: must be pixels a side, or [width,height]")


def check_number(cfg: DictConfig, *keys: str) -> None:
    """That the values of these keys are numbers, or null."""
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key}={value}: must be a number")


def check_word(cfg: DictConfig, key: str, *words: str) -> None:
    """That the value of this key is one of the words, or null."""
    value = OmegaConf.select(cfg, key)
    if value is not None and value not in words:
        near = nearest(str(value), words)
        raise ValueError(f"{key}={value}: must be {' or '.join(words)}{near}")
