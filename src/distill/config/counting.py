"""What `doctor` counts of a configuration: its teacher's files, and strategies that it can use."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import get_type_hints

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from distill.config.compose import shipped
from distill.config.generator import STUDENT, check_generator
from distill.config.optimizers import check_optimizers
from distill.config.quantizing import check_quantize
from distill.config.sources import LATENTS
from distill.data import stores
from distill.data.named import expand, stored_shards
from distill.data.write import NULL
from distill.machine import budget
from distill.machine.hardware import best_precision, device
from distill.teachers.families import Family, family
from distill.teachers.loading import sizes
from distill.teachers.loading.held import PLACES, held_in
from distill.teachers.loading.locate import home_of, index_of
from distill.teachers.network import Network

FSDP2 = "distill.training.strategies.FullyShardedDataParallel"


def pipeline_of(cfg: DictConfig) -> tuple[DictConfig, Path, Path | None]:
    """A configuration whose teacher is the pipeline folder by which that of `cfg` is built, this
    folder, and the single file that has weights of it. The folder need not be here.
    """
    path, config = Path(shipped(str(cfg.teacher.path))), cfg.teacher.get("config")
    if config is None or not path.is_file():
        return cfg, path, None
    folder = Path(shipped(str(config)))
    found = cfg.copy()
    OmegaConf.update(found, "teacher.path", str(folder))
    OmegaConf.update(found, "teacher.config", None)
    return found, folder, path


def counts(folder: Path, file: Path | None = None) -> dict[str, int]:
    """Part -> number of parameters of a pipeline folder, those in the single file by that.

    Raises ValueError for a file whose header is too large.
    """
    found = sizes.of_pipeline(folder)
    if file is None:
        return found
    parts = {n: pair[1] for n, pair in index_of(str(folder)).items() if isinstance(pair, list)}
    names = {n: "text_encoder_3" if str(kind).startswith("T5") else n for n, kind in parts.items()}
    places = {name: PLACES[place] for name, place in names.items() if place in PLACES}
    denoiser = "transformer" if "transformer" in parts else "unet"
    own: dict[str, int] = {}
    for name, shape in held_in(file).items():
        part = next((n for n, of in places.items() if name.startswith(of)), denoiser)
        own[part] = own.get(part, 0) + prod(shape)
    return {**found, **own}


def shapes(folder: Path, part: str) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a part: those of its files, or else by its configuration."""
    home = Path(home_of(folder, part), part)
    return sizes.shapes(home) or sizes.shapes_by_config(folder, part)


def can_shard(cfg: DictConfig) -> bool:
    """Whether this run can have trainer=fsdp2."""
    sharded = cfg.copy()
    OmegaConf.update(sharded, "trainer.strategy", {"_target_": FSDP2}, force_add=True)
    try:
        for check in (check_quantize, check_optimizers, check_generator):
            check(sharded)
    except ValueError:
        return False
    return True


def other_weights(
    cfg: DictConfig, path: Path, counts: dict[str, int], width: int
) -> dict[str, float]:
    """Bytes of the networks beside the denoisers. The text encoders' weights have `width` bytes."""
    autoencoder = _starting(counts, "vae")
    if autoencoder:
        autoencoder *= getattr(torch, autoencoder_dtype(cfg, path)).itemsize
    found: dict[str, float] = {
        "text encoders": 0 if embedded(cfg) else _starting(counts, "text_encoder") * width,
        "autoencoder": autoencoder,
    }
    if cfg.get("score_teacher"):
        found["score teacher"] = score_teacher_bytes(cfg.score_teacher)
    return found


def trained_bytes(cfg: DictConfig, path: Path, part: str, network: int) -> tuple[float, float]:
    """Bytes of what is trained, on the device and on the host: weights, gradients, the state of
    `optimizer.student`, and the average. The fake score of DMD2 has no average.
    """
    count = network
    if str(cfg.student._target_).endswith(".lora"):
        targets = cfg.student.get("targets") or targets_of(get_object(str(cfg.teacher._target_)))
        count = budget.adapters(shapes(path, part), list(targets), cfg.student.rank)
    elif cfg.student._target_ == STUDENT:
        from distill.students.stylegan import parameters

        options = {key: x for key, x in cfg.student.items() if not str(key).startswith("_")}
        count = parameters(sizes.config_of(path, part), options)
    found = [count * x for x in budget.trained_bytes(cfg.optimizer.student, cfg.loop)]
    if fake := cfg.optimizer.get("fake_score"):
        more = budget.trained_bytes(fake, {**cfg.loop, "ema_device": None})
        found = [x + network * y for x, y in zip(found, (more[0] - 4, more[1]), strict=True)]
    return found[0], found[1]


def targets_of(family: type) -> Sequence[str]:
    """Default layers of a LoRA on a teacher of this family: those of its network's class."""
    network = get_type_hints(family._network).get("return", Network)  # type: ignore[attr-defined]
    return network.targets if isinstance(network, type) else Network.targets


def score_teacher_bytes(node: DictConfig) -> int:
    """Bytes of the weights of a second teacher; 0 if its files are not here."""
    folder, dtype = Path(shipped(str(node.path))), node.get("dtype", "float32")
    counts = sizes.of_pipeline(folder).values() if folder.is_dir() else ()
    return int(sum(counts) * getattr(torch, dtype).itemsize)


def frozen_width(cfg: DictConfig, width: int) -> int:
    """Bytes on the device of a weight of the frozen denoiser, `width` in its files' dtype.

    Under bf16-mixed a GPU holds its layers in bfloat16, and the host what rounding took.
    """
    name, accelerator = cfg.trainer.precision, cfg.trainer.get("accelerator") or "auto"
    name = best_precision(accelerator).name if name == "auto" else name
    halves = str(name).startswith("bf16") and device(accelerator).type != "cpu"
    return min(width, 2) if halves else width


def sample_decoding(cfg: DictConfig, path: Path, denoiser: str) -> dict[str, float]:
    """Bytes that decoding the samples takes during training, under what they are; {} for a run
    without them, or where the size of its pictures is nowhere.
    """
    if not OmegaConf.select(cfg, "callbacks.samples._target_"):
        return {}
    teacher, frames = cfg.teacher, cfg.teacher.get("frames", 0)
    side = teacher.get("size") or sizes.pixels_of(path, denoiser) or 0
    height, width = (teacher.height, teacher.width) if frames else (side, side)
    if not height:
        return {}
    what = f"a video of {frames} frames" if frames else "pictures"
    dtype, tiling = autoencoder_dtype(cfg, path), bool(teacher.get("tiling"))
    bytes_of = sizes.decoding(path, height, width, dtype, frames=frames, tiling=tiling)
    return {f"decoding {what} of {width}x{height}": bytes_of}


def autoencoder_dtype(cfg: DictConfig, path: Path) -> str:
    """Name of the dtype of the autoencoder in the teacher's folder."""
    facts = family(str(cfg.teacher._target_)) or Family()
    dtype = cfg.teacher.get("dtype") or "float32"
    return facts.autoencoder_dtype(dtype, sizes.config_of(path, "vae"))


def embedded(cfg: DictConfig) -> bool:
    """Whether the data hold embedded captions, so that no text encoder is read."""
    if cfg.data.get("_target_") != LATENTS:
        return False
    path = shipped(str(cfg.data.path))
    if stores.is_url(path):
        folder = stored_shards(path)[0].url.rpartition("/")[0]
        return stores.exists(f"{folder}/{NULL}")
    return (Path(expand(path)[0]).parent / NULL).is_file()


def _starting(counts: dict[str, int], prefix: str) -> int:
    return sum(count for name, count in counts.items() if name.startswith(prefix))
