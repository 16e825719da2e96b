"""The loggers of `logger=wandb`, `mlflow` and `trackio`.

They take few keys. A run folder of somebody else may name these classes, and must not choose a
server or an account: `trust.NOT_FROM_LOGGERS` leaves `entity`, `tracking_uri` and `space_id` to the
command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

PROJECT = "distill"
# Ours, in seconds: a server that stalls holds a run up for no longer.
WANDB_TIMES = {"init_timeout": 60, "finish_timeout": 120}
MLFLOW_TIMES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class Wandb(WandbLogger):
    """A run at W&B, or with `offline` below wandb/ in the run folder, for `wandb sync`.

    Args:
        name: of the run; the run folder's name if it is not given.
        entity: team or user; None: that of the login.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = PROJECT,
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        offline: bool = False,
        id: str | None = None,
    ):
        import wandb

        # Not Lightning's `offline`, which sets a variable for all runs of the process.
        mode = {"mode": "offline"} if offline else {}
        more = {"entity": entity, "group": group, "tags": list(tags or ()) or None, **mode}
        settings = wandb.Settings(console="off", **WANDB_TIMES)  # run.log has the output
        name = name or Path(save_dir).name
        super().__init__(
            name=name, save_dir=save_dir, project=project, id=id, settings=settings, **more
        )


class Mlflow(MLFlowLogger):
    """A run at an MLflow server, or in a data base.

    Args:
        run_name: the run folder's name if it is not given.
        tracking_uri: None: MLFLOW_TRACKING_URI, or else `mlflow.db` in the working folder, where
            `mlflow ui` looks for it.
    """

    def __init__(
        self,
        save_dir: str,
        experiment_name: str = PROJECT,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        run_id: str | None = None,
    ):
        for name, value in MLFLOW_TIMES.items():
            os.environ.setdefault(name, value)
        place = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        files = None
        if not place:  # the paths are absolute: a resumed run finds them from any folder
            place, files = f"sqlite:///{Path('mlflow.db').resolve()}", Path("mlartifacts").resolve()
        super().__init__(
            experiment_name=experiment_name,
            run_name=run_name or Path(save_dir).name,
            tracking_uri=place,
            artifact_location=files.as_uri() if files else None,
            tags=dict(tags or {}),
            run_id=run_id,
        )


class Trackio(Logger):
    """A run of Trackio: in its local data base, or in a Space of Hugging Face.

    Args:
        name: of the run; the run folder's name if it is not given.
        space_id: `<user>/<space>`; None: local, shown by `trackio show`.
        run: the name of an earlier run to continue.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = PROJECT,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        run: str | None = None,
    ):
        super().__init__()
        self._name = run or name or Path(save_dir).name
        how = "allow" if run else "never"
        self._options = {"group": group, "space_id": space_id, "resume": how, "embed": False}
        self._project = project
        self._run: Any = None
        self.config: Mapping[str, Any] = {}  # set before the run begins

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        """The name of the run, by which Trackio continues it."""
        return self._run.name if self._run is not None else self._name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, which begins here."""
        if self._run is None:
            import trackio

            self._run = trackio.init(
                self._project, self._name, config=dict(self.config), **self._options
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.config = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def close(self) -> None:
        """Write what is left. The run ends, and can be continued."""
        if self._run is not None:
            self._run.finish()
            self._run = None
