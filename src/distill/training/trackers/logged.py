"""What trackers get beside rows: the configuration, pictures of samples, scores and the report.

`metrics.csv` gets none of it: config.yaml, samples/, scores.csv and report.html have it. A logger
of one's own gets what it has a method for:

    log_picture(name, picture, step)  a picture, uint8 [H, W, 3]
    log_report(path)                  the page of a finished run
    close()                           the end of the run
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.machine.faults import first_line
from distill.storage.bounded import is_number
from distill.terminal.secret import masked
from distill.training.csv_logger import CsvLog

log = logging.getLogger(__name__)
REPORT = "report"  # name of the artefact
COUNTED = ("step", "steps", "who", "images_seen", "train_seconds")  # of a row, which are no scores


def trackers(loggers: Iterable[Any]) -> list[Any]:
    """The loggers without `metrics.csv`."""
    return [logger for logger in loggers if not isinstance(logger, CsvLog)]


def begin(
    loggers: Mapping[str, Any], config: Mapping[str, Any], text: str, known: Mapping[str, Any]
) -> None:
    """Begin the run of every tracker, and give it the configuration, without secrets.

    text: the same as YAML. known: ids of the runs that are continued, by key. Raises ValueError,
    naming the key, for a tracker that cannot begin. Only process 0 may call it.
    """
    for key, logger in loggers.items():
        if isinstance(logger, CsvLog):
            continue
        try:
            (_call_of(logger, BEGIN) or _begin)(logger, config, text, key in known)
        except Exception as error:  # a tracker may raise anything
            said = masked(first_line(error, 200)).rstrip(".")
            what = f"cannot begin ({type(error).__name__}: {said}); repair it"
            raise ValueError(f"logger.{key}: {what}, or leave it out by ~logger.{key}") from None


def picture(loggers: Iterable[Any], name: str, pixels: np.ndarray, step: int) -> None:
    """Give a picture, uint8 [H, W, 3], to every tracker that takes pictures."""
    for logger in trackers(loggers):
        _offer(logger, _call_of(logger, PICTURES, "log_picture"), name, pixels, step)


def scores(loggers: Iterable[Any], row: Mapping[str, Any], step: int, prefix: str) -> None:
    """Give the numbers of a row of scores to every tracker, as `<prefix>/<measure>`."""
    found = {f"{prefix}/{k}": v for k, v in row.items() if k not in COUNTED and is_number(v)}
    for logger in trackers(loggers) if found else ():
        _offer(logger, lambda each: each.log_metrics(found, step=step))


def report(loggers: Iterable[Any], path: Path) -> None:
    """Give the report to every tracker that keeps files."""
    for logger in trackers(loggers) if path.is_file() else ():
        _offer(logger, _call_of(logger, REPORTS, "log_report"), path)


def close(loggers: Iterable[Any]) -> None:
    """End the run of every tracker in this process: another run may follow."""
    for logger in trackers(loggers):
        _offer(logger, _call_of(logger, CLOSES, "close"))


def _offer(logger: Any, call: Callable[..., None] | None, *args: Any) -> None:
    """Call it; a failure is a warning, and counts as one of the tracker."""
    if call is None:
        return
    guard = getattr(logger, "guard", None)
    if guard is not None:
        guard.offer(call, logger, *args)
        return
    try:
        call(logger, *args)
    except Exception as error:  # a tracker may raise anything
        log.warning("%s: %s", type(logger).__name__, masked(first_line(error, 200)))


def _call_of(logger: Any, table: Mapping[str, Any], own: str = "") -> Callable[..., None] | None:
    """The logger's method of the name `own`, called as the functions here, or else the entry of its
    class or nearest base in the table; None if there is neither.
    """
    if own and (bound := getattr(logger, own, None)) is not None:
        return lambda _logger, *args: bound(*args)
    return next((table[c.__name__] for c in type(logger).__mro__ if c.__name__ in table), None)


def _begin(logger: Any, config: Mapping[str, Any], text: str, continued: bool) -> None:
    logger.log_hyperparams(dict(config))
    _ = logger.experiment if hasattr(type(logger), "experiment") else None


# -- TensorBoard -----------------------------------------------------------------------------------


def _tensorboard_begin(logger: Any, config: Mapping[str, Any], text: str, continued: bool) -> None:
    if not continued:  # Lightning's hyperparameters would add a second file of events
        logger.experiment.add_text("config", f"```yaml\n{text}\n```", 0)


def _tensorboard_picture(logger: Any, name: str, pixels: np.ndarray, step: int) -> None:
    logger.experiment.add_image(name, pixels, step, dataformats="HWC")


# -- W&B -------------------------------------------------------------------------------------------


def _wandb_picture(logger: Any, name: str, pixels: np.ndarray, step: int) -> None:
    import wandb

    # As Lightning logs rows: with the step beside them, since W&B takes no step of the past.
    logger.experiment.log({name: wandb.Image(pixels), "trainer/global_step": step})


def _wandb_report(logger: Any, path: Path) -> None:
    import wandb

    artifact = wandb.Artifact(f"{REPORT}-{logger.experiment.id}", type=REPORT)
    artifact.add_file(str(path))
    logger.experiment.log_artifact(artifact)


def _wandb_close(logger: Any) -> None:
    if logger._experiment is not None:
        logger._experiment.finish()
        logger._experiment = None


# -- MLflow ----------------------------------------------------------------------------------------


def _mlflow_begin(logger: Any, config: Mapping[str, Any], text: str, continued: bool) -> None:
    if continued:  # its parameters cannot change; its run has ended
        logger.experiment.update_run(logger.run_id, status="RUNNING")
        return
    logger.log_hyperparams(dict(config))
    logger.experiment.log_text(logger.run_id, text, "config.yaml")


def _mlflow_picture(logger: Any, name: str, pixels: np.ndarray, step: int) -> None:
    logger.experiment.log_image(logger.run_id, pixels, f"{name}/step_{step:06d}.png")


def _mlflow_report(logger: Any, path: Path) -> None:
    logger.experiment.log_artifact(logger.run_id, str(path))


# -- Trackio ---------------------------------------------------------------------------------------


def _trackio_picture(logger: Any, name: str, pixels: np.ndarray, step: int) -> None:
    import trackio

    logger.experiment.log({name: trackio.Image(pixels)}, step=step)


def _trackio_report(logger: Any, path: Path) -> None:
    logger.experiment.log_artifact(str(path), name=f"{REPORT}-{logger.version}", type=REPORT)


BEGIN = {"TensorBoardLogger": _tensorboard_begin, "MLFlowLogger": _mlflow_begin}
PICTURES = {
    "TensorBoardLogger": _tensorboard_picture,
    "WandbLogger": _wandb_picture,
    "MLFlowLogger": _mlflow_picture,
    "Trackio": _trackio_picture,
}
REPORTS = {"WandbLogger": _wandb_report, "MLFlowLogger": _mlflow_report, "Trackio": _trackio_report}
CLOSES = {"WandbLogger": _wandb_close}
