"""From a configuration to objects, in the order of the sentence: a teacher teaches a student against a discriminator
by a method, on data."""

from __future__ import annotations

import datetime
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

import distill.shapes

PREFIXES = ("distill.", "torch.", "lightning.")  # what a configuration may build
FAMILIES = {
    "StableDiffusion3Pipeline": "distill.teachers.sd3.SD3",
    "StableDiffusionPipeline": "distill.teachers.sd.SD",
}
EXPECTED = (  # warnings that say nothing new about a run of ours
    ".*does not have many workers.*",
    ".*ModelCheckpoint.*manual optimization.*",
    ".*in eval mode.*",
    ".*Checkpoint directory.*exists and is not empty.*",
    ".*Experiment logs directory.*exists and is not empty.*",
    ".*isinstance.treespec, LeafSpec.*",
)
SHIPPED = "shapes:"  # a path `shapes:name` means the model or shards of this name inside the package


def make(node: DictConfig) -> Any:
    """The one way to instantiate: allowed targets only, plain containers, shipped paths made absolute."""
    _refuse_foreign_targets(node)
    node = OmegaConf.create(_resolve(OmegaConf.to_container(node, resolve=True)))
    return instantiate(node, _convert_="all")


def _refuse_foreign_targets(node: Any) -> None:
    if isinstance(node, DictConfig):
        target = node.get("_target_")
        if target is not None and not str(target).startswith(PREFIXES):
            raise ValueError(
                f"_target_: {target} is refused: a configuration may name only {', '.join(p + '*' for p in PREFIXES)}"
            )
        for value in node.values():
            _refuse_foreign_targets(value)
    elif isinstance(node, ListConfig):
        for value in node:
            _refuse_foreign_targets(value)


def _resolve(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner) for inner in value]
    return shipped(value) if isinstance(value, str) else value


def shipped(path: str) -> str:
    """`shapes:mmdit` -> the folder in the package; any other path unchanged."""
    if not path.startswith(SHIPPED):
        return path
    folder = Path(distill.shapes.__file__).parent / "models" / path.removeprefix(SHIPPED)
    if not folder.exists():
        known = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.exists() else []
        raise FileNotFoundError(f"{path}: nothing of this name is shipped; there is {', '.join(known)}")
    return str(folder)


def teacher(cfg: DictConfig) -> Any:
    return make(cfg.teacher)


def source(cfg: DictConfig) -> Any:
    return make(cfg.data)


def method(cfg: DictConfig, teacher: Any) -> Any:
    """The Lightning module: teacher, student, features, heads and engine handed to the method."""
    features = make(cfg.discriminator.features)(teacher=teacher)
    condition = teacher.embed([""]).pooled
    heads = make(cfg.discriminator.heads)(
        channels=features.channels, pooled=0 if condition is None else condition.shape[1]
    )
    student = make(cfg.student)(teacher=teacher)
    return make(cfg.method)(
        teacher=teacher, student=student, features=features, heads=heads, engine=make(cfg.optimizer), seed=cfg.seed
    )


def trainer(cfg: DictConfig, folder: Path) -> Any:
    """The Lightning trainer, with loggers and checkpoints inside the run folder."""
    callbacks = [make(node) for node in cfg.callbacks.values() if node]
    for callback in callbacks:
        if hasattr(callback, "dirpath"):
            callback.dirpath = str(folder / "checkpoints")
    loggers = [make(node)(save_dir=str(folder)) for node in cfg.logger.values() if node]
    return make(cfg.trainer)(
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(folder),
        max_epochs=-1,
        enable_progress_bar=False,  # ours counts student steps
        enable_model_summary=False,
        use_distributed_sampler=False,  # the stream shares out samples by itself
    )


def run_folder(cfg: DictConfig) -> Path:
    """The folder of this run, made: `run_dir`, or a fresh `runs/<date>_<name>`."""
    if cfg.resume:
        folder = Path(cfg.resume)
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(f"resume={cfg.resume}: not a run folder (it has no config.yaml)")
        return folder
    if cfg.run_dir:
        folder = Path(cfg.run_dir)
        if (folder / "config.yaml").exists():
            raise FileExistsError(f"run_dir={folder} holds a run already; choose another or resume={folder}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        folder = Path("runs") / f"{stamp}_{name_of(cfg)}{suffix}"
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            continue
    raise FileExistsError("a thousand runs began in one second; set run_dir=")


def name_of(cfg: DictConfig) -> str:
    """`name`, or `<method>_<teacher>` as chosen on the command line."""
    if cfg.name:
        return cfg.name
    if HydraConfig.initialized():
        choices = HydraConfig.get().runtime.choices
        return f"{choices['method']}_{choices['teacher']}"
    return str(cfg.method._target_).rsplit(".", 1)[-1].lower()


def position(checkpoint: Path) -> int:
    """How many batches the run behind this checkpoint had read."""
    import torch

    if not checkpoint.is_file():
        raise FileNotFoundError(f"resume: {checkpoint.parent} holds no checkpoint to go on from")
    kept = torch.load(checkpoint, weights_only=True, map_location="cpu")["distill"]
    return int(kept["iteration"]) * int(kept["accumulate"])


def table(rows: list[dict[str, Any]]) -> str:
    """The judging as lines for a terminal."""
    columns = ("prompt_accuracy", "frechet", "precision", "recall", "stripe_sharpness", "diversity")
    lines = [f"{'':10}{'steps':>6}" + "".join(f"{name.replace('_', ' '):>18}" for name in columns)]
    for row in rows:
        values = "".join(f"{row[name]:>18.3f}" if name in row else f"{'-':>18}" for name in columns)
        lines.append(f"{row['who']:10}{row['steps']:>6}{values}")
    return "\n".join(lines)


def student_of(run: str) -> Any:
    """The student of a run folder, or any pipeline folder of a family we know, opened by our own adapter."""
    folder = Path(shipped(run))
    folder = folder / "student" if (folder / "student").is_dir() else folder
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"run={run}: neither a finished run (no student/ in it) nor a diffusers pipeline folder"
        )
    found = json.loads(index.read_text()).get("_class_name")
    if found not in FAMILIES:
        raise ValueError(f"run={run} holds a {found}; known are {', '.join(FAMILIES)}")
    return make(OmegaConf.create({"_target_": FAMILIES[found], "path": str(folder)}))


def seed_everything(seed: int) -> None:
    """Seed what a library may draw from the global generators, and silence what is expected of Lightning here."""
    import lightning

    lightning.seed_everything(seed, verbose=False)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
