"""The loggers of a run: made by the configuration, and on resume the very ones that the run had.

A row that was logged after the checkpoint is logged again by a run that goes on. `metrics.csv`
drops it first (`CsvLog.go_on`), and TensorBoard is told from which step on to forget. W&B, MLflow
and Comet take back nothing: their run goes on, and has such a row twice, at the same step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from distill.config.compose import make
from distill.training.csv_logger import CsvLog
from distill.training.guarded_loggers import spared

# Class -> its argument that names a run of the tracker, which its `version` gives.
CONTINUED = {
    "CometLogger": "experiment_key",
    "MLFlowLogger": "run_id",
    "TensorBoardLogger": "version",
    "WandbLogger": "id",
}
FORGETTING = "TensorBoardLogger"


def made(
    cfg: DictConfig, folder: Path, known: Mapping[str, Any] | None, step: int | None
) -> dict[str, Any]:
    """Each logger by its key in the configuration, writing into `folder`.

    `known` are the names of the trackers' own runs that a checkpoint kept, and `step` is that of
    the checkpoint; None for a new run. Raises ValueError, naming the key, where one cannot be made.
    """
    nodes = (cfg.get("logger") or {}).items()
    return {str(k): _made(str(k), node, folder, known or {}, step) for k, node in nodes if node}


def _made(
    name: str, node: DictConfig, folder: Path, known: Mapping[str, Any], step: int | None
) -> Any:
    kind, key = str(node.get("_target_")).rpartition(".")[2], f"logger.{name}"
    more: dict[str, Any] = {}
    argument = CONTINUED.get(kind)
    if argument and node.get(argument) is None and isinstance(known.get(name), str | int):
        more[argument] = known[name]
    if kind == FORGETTING and step is not None:
        more["purge_step"] = step + 1
    build = make(node, key)
    try:
        logger = build(save_dir=str(folder), **more)
    except Exception as error:  # of a tracker nearly anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        what = f"cannot be made ({said}); mend that, or leave it out by ~{key}"
        raise ValueError(f"{key}: {what}") from None
    # metrics.csv is the record of the run
    return logger if isinstance(logger, CsvLog) else spared(logger)


def names(loggers: Mapping[str, Any]) -> dict[str, str | int]:
    """What a checkpoint keeps: key -> the tracker's own name for its run, of those that can go on
    with one.
    """
    found = {}
    for key, logger in loggers.items():
        version = logger.version if type(logger).__name__ in CONTINUED else None
        if isinstance(version, str | int):
            found[key] = version
    return found
