"""Search for good values of any keys with Optuna. Each trial is an ordinary run, in its own process
and folder. The study is a database beside them: give the command again, and it continues. The first
trial has the run's own values, if the ranges include them.

    python -m distill.search 'space=["optimizer.student.lr=log(1e-5,1e-3)"]' trials=20
    python -m distill.search 'space=["loop.ema_decay=uniform(0.9,1)"]' 'run=["method=add"]'
    python -m distill.search 'space=["seed=choice(0,1)"]' metric=frechet direction=minimize
"""

import csv
import errno
import io
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig, ListConfig, OmegaConf
from yaml import YAMLError

from distill.config import validate
from distill.config.compose import check_counts
from distill.config.errors import command
from distill.config.typed import masked_override
from distill.machine.faults import RERUN, first_line
from distill.machine.signals import child_environment, new_session
from distill.storage.atomic import write_text_atomic
from distill.storage.bounded import mapping_of
from distill.storage.locks import one_writer
from distill.terminal.console import note, say
from distill.terminal.progress import Bar, stage
from distill.terminal.shown import in_csv
from distill.training.run_folders import LOG

RUN = (sys.executable, "-m", "distill.run")
SQLITE_ERRORS = {  # message of SQLite -> error number of the system
    "disk is full": errno.ENOSPC,
    "disk I/O error": errno.EIO,
    "readonly database": errno.EROFS,
}
RANGE = re.compile(r"([\w./@]+)=(?:(choice)\((.+)\)|(log|uniform|int)\(([^,]+,[^,]+)\))")


def parsed(text: str) -> tuple[str, str, list[str]]:
    """Key, kind and values of a range. Raises ValueError for one that does not parse."""
    with suppress(YAMLError):
        if found := RANGE.fullmatch(text.replace(" ", "")):
            # as in a configuration: null, true, lists
            values = OmegaConf.create(f"[{found[3] or found[5]}]")
            return found[1], found[2] or found[4], [as_override(value) for value in values]
    known = "key=log(low,high), =uniform(low,high), =int(low,high) or =choice(a,b)"
    raise ValueError(f"space: {text!r} is not {known}")


def as_override(value: Any) -> str:
    """A value of a configuration as text for an override."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=OmegaConf.to_container, separators=(",", ":"))


def suggest(trial: Any, space: list[str]) -> list[str]:
    """One override `key=value` for every range."""
    chosen: dict[str, Any] = {}
    for key, kind, values in map(parsed, space):
        if kind == "choice":
            chosen[key] = trial.suggest_categorical(key, values)
        elif kind == "int":
            chosen[key] = trial.suggest_int(key, *map(int, values))
        else:
            chosen[key] = trial.suggest_float(key, *map(float, values), log=kind == "log")
    return [f"{key}={value}" for key, value in chosen.items()]


def table(study: Any, file: Path) -> None:
    """Write every finished trial with its values as a row of `file`, best first."""
    from optuna.trial import TrialState

    largest = study.direction.name == "MAXIMIZE"
    done = sorted(
        study.get_trials(states=[TrialState.COMPLETE]),
        key=lambda trial: trial.value,
        reverse=largest,
    )
    keys = sorted({key for trial in done for key in trial.params})
    rows = csv.writer(text := io.StringIO(newline=""))
    rows.writerow(["trial", "value", *map(in_csv, keys)])
    for trial in done:
        chosen = (trial.params.get(key) for key in keys)
        rows.writerow([trial.number, trial.value, *map(in_csv, chosen)])
    write_text_atomic(file, text.getvalue())


def score(folder: Path, metric: str, steps: int) -> float:
    """The metric of a finished run. Raises ValueError if it has no such number."""
    result = folder / "evaluation.json"
    for row in mapping_of(result)["rows"] if result.is_file() else ():
        if row["who"] == "student" and row["steps"] == steps and metric in row:
            return float(row[metric])
    table = folder / "metrics.csv"
    try:
        with table.open(newline="", encoding="utf-8") as file:
            logged = [row[metric] for row in csv.DictReader(file) if row.get(metric)]
    except csv.Error as error:
        raise ValueError(f"{table}: cannot be read as a table ({error})") from None
    if not logged:
        what = f"{folder} has no such number in evaluation.json or metrics.csv"
        raise ValueError(f"metric={metric}: {what}")
    return float(logged[-1])


def _first_parameters(run: list[str], space: list[str]) -> dict[str, Any]:
    """Parameters of the first trial: the run's own, where the ranges hold them."""
    with stage("composing the run"):
        shown = subprocess.run([*RUN, *run, "--cfg", "job", "--resolve"], stdout=subprocess.PIPE)
    if shown.returncode:
        raise ValueError(f"run={run} cannot be composed; see above")
    plain, first = OmegaConf.create(shown.stdout.decode()), {}
    for key, kind, values in map(parsed, space):
        value = OmegaConf.select(plain, key)
        if kind == "choice":
            first |= {key: as_override(value)} if as_override(value) in values else {}
        elif value is not None and float(values[0]) <= float(value) <= float(values[1]):
            first[key] = value
    return first


def retry(study: Any, trial: Any) -> None:
    """Queue the same values again: this trial failed for another reason than its values."""
    from optuna.trial import TrialState

    study.tell(trial.number, state=TrialState.FAIL)
    study.enqueue_trial(trial.params)


def study_in(out: Path, cfg: DictConfig) -> Any:
    """The study in this folder, or a new one.

    Raises ValueError for a study with other settings, and for one that cannot be read.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    keys = ("space", "run", "metric", "steps", "direction")
    settings = {key: list(cfg[key]) if key in ("space", "run") else cfg[key] for key in keys}
    settings["run"] = [masked_override(override) for override in settings["run"]]
    study, known = _opened(out / "study.db", cfg.direction, settings)
    # Settings may change until a trial was measured. The direction is fixed in the study.
    free = () if study.get_trials(states=counted()) else ("space", "run", "metric", "steps")
    other = [key for key, value in known.items() if settings[key] != value and key not in free]
    if other:
        what = f"holds trials of another {', '.join(other)}; choose another out=, or take that back"
        raise ValueError(f"out={out} {what}")
    if any(known[key] != settings[key] for key in ("space", "run")):
        # Trials of the previous ranges are dropped.
        for waiting in study.get_trials(states=[TrialState.WAITING, TrialState.RUNNING]):
            study.tell(waiting.number, state=TrialState.FAIL)
    study.set_user_attr("asked", settings)
    study.sampler = optuna.samplers.TPESampler(seed=cfg.seed + len(study.trials))
    return study


def _opened(file: Path, direction: str, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The study in this file, which is made if needed, and the settings that it was begun with.

    Raises ValueError for a study of another version of Optuna, or with damaged values.
    """
    import optuna

    # Quoted: a question mark would end the file's name in the address.
    place = {"study_name": "search", "storage": f"sqlite:///{quote(file.as_posix(), safe='/:')}"}
    try:
        study = optuna.create_study(**place, direction=direction, load_if_exists=True)
        known = study.user_attrs.get("asked", settings)
        study.get_trials()
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise _unreadable(file, first_line(error, 120)) from None
    if not isinstance(known, dict) or known.keys() != settings.keys():
        raise _unreadable(file, "it does not say its settings")
    return study, known


def _unreadable(file: Path, why: str) -> ValueError:
    how = "move it away, or choose another out="
    return ValueError(f"{file}: is no study that can be read ({why}); {how}")


def counted() -> list[Any]:
    """The states of trials that count. A trial without a finite value is pruned, and counts."""
    from optuna.trial import TrialState

    return [TrialState.COMPLETE, TrialState.PRUNED]


def _run_trial(study: Any, cfg: DictConfig, out: Path, bar: Bar) -> None:
    """Run one trial in a process; the bar shows the last line of its log."""
    from optuna.trial import TrialState

    trial = study.ask()
    folder, chosen = out / f"trial_{trial.number:03d}", suggest(trial, list(cfg.space))
    run = [*cfg.run, *chosen, f"run_dir={folder}"]
    note(f"search: trial {trial.number} begins, with {' '.join(chosen)}")
    bar.update(bar.done, said=lambda: _last_line(folder / LOG))
    ended = subprocess.run(
        [*RUN, *run],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=child_environment(),
        **new_session(),
    )
    if ended.stderr:  # print it above the bar
        print(ended.stderr.decode(errors="replace"), end="", file=sys.stderr)
    if ended.returncode:
        study.tell(trial, state=TrialState.FAIL)
        raise ValueError(
            f"trial {trial.number} failed; try it: python -m distill.run {' '.join(run)}"
        )
    try:
        value = score(folder, cfg.metric, cfg.steps)
    except ValueError:
        retry(study, trial)
        raise
    study.tell(trial, *([value] if math.isfinite(value) else [None, TrialState.PRUNED]))
    table(study, out / "trials.csv")
    say(f"trial {trial.number}: {cfg.metric} {value:.4g} with {' '.join(chosen)}")


def _last_line(log: Path) -> str:
    """The last line of a log; "" if there is none yet."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
        return lines[-1] if lines else ""
    return ""


@command("search", hint=RERUN)
def main(cfg: DictConfig) -> None:
    """Run trials until `trials` are finished; print each and the best, and write `trials.csv`."""
    out, space = Path(cfg.out), _space(cfg)  # checked before anything is written
    check_counts(cfg, {"steps": 1, "trials": 1, "seed": 0})
    validate.check_word(cfg, "direction", "maximize", "minimize")
    with one_writer(out, "out", deep=True), _storage_errors(out / "study.db"):
        _search(cfg, out, space)


def _space(cfg: DictConfig) -> list[str]:
    """The ranges. Raises ValueError if one does not parse, or there is none."""
    if not isinstance(cfg.space, ListConfig) or not cfg.space:
        how = """give a list of them, as 'space=["seed=int(0,9)"]'"""
        raise ValueError(f"space={cfg.space}: has no range to search; {how}")
    space = [str(text) for text in cfg.space]
    list(map(parsed, space))
    return space


@contextmanager
def _storage_errors(study: Path) -> Iterator[None]:
    """Turn SQLite errors, which Optuna wraps, into OSError or ValueError that names the study."""
    try:
        yield
    except Exception as error:
        cause: Any = error
        while cause is not None and not isinstance(cause, sqlite3.Error):
            cause = getattr(cause, "orig", None) or cause.__cause__
        if cause is None:
            raise
        message = str(cause)
        number = next((n for text, n in SQLITE_ERRORS.items() if text in message), None)
        if number:
            raise OSError(number, os.strerror(number), str(study)) from None
        raise _unreadable(study, message) from None


def _search(cfg: DictConfig, out: Path, space: list[str]) -> None:
    from optuna.trial import TrialState

    exists = (out / "study.db").exists()
    # Composed before anything is written: a wrong run leaves no files behind.
    first = None if exists else _first_parameters(list(cfg.run), space)
    out.mkdir(parents=True, exist_ok=True)
    study = study_in(out, cfg)
    if not study.get_trials(states=[*counted(), TrialState.RUNNING, TrialState.WAITING]):
        study.enqueue_trial(_first_parameters(list(cfg.run), space) if first is None else first)
    for stale in study.get_trials(states=[TrialState.RUNNING]):  # of a command that was killed
        retry(study, stale)
    done = len(study.get_trials(states=counted()))
    with Bar("search", cfg.trials, unit="trial", done=min(done, cfg.trials)) as bar:
        while done < cfg.trials:
            _run_trial(study, cfg, out, bar)
            done = len(study.get_trials(states=counted()))
            bar.update(done)
    table(study, out / "trials.csv")  # again, since a kill may have come before the last row
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise ValueError(f"metric={cfg.metric}: none of the trials has a finite value of it")
    best = study.best_trial
    print(f"best: trial {best.number}, {cfg.metric} {best.value:.4g} with {best.params}")


if __name__ == "__main__":
    main()
