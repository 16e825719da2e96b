"""The loggers of a run, from the configuration; a resumed run continues those that it had.

A resumed run logs the rows after its checkpoint again. `metrics.csv` drops them first
(`CsvLog.resume_at`), and TensorBoard is given the step from which to drop. W&B, MLflow and Comet
cannot drop rows: they hold such rows twice, with the same step.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from distill.config.compose import make, to_yaml
from distill.terminal.secret import masked_tree
from distill.training.csv_logger import CsvLog
from distill.training.guarded_loggers import guarded
from distill.training.trackers import checks, logged

# Class -> its argument for the id of a tracker's run, which its `version` returns.
CONTINUED = {
    "CometLogger": "experiment_key",
    "MLFlowLogger": "run_id",
    "Mlflow": "run_id",
    "TensorBoardLogger": "version",
    "Trackio": "run",
    "Wandb": "id",
    "WandbLogger": "id",
}
PURGING = "TensorBoardLogger"


def made(
    cfg: DictConfig, folder: Path, known: Mapping[str, Any] | None, step: int | None
) -> dict[str, Any]:
    """Each logger by its key in the configuration, writing into `folder`.

    `known` are the ids of the trackers' runs from a checkpoint, and `step` is that of the
    checkpoint; None for a new run. Raises ValueError, naming the key, for a logger that cannot be
    built.
    """
    nodes = (cfg.get("logger") or {}).items()
    return {str(k): _made(str(k), node, folder, known or {}, step) for k, node in nodes if node}


def check(cfg: DictConfig) -> None:
    """Raise ValueError, naming the key, for a tracker without its package, login or network."""
    nodes = OmegaConf.to_container(cfg.get("logger") or OmegaConf.create({}), resolve=True)
    checks.check({str(k): node for k, node in nodes.items() if node})


def begin(cfg: DictConfig, loggers: Mapping[str, Any], known: Mapping[str, Any] | None) -> None:
    """Begin the trackers' runs with the configuration of this run, in process 0.

    `known` are ids from a checkpoint, as for `made`. Raises ValueError, naming the key.
    """
    tree = masked_tree(OmegaConf.to_container(cfg, resolve=True))
    logged.begin(loggers, tree, to_yaml(cfg).decode(), known or {})


def _made(
    name: str, node: DictConfig, folder: Path, known: Mapping[str, Any], step: int | None
) -> Any:
    kind, key = str(node.get("_target_")).rpartition(".")[2], f"logger.{name}"
    more: dict[str, Any] = {}
    argument = CONTINUED.get(kind)
    if argument and node.get(argument) is None and isinstance(known.get(name), str | int):
        more[argument] = known[name]
    if kind == PURGING and step is not None:
        more["purge_step"] = step + 1
    build = make(node, key)
    try:
        logger = build(save_dir=str(folder), **more)
    except Exception as error:  # a tracker may raise anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        what = f"cannot be built ({said}); repair it, or leave it out by ~{key}"
        raise ValueError(f"{key}: {what}") from None
    # Failures of metrics.csv end the run: its rows are the results.
    return logger if isinstance(logger, CsvLog) else guarded(logger)


def names(loggers: Mapping[str, Any]) -> dict[str, str | int]:
    """Ids of the trackers' runs for a checkpoint, by key, of loggers that can continue one."""
    found = {}
    for key, logger in loggers.items():
        version = logger.version if type(logger).__name__ in CONTINUED else None
        if isinstance(version, str | int):
            found[key] = version
    return found
