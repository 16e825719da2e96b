"""The runs of a study: composed first, then several at a time, each resumed where it was cut
off.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

import distill.config.compose  # noqa: F401  registers the resolvers of the configuration
from distill.commandline.quoting import as_typed, for_hydra
from distill.config import validate
from distill.config.errors import sentence
from distill.config.location import CONF_DIR
from distill.machine.signals import child_environment, forward, new_session
from distill.storage.bounded import mapping_of
from distill.storage.locks import Holder, holder_of, one_writer
from runner.study import Job, Study, StudyError

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
EVALUATION = "evaluation.json"
EXIT_WAIT = 90.0  # ours: seconds in which a run saves whose runner was killed
STOPPED = 3  # exit code of a call that was stopped, or whose budget ended


class Run:
    """A job with a seed, in its folder."""

    def __init__(self, study: Study, job: Job, seed: int, out: Path):
        self.job, self.seed = job, seed
        self.folder = out / job.name / f"seed_{seed}"
        self.log = out / job.name / f"seed_{seed}.log"
        self.overrides = [word.replace("{out}", str(out)) for word in study.arguments(job, seed)]

    @property
    def is_finished(self) -> bool:
        return is_finished(self.folder)

    @property
    def has_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.ckpt"))

    @property
    def arguments(self) -> list[str]:
        """Of `distill.run`: resume it if it has a checkpoint."""
        if self.has_checkpoint:
            return [f"resume={self.folder}"]
        return [*self.overrides, f"run_dir={self.folder}"]

    def check_same(self) -> None:
        """Raise StudyError if the folder holds a run with other settings."""
        file = self.folder / "run.json"
        if not file.is_file():
            return
        known = mapping_of(file)
        before = known.get("overrides", [])
        before = [word for word in before if not word.startswith("run_dir=")]
        if sorted(before) != sorted(self.overrides):
            other = sorted(set(before) ^ set(self.overrides))
            what = f"was run with other settings ({', '.join(other)})"
            raise StudyError(f"{self.folder}: {what}; move it away, or choose another out=")
        if known.get("status") == "finished" and not (self.has_checkpoint or self.is_finished):
            what = f"has lost its {EVALUATION}"
            raise StudyError(f"{self.folder}: {what}; evaluate it with distill.evaluate run=...")


class Queue:
    """The runs of a study that are not finished, `workers` of them at a time."""

    def __init__(self, study: Study, out: Path, *, only: str = "", workers: int = 1):
        chosen = only.split(",") if only else [job.name for job in study.jobs]
        if unknown := [name for name in chosen if name not in [j.name for j in study.jobs]]:
            raise StudyError(f"only={only}: there is no job {unknown[0]}")
        self.study, self.out, self.workers = study, out, workers
        # seed by seed, so that a study that is cut off has all jobs with fewer seeds
        self._all = [Run(study, job, seed, out) for seed in study.seeds for job in study.jobs]
        self.runs = [run for run in self._all if run.job.name in chosen]
        self._lock = threading.RLock()  # a signal's handler may come while this thread has it
        self._waiting: list[Run] = []
        self._running: set[subprocess.Popen] = set()
        self._failed: list[Run] = []
        self._is_stopping = False

    def commands(self) -> list[str]:
        """The command of every run, as it is typed."""
        return [shlex.join(["python", "-m", "distill.run", *run.arguments]) for run in self.runs]

    def run(self, minutes: float | None) -> int:
        """Run what is left for at most so many minutes; returns the exit code."""
        with self._mistakes():
            compose_all(self.runs)  # keys and options, before anything is written
            for run in self._all:  # those that are not chosen go into the page too
                run.check_same()
        with self._mistakes(), one_writer(self.out, "out"), self._stopping_on_signals():
            left = [run for run in self.runs if not run.is_finished]
            if left:  # finished ones no longer need what was prepared
                self._prepare()
            if not self._is_stopping:
                compose_all(left, check=True)  # also files, which had to be prepared
                self._run_all(minutes)
            return self._summary()

    @contextmanager
    def _mistakes(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise StudyError(sentence(error)) from None

    def _prepare(self) -> None:
        """Run the commands whose files are missing, or were cut off."""
        for step in self.study.prepare:
            made = Path(step["makes"].replace("{out}", str(self.out)))
            started = made.with_name(f".{made.name}.started")  # a part may be there already
            words = shlex.split(step["run"].replace("{out}", str(self.out)))
            if self._is_stopping or (made.exists() and not started.exists()):
                continue
            print(f"preparing: {shlex.join(words)}", flush=True)
            started.parent.mkdir(parents=True, exist_ok=True)
            started.touch()
            words = [sys.executable if word == "python" else word for word in words]
            code = self._wait_for(words)
            if code and not self._is_stopping:
                what = f"this command failed: {step['run']}"
                again = f"give it again, and remove {started} if you end it yourself"
                raise StudyError(f"prepare: {what}; {again}")
            if not code and not made.exists():
                raise StudyError(f"prepare: {step['run']}: has not made {made}; correct makes")
            if not code:
                started.unlink()

    def _wait_for(self, words: list[str], **options: Any) -> int | None:
        """Run a process to its end; returns its exit code, None if the queue is stopping."""
        with self._lock:
            if self._is_stopping:
                return None
            process = subprocess.Popen(words, env=environment(), **options, **new_session())
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.remove(process)
        return code

    def _run_all(self, minutes: float | None) -> None:
        self._waiting = [run for run in self.runs if not run.is_finished]
        total, left = len(self.runs), len(self._waiting)
        budget = f", for at most {minutes:g} minutes" if minutes else ""
        print(f"{self.study.name}: {left} of {total} runs to do, {self.workers} at a time{budget}")
        end = time.monotonic() + minutes * 60 if minutes else None
        workers = [threading.Thread(target=self._work) for _ in range(self.workers)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            if end is not None and time.monotonic() > end and not self._is_stopping:
                print("the budget has ended: runs save and stop", flush=True)
                self._stop(signal.SIGTERM)
            time.sleep(0.2)

    def raise_failed(self) -> None:
        """Raise StudyError if runs have failed."""
        if self._failed:
            logs = ", ".join(str(run.log) for run in self._failed)
            raise StudyError(f"{len(self._failed)} of {len(self.runs)} runs failed; see {logs}")

    def _summary(self) -> int:
        unfinished = [run for run in self.runs if not run.is_finished]
        if unfinished:
            print(f"{len(unfinished)} runs are left; give the same command again")
            return STOPPED
        print("all runs are finished")
        return 0

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._is_stopping or not self._waiting:
                    return
                run = self._waiting.pop(0)
            self._train(run)

    def _train(self, run: Run) -> None:
        if holder := holder_after_wait(run.folder):
            self._fail(run, f"{run.folder} is still written by {holder}")
            return
        run.log.parent.mkdir(parents=True, exist_ok=True)
        if not run.has_checkpoint:  # cut off before its first: begun anew
            shutil.rmtree(run.folder, ignore_errors=True)
        arguments = run.arguments
        print(shlex.join(["python", "-m", "distill.run", *arguments]), flush=True)
        words = [sys.executable, "-m", "distill.run", *arguments]
        with run.log.open("ab") as log:
            code = self._wait_for(words, stdout=log, stderr=subprocess.STDOUT)
        if run.is_finished:
            shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
            print(f"finished: {run.folder}", flush=True)
        elif not self._is_stopping:
            ended = f"failed with exit code {code}" if code else "ended without an evaluation"
            self._fail(run, f"{ended}: see {run.log}")

    def _fail(self, run: Run, what: str) -> None:
        self._failed.append(run)
        print(what, flush=True)

    def _stop(self, number: int) -> None:
        """Have the running ones save and end; none is started any more."""
        with self._lock:  # none is just being started
            self._is_stopping = True
            for process in self._running:
                forward(number, process)

    @contextmanager
    def _stopping_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the runs, which save."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {n: signal.signal(n, lambda n, _: self._stop(signal.SIGTERM)) for n in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def environment() -> dict[str, str]:
    """Of a run: one thread, and it ends with this process."""
    return {**child_environment(), **dict.fromkeys(THREADS, "1")}


def compose_all(runs: list[Run], *, check: bool = False) -> None:
    """Compose every job, and `check` it as its run does first. Raises StudyError, naming the job,
    for a mistake.
    """
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        for run in {run.job.name: run for run in runs}.values():
            words = [for_hydra(as_typed(word), "config") for word in run.overrides]
            try:
                cfg = compose("config", overrides=words)
                if check:
                    validate.check_run(cfg)
            except Exception as error:
                raise StudyError(f"job {run.job.name}: {sentence(error)}") from None


def holder_after_wait(folder: Path) -> Holder | None:
    """The process that writes into a folder, after the time in which a run saves whose runner was
    killed; None if there is none.
    """
    end = time.monotonic() + EXIT_WAIT
    while (holder := holder_of(folder)) and time.monotonic() < end:
        time.sleep(0.5)
    return holder


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder was trained to its end and evaluated."""
    if not (folder / EVALUATION).is_file():
        return False
    return mapping_of(folder / "run.json").get("status") == "finished"
