"""Commands that a signal asks to stop, at any stage; processes that end with their launcher."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import kills
from distill.machine import signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
NAME = {number: signal.Signals(number).name for number in (1, 2, 10, 15)}
GOES_ON = "; give the same command again, which goes on where it stopped"
PATIENCE = 180.0  # seconds after which a command has not heeded its signal
ANEW = "; give the same command again, which begins anew: no shard is whole yet"
PRETRAIN = ["out=work/pretrained", "stages=[data,vae]", "data.count=256", "vae.steps=3"]
JUDGE = ["run=work/run", "metrics.prompts=4", "metrics.teacher_steps=[1]", "steps=1"]
CHECK = ["data.path=given/pictures", "data.size=64", "data.num_workers=1"]
DEMO = ["run=given/run", "port=0", "open=false"]
# Command -> its words, and what it says at the moment of the signal.
STAGES = {
    "run": [
        (kills.TRAIN, "opening the data", ""),
        (kills.TRAIN, "building the discriminator", ""),
        (kills.TRAIN, "saving the student", "; go on with: python -m distill.run resume=work/run"),
        (
            kills.TRAIN,
            "evaluating the student",
            "; go on with: python -m distill.run resume=work/run",
        ),
        (kills.TRAIN, "writing the report", "; go on with: python -m distill.run resume=work/run"),
    ],
    "synthesize": [(kills.COMMANDS["synthesize"].words, "making samples", ANEW)],
    "cache": [(kills.COMMANDS["cache"].words, "making samples", ANEW)],
    "pretrain": [(PRETRAIN, "pretraining", GOES_ON)],
    "evaluate": [(JUDGE, "loading", GOES_ON)],
    "sample": [(kills.COMMANDS["sample"].words, "generating", "")],
    "export": [(kills.COMMANDS["export to=diffusers"].words, "exporting", "")],
    "inspect": [(kills.COMMANDS["inspect"].words, "inspecting the discriminator", "")],
    "compare": [(kills.COMMANDS["compare"].words, "", "")],
    "doctor": [(["teacher.path=given/teacher"], "ok", "")],
    "check": [(CHECK, stage, "") for stage in ("opening the data", "reading", "measuring")],
    "demo": [(DEMO, "loading given/run", ""), (DEMO, "loading teacher", "")],
}
CASES = [
    pytest.param(
        module,
        *stage,
        number,
        id=f"{module}-{stage[1] or 'at once'}-{NAME[number]}",
        marks=pytest.mark.slow if number == numbers[0] else pytest.mark.nightly,
    )  # fmt: skip
    for (module, stages), numbers in zip(
        STAGES.items(),
        [(15, 2), (1,), (2,), (10,), (15,), (1,), (15,), (2,), (15,), (2,), (2, 15), (2, 15)],
        strict=True,
    )
    for stage in stages
    for number in numbers
]


class Teller(io.TextIOWrapper):
    """A stream that sends a signal to its own process when a text is first written to it."""

    done = False

    def __init__(self, descriptor: int, text: str, number: int) -> None:
        raw = open(descriptor, "wb")  # noqa: SIM115
        super().__init__(raw, encoding="utf-8", line_buffering=True)
        self.text, self.number = text, number

    def write(self, said: str) -> int:
        written = super().write(said)
        if self.text and self.text in said and not Teller.done:
            Teller.done = True
            os.kill(os.getpid(), self.number)
        return written


def told(
    folder: Path, module: str, words: list[str], text: str, number: int, *, after: float = 0.01
) -> tuple[int, str]:
    """Run a command in a fork, which is told to stop when it says `text` -> exit code, stderr.

    Without a text it is told so many seconds `after` it began; number 0 tells nothing.
    """
    said = folder / "stderr.txt"
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            for descriptor, file in ((1, folder / "stdout.txt"), (2, said)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
            sys.stdout, sys.stderr = Teller(1, text, number), Teller(2, text, number)
            sys.argv = [f"distill.{module}", *words]
            kills.renew_threads()
            if not text:
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
                signal.setitimer(signal.ITIMER_REAL, after)
            importlib.import_module(f"distill.{module}").main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = kills._wait(child, time.monotonic() + PATIENCE)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail(f"{module} has not stopped: {said.read_text(encoding='utf-8')}")
    return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    kills.prepare()
    return kills.World(tmp_path_factory.mktemp("world") / "world")


@pytest.mark.parametrize(("module", "words", "text", "way", "number"), CASES)
def test_a_command_that_is_told_to_stop_says_so_in_one_line(
    module, words, text, way, number, world, monkeypatch
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    name = {"export": "export to=diffusers"}.get(module, module)
    if name in kills.COMMANDS:
        world.begin(name)
    words = [*words, *(["run_dir=work/run"] if module == "run" else [])]
    code, said = told(world.folder, module, words, text, number)
    assert said.splitlines()[-1] == f"distill: stopped by {NAME[number]}{way}"
    assert "Traceback" not in said
    assert code == 128 + number
    run = world.work / "run"
    if module == "run" and not way:  # nothing was trained
        assert not run.exists()
    elif module == "run":
        assert world.call("run", ["resume=work/run"]).code == 0
        assert (run / "evaluation.json").is_file()
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        assert facts["status"] == "finished"
    elif way:
        assert world.call(module, words).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 15, 1])
def test_a_page_that_is_served_ends_in_order(number, world):
    """A signal is the way to end it, from the moment on at which its address is said."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
    code, said = told(world.folder, "demo", DEMO, "the page is at", number)
    assert "Traceback" not in said
    assert "distill: " not in said
    assert code == 0
    printed = (world.folder / "stdout.txt").read_text(encoding="utf-8").splitlines()
    assert printed[-1] == "0 requests, 0 of them dropped for newer ones"


@pytest.mark.slow
def test_slurms_signal_in_the_judging_has_the_job_run_again(world, monkeypatch):
    """By an scontrol of ours, which notes what it is asked; the job judges when it runs again."""
    world.begin("run")
    bin = world.folder / "bin"
    bin.mkdir()
    (bin / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {bin}/asked\n', encoding="utf-8")
    (bin / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "distil")
    words = [*kills.TRAIN, "run_dir=work/run"]
    code, said = told(world.folder, "run", words, "evaluating the student", signal.SIGUSR1)
    way = "go on with: python -m distill.run resume=work/run"
    assert (code, said) == (0, f"distill: stopped by SIGUSR1; {way}\n")
    assert (bin / "asked").read_text(encoding="utf-8") == "requeue 17\n"
    assert not (world.work / "run" / "evaluation.json").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert world.call("run", words).code == 0
    assert (world.work / "run" / "evaluation.json").is_file()


def test_a_second_ctrl_c_ends_at_once():
    started, _ = waiting(
        f"try:\n    {READY}\n    time.sleep(600)\n"
        "finally:\n    print('ending', flush=True)\n    time.sleep(600)"
    )
    started.send_signal(signal.SIGINT)
    assert started.stdout.readline() == "ending\n"
    started.send_signal(signal.SIGTERM)  # of another kind: it is ending already
    time.sleep(0.2)
    assert started.poll() is None
    started.send_signal(signal.SIGINT)
    assert started.wait(timeout=5) == 130


def test_what_nohup_ignores_stays_ignored():
    started, _ = waiting(
        f"{READY}\ntime.sleep(600)", before="signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    )
    started.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=5) == 3
    assert started.stdout.read() == "SIGTERM\n"


READY = "print('ready', flush=True)"


def waiting(work: str, before: str = "") -> tuple[subprocess.Popen, str]:
    """A process that listens as a command does, and whose work has said READY."""
    code = f"import signal, sys, time\nfrom distill.machine import signals\n{before}\ntry:\n"
    code += "    with signals.stop_on_signal():\n" + textwrap.indent(work, " " * 8)
    code += "\nexcept signals.Stopped as stop:\n    print(stop.number.name)\n    sys.exit(3)\n"
    pipe = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    started = subprocess.Popen([sys.executable, "-c", code], **pipe)
    assert started.stdout.readline() == "ready\n"
    return started, code


def test_a_ctrl_c_while_a_command_is_imported_leaves_no_traceback():
    code = (
        "import signal, sys\nsys.orig_argv = ['python', '-m', '{}']\nimport distill\n"
        "signal.raise_signal(signal.SIGINT)"
    )
    ends = {}
    for module in ("distill.run", "distill", "pytest"):
        command = [sys.executable, "-c", code.format(module)]
        ends[module] = subprocess.run(command, capture_output=True, timeout=60)
    for module in ("distill.run", "distill"):
        assert (ends[module].returncode, ends[module].stderr) == (-signal.SIGINT, b"")
    assert b"KeyboardInterrupt" in ends["pytest"].stderr  # other programs keep their handlers


# -- what ends with what ---------------------------------------------------------------------------

PARENT = """
import os, subprocess, sys, time
from distill.machine import signals
child = '''
import sys, time
from distill.machine import signals
{lacks}
with signals.stop_on_signal():
    signals.end_with_parent()
    print("ready", flush=True)
    time.sleep(600)
'''
started = subprocess.Popen([sys.executable, "-c", child], env={env}, **signals.new_session())
print(started.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "env", ["signals.child_environment()", "{**os.environ, signals.TORCHRUN: '7'}"]
)
@pytest.mark.parametrize("lacks", ["", "signals._die_with_parent = lambda number: None"])
def test_a_process_ends_with_the_one_that_has_started_it(env, lacks):
    """By the kernel, and where it has no such thing by a look every second; torchrun's too."""
    pipe = {"stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(lacks=lacks, env=env)], **pipe)
    said = {parent.stdout.readline().strip() for _ in range(2)}
    (child,) = said - {"ready"}
    assert runs(int(child))
    parent.kill()
    parent.wait()
    assert gone([int(child)], 10)


def test_a_process_whose_parent_died_before_it_asked_ends_too(monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    code = "from distill.machine import signals\nsignals.end_with_parent()\n"
    code += "import time; time.sleep(600)"
    environment = {**os.environ, signals.PARENT: str(ended.pid)}
    orphan = subprocess.Popen([sys.executable, "-c", code], env=environment)
    assert orphan.wait(timeout=60) == -signal.SIGTERM


def test_workers_of_a_loader_end_with_their_process(shards):
    from distill.data import source

    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        loader = source.latents(str(shards), batch_size=2, num_workers=2).loader(seed=0)
        batches = iter(loader)
        next(batches), next(batches)  # one of each worker: both have begun
        import multiprocessing

        pids = [process.pid for process in multiprocessing.active_children()]
        os.write(writer, json.dumps(pids).encode() + b"\n")
        time.sleep(600)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        workers = json.loads(pipe.readline())
    assert len(workers) == 2
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # a terminal's go to all
        for worker in workers:
            os.kill(worker, number)
    time.sleep(0.3)
    assert all(map(runs, workers))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert gone(workers, 3)


def runs(pid: int) -> bool:
    """Whether this process is there, and no zombie that nobody has waited for."""
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(runs, pids))
