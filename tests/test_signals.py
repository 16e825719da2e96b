"""A signal that comes where an exception is not safe: in imports, while Hydra composes, in
destructors.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import kills
from test_stopping import told

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
SEND = "os.kill(os.getpid(), signal.SIGTERM)"


def ended(tmp_path, work: str, **files: str) -> subprocess.CompletedProcess:
    """A program that does this work while it listens, and says how it was stopped.

    `files` are modules beside it.
    """
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
    code = "import os, signal, sys, time\nfrom distill.machine import signals\n"
    code += "sys.path.insert(0, '.')\n"
    code += "try:\n    with signals.stop_on_signal():\n" + textwrap.indent(
        textwrap.dedent(work), " " * 8
    )
    code += (
        "\nexcept signals.Stopped as stop:\n    print(stop)\n    sys.exit(3)\nprint('all done')\n"
    )
    command, pipes = [sys.executable, "-c", code], {"capture_output": True, "text": True}
    return subprocess.run(command, cwd=tmp_path, timeout=60, encoding="utf-8", **pipes)


def stopped(done: subprocess.CompletedProcess, *said: str) -> None:
    assert done.stderr == ""
    assert done.stdout.splitlines() == [*said, "stopped by SIGTERM"]
    assert done.returncode == 3


def test_an_import_is_finished_first(tmp_path):
    slow = f"import os, signal, time\n{SEND}\ntime.sleep(0.2)\nprint('imported', flush=True)"
    stopped(ended(tmp_path, "import slow\ntime.sleep(60)", slow=slow), "imported")


def test_omegaconf_is_left_whole(tmp_path):
    """The signal comes from a function among OmegaConf's own, right before a flag is set."""
    work = f"""
    from omegaconf import OmegaConf, base
    cfg = OmegaConf.create({{"a": 1}})
    base.before, base.os, base.signal = base.Node._set_flag, os, signal
    exec("def slow(*args):\\n    {SEND}\\n    before(*args)", vars(base))
    base.Node._set_flag = base.slow
    OmegaConf.set_readonly(cfg, True)
    base.Node._set_flag = base.before
    print(OmegaConf.is_readonly(cfg), flush=True)
    time.sleep(60)
    """
    stopped(ended(tmp_path, work), "True")


@pytest.mark.parametrize(
    "drops",
    [
        f"try:\n    {SEND}\n    time.sleep(1)\nexcept BaseException:\n    pass",
        f"class Gone:\n    def __del__(self):\n        {SEND}\n        time.sleep(0.01)\nGone()",
        f"os.register_at_fork(before=lambda: {SEND})\nchild = os.fork() or os._exit(0)",
    ],
)
def test_one_that_was_dropped_comes_again(tmp_path, drops):
    stopped(ended(tmp_path, f"{drops}\nprint('goes on', flush=True)\ntime.sleep(60)"), "goes on")


def test_work_that_ends_before_it_comes_again_is_stopped_all_the_same(tmp_path):
    stopped(ended(tmp_path, f"try:\n    {SEND}\nexcept BaseException:\n    pass"))


def test_what_is_raised_in_its_place_is_not_said(tmp_path):
    work = f"try:\n    {SEND}\nexcept BaseException:\n    raise TypeError('half done')"
    stopped(ended(tmp_path, work))


def test_clean_up_is_not_stopped_by_a_reminder(tmp_path):
    work = f"try:\n    {SEND}\nfinally:\n    time.sleep(0.3)\n    print('cleaned', flush=True)"
    stopped(ended(tmp_path, work), "cleaned")


def test_a_reminder_is_no_second_ctrl_c(tmp_path):
    work = """
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
    heard = lambda number, frame: signals.mark_handled(number) or print("heeded", flush=True)
    before = signals.set_handlers(heard)
    time.sleep(0.3)
    print(signals.received().name, flush=True)
    """
    done = ended(tmp_path, work)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["heeded", "SIGINT", "all done"]


@pytest.mark.slow
def test_a_signal_at_any_moment_of_starting_up_is_heard(tmp_path):
    """40 forks or more of one process that has imported everything: what is left is composing and
    checking.
    """
    kills.prepare()
    chance, ends = random.Random(18), []
    words = ["data.path=nope", "run_dir=run"]
    began = time.monotonic()
    assert told(tmp_path, "run", words, "", 0)[0] == 1
    whole = time.monotonic() - began
    stopped = "distill: stopped by SIGTERM\n"
    refused = "distill: data.path=nope: no such file or folder; check the path\n"
    # More, where the machine was slow when it was timed, so that many ended before their signal.
    while len(ends) < 40 or sum(said == stopped for _, _, said in ends) <= 25:
        assert len(ends) < 200
        after = chance.uniform(0.005, 0.9 * whole)
        ends.append((after, *told(tmp_path, "run", words, "", signal.SIGTERM, after=after)))
    stops = [end for end in ends if end[1] != 1]  # 1: it had ended before
    assert {end[1] for end in stops} == {143}
    assert {end[2] for end in stops} <= {stopped, refused + stopped}  # refused, then interrupted
    assert all("Traceback" not in said for _, _, said in ends)
