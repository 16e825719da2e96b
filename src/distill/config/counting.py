"""What `doctor` counts of a configuration: its teacher's files, and strategies that it can use."""

from math import prod
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from distill.config.compose import shipped
from distill.config.generator import check_generator
from distill.config.optimizers import check_optimizers
from distill.config.quantizing import check_quantize
from distill.teachers.loading import sizes
from distill.teachers.loading.held import PLACES, held_in
from distill.teachers.loading.locate import index_of
from distill.teachers.loading.reading import home_of

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
