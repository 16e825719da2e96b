"""Several processes of a command: which failed first, and what is said of it; sweeps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.config import errors
from distill.machine import faults
from distill.training import launch
from forks import Fork
from test_stopping import gone

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
RANK = "rank = int(os.environ['RANK'])\n"
HEAD = (
    "import json, os, sys, time\nfrom pathlib import Path\nfrom distill.terminal import progress\n"
    "notes = Path(sys.argv[1]) / 'processes'\n"
    + RANK
    + "progress.write_heartbeat(notes / f'{rank}.beat')\n"
    "def note(**end):\n"
    "    (notes / f'{rank}.end').write_text(json.dumps({'at': time.time(), **end}))\n"
)
KILLED = (
    HEAD + "if rank == 1:\n"
    "    with progress.Bar('training', 2000) as bar:\n"
    "        bar.update(1234)\n"
    "        os.kill(os.getpid(), 9)\n"
    "time.sleep(0.5)\n"
    "note(sentence='another process has ended', bug=False, lost=True)\n"
    "sys.exit(1)\n"
)
# The one that failed takes a second to end; the other one notices meanwhile, and is gone before it.
LATE = (
    HEAD + "if rank == 1:\n"
    "    note(sentence='data.path=x: is not there', bug=False, lost=False)\n"
    "    time.sleep(1)\n"
    "else:\n"
    "    time.sleep(0.3)\n"
    "    note(sentence='RuntimeError: lost it', bug=True, lost=True)\n"
    "sys.exit(1)\n"
)
BUG = (
    HEAD + "note(sentence='process 0: TypeError: ours', bug=True, lost=False)\nsys.exit(1 - rank)\n"
)
SILENT = HEAD + "sys.exit(7 * rank)\n"
ABORTED = (
    HEAD
    + "if rank == 0:\n    os.abort()\ntime.sleep(0.5)\nnote(sentence='process 1: ValueError: x',"
    " bug=True, lost=False)\nsys.exit(1)\n"
)


@pytest.fixture
def started(monkeypatch, capfd, tmp_path):
    """Launch processes that run a script -> exit code, and what is said."""
    popen = subprocess.Popen

    def call(script: str, folder: Path = tmp_path, command: str = "run") -> tuple[int, str]:
        own = [sys.executable, "-c", script, str(folder)]
        monkeypatch.setattr(launch.subprocess, "Popen", lambda _, **how: popen(own, **how))
        code = launch.launch(folder, 2, command)
        return code, capfd.readouterr().err

    return call


def test_a_killed_process_is_one_sentence_with_step_and_way_on(started, tmp_path):
    run, notes = tmp_path, tmp_path / "processes"
    code, said = started(KILLED)
    killed, more = "process 1 was killed by signal 9", f"(the output of each process is in {notes})"
    anew = f"remove {run}, which has no checkpoint yet, and give the command again"
    assert (code, said) == (137, f"distill: {killed} at step 1,234; {anew} {more}\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_001000.ckpt").touch()
    way = f"go on with: python -m distill.run resume={run}"
    assert started(KILLED)[1] == f"distill: {killed} at step 1,234; {way} {more}\n"
    assert f"{faults.RESTART} {more}" in started(KILLED, command="cache")[1]


@pytest.mark.parametrize(
    ("script", "code", "said", "stay"),
    [
        (LATE, 1, "data.path=x: is not there", False),
        (BUG, 1, "process 0: TypeError: ours; remove", True),
        (SILENT, 7, "process 1 ended with exit code 7; remove", True),
        (ABORTED, 1, "process 1: ValueError: x; remove", True),
    ],
)
def test_the_one_that_failed_first_is_named_in_the_only_line(
    script, code, said, stay, started, tmp_path
):
    got, line = started(script)
    assert (got, line.count("\n")) == (code, 1)
    assert line.startswith(f"distill: {said}")
    assert (tmp_path / "processes").exists() is stay


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"), True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a download's
    ],
)
def test_losing_another_process_is_no_traceback(error, lost, monkeypatch):
    """Under torchrun and SLURM every process speaks for itself."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert faults.is_peer_failure(error) is lost
    if lost:
        assert errors.is_mistake(error)
        assert errors.sentence(error).startswith("another process has ended (")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not faults.is_peer_failure(error)


# -- two real ones ---------------------------------------------------------------------------------


def begin(forks, pipelines, shards, folder: Path) -> Fork:
    """Two processes that train for long, each with a loader's worker; they have a checkpoint."""
    words = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics"]
    words += ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "data.num_workers=1"]
    words += ["trainer.max_steps=100000", "callbacks.checkpoint.every=2", "data.batch_size=2"]
    words += ["callbacks.samples.every=100000", f"run_dir={folder}"]
    started: Fork = forks.command(
        "run",
        words,
        environment={
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "LOCAL"))
        },
        err=folder.parent / "said.txt",
    )
    while not list((folder / "checkpoints").glob("step_*.ckpt")):
        assert started.poll() is None, started.said()
        time.sleep(0.1)
    return started


def below(pid: int) -> list:
    import psutil

    return psutil.Process(pid).children(recursive=True)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_in_one_sentence(forks, pipelines, shards, tmp_path):
    folder = tmp_path / "run"
    started = begin(forks, pipelines, shards, folder)
    all_of_them = below(started.pid)
    second = next(
        p for p in all_of_them if p.environ().get("RANK") == "1" and p.ppid() == started.pid
    )
    second.kill()
    assert started.wait(timeout=60) == 137
    said = started.said()
    pattern = (
        rf"distill: process 1 was killed by signal 9 at step \d+; go on with: python -m"
        rf" distill\.run "
        rf"resume={folder} \(the output of each process is in {folder}/processes\)\n"
    )
    assert re.fullmatch(pattern, said), said
    assert "Traceback" in (folder / "processes" / "0.log").read_text(encoding="utf-8")
    assert gone([p.pid for p in all_of_them], 10)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_their_launcher(number, forks, pipelines, shards, tmp_path):
    """And save before they do: the run goes on from its last step."""
    folder = tmp_path / "run"
    started = begin(forks, pipelines, shards, folder)
    workers = [process.pid for process in below(started.pid)]
    assert len(workers) >= 4  # two, and the worker of each one's loader
    started.send_signal(number)
    assert gone(workers, 30)
    code = started.wait(timeout=30)
    assert code == (-9 if number == signal.SIGKILL else 129)
    assert started.said() == ""
    log = (folder / "run.log").read_text(encoding="utf-8")
    stopped = re.search(r"stopped by SIG(TERM|HUP) at step (\d+); go on with: ", log)
    assert stopped, log
    assert (folder / "checkpoints" / f"step_{int(stopped[2]):06d}.ckpt").exists()


# -- sweeps ----------------------------------------------------------------------------------------


def sweep(pipelines, shards) -> list[str]:
    words = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics"]
    return ["-m", *words, "data.num_workers=0"]


@pytest.mark.slow
def test_a_job_that_fails_does_not_end_the_sweep(command, pipelines, shards, tmp_path):
    """One with an option that does not exist, one that diverges, and one that is well."""
    words = [*sweep(pipelines, shards), "optimizer.student.lr=1e-4", "loop.stop_after_bad=1"]
    code, _, said = command("run", *words, "method.loss=typo,hinge", "seed=0,1")
    assert code == 1
    lines = said.splitlines()
    assert [line for line in lines if "of 4 jobs failed" in line] == ["distill: 2 of 4 jobs failed"]
    listed = lines[lines.index("distill: 2 of 4 jobs failed") + 1 :]
    assert len(listed) == 2
    for seed, line in enumerate(listed):
        assert f"method.loss=typo seed={seed}: method.loss=typo" in line
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
def test_a_bug_in_a_job_keeps_its_traceback_and_the_others_run(
    command, pipelines, shards, monkeypatch, tmp_path
):
    from distill.training.callbacks import Alarms

    def broken(self, trainer, pl_module, *_):
        if pl_module.loop.seed == 0:
            raise TypeError("ours")

    monkeypatch.setattr(Alarms, "on_train_batch_start", broken, raising=False)
    code, _, said = command("run", *sweep(pipelines, shards), "seed=0,1")
    assert code == 1
    assert "Traceback" in said
    assert said.splitlines()[-2] == "distill: 1 of 2 jobs failed"
    assert said.splitlines()[-1].endswith("seed=0: TypeError: ours")
    assert list((tmp_path / "runs").glob("*/student"))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.slow)],
)
def test_a_signal_ends_all_of_a_sweep(
    number, code, command, pipelines, shards, monkeypatch, tmp_path
):
    from distill.training.callbacks import Alarms

    def tell(self, trainer, pl_module, *_):
        if pl_module.step == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Alarms, "on_train_batch_start", tell, raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    got, out, said = command("run", *sweep(pipelines, shards), "seed=0,1,2")
    assert got == code
    assert out.count("stopped by") == 1
    assert "failed" not in said
    assert len(list((tmp_path / "runs").iterdir())) == 1
