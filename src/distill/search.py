"""`python -m distill.search 'space=["optimizer.student.lr=log(1e-5,1e-3)"]'`: good values of any keys, by Optuna.

Every trial is an ordinary run in a process and a folder of its own; the study is a database beside them, so that the
same command goes on where it stopped.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra

from distill._conf import CONF_DIR
from distill.errors import said_plainly

if TYPE_CHECKING:
    from omegaconf import DictConfig

_RANGE = re.compile(r"^([\w./@]+)=(log|uniform|int|choice)\((.+)\)$")


def suggest(trial: Any, space: list[str]) -> list[str]:
    """One override `key=value` for every range. Raises ValueError for one that does not parse."""
    return [f"{key}={_value(trial, key, kind, values)}" for key, kind, values in map(_parsed, space)]


def _parsed(text: str) -> tuple[str, str, list[str]]:
    match = _RANGE.match(text.replace(" ", ""))
    if match is None or (match[2] != "choice" and match[3].count(",") != 1):
        raise ValueError(
            f"space: {text!r} is not key=log(low,high), =uniform(low,high), =int(low,high) or =choice(a,b)"
        )
    return match[1], match[2], match[3].split(",")


def _value(trial: Any, key: str, kind: str, values: list[str]) -> Any:
    if kind == "choice":
        return trial.suggest_categorical(key, values)
    if kind == "int":
        return trial.suggest_int(key, int(values[0]), int(values[1]))
    return trial.suggest_float(key, float(values[0]), float(values[1]), log=kind == "log")


def score(folder: Path, metric: str, steps: int) -> float:
    """What a finished run is worth. Raises KeyError if it has no such number."""
    verdict = folder / "evaluation.json"
    rows = json.loads(verdict.read_text())["rows"] if verdict.is_file() else []
    for row in rows:
        if row["who"] == "student" and row["steps"] == steps and metric in row:
            return float(row[metric])
    with (folder / "metrics.csv").open(newline="") as file:
        logged = [row[metric] for row in csv.DictReader(file) if row.get(metric)]
    if not logged:
        raise KeyError(f"metric={metric}: {folder} has no such number, neither judged nor logged")
    return float(logged[-1])


def search(cfg: DictConfig) -> None:
    """Trials until there are `trials` finished ones; prints each and the best."""
    import optuna

    space, out = list(cfg.space), Path(cfg.out)
    list(map(_parsed, space))
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="search", storage=f"sqlite:///{out / 'study.db'}", direction=cfg.direction, load_if_exists=True
    )
    for stale in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):  # the command was killed in the middle
        study.tell(stale.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(stale.params)
    study.sampler = optuna.samplers.TPESampler(seed=cfg.seed + len(study.trials))
    while len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) < cfg.trials:
        trial = study.ask()
        folder, chosen = out / f"trial_{trial.number:03d}", suggest(trial, space)
        command = [sys.executable, "-m", "distill.run", *cfg.run, *chosen, f"run_dir={folder}"]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise ValueError(f"trial {trial.number} failed; try it: python -m distill.run {' '.join(command[3:])}")
        value = score(folder, cfg.metric, cfg.steps)
        study.tell(trial, value)
        print(f"trial {trial.number}: {cfg.metric} {value:.4g} with {' '.join(chosen)}", flush=True)
    best = study.best_trial
    print(f"best: trial {best.number}, {cfg.metric} {best.value:.4g} with {best.params}")


@hydra.main(config_path=CONF_DIR, config_name="search", version_base="1.3")
def main(cfg: DictConfig) -> None:
    with said_plainly():
        search(cfg)


if __name__ == "__main__":
    main()
