"""The tab key, in real shells: for `distill run` and for `python -m distill.run`; and what a line
is answered.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.commandline.completions import completions, for_bash, split

BREAKS = " \t\n\"'><=;|&(:"  # what bash's COMP_WORDBREAKS is
START = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(distill completion bash)"'),
    "zsh": (["-f", "-i"], 'autoload -U compinit; compinit -u; eval "$(distill completion zsh)"'),
    "fish": (["--no-config", "-i"], "distill completion fish | source"),
}
# What is typed before the tab key, and what the line is then.
TYPED = [
    ("distill syn", "distill synthesize "),
    ("distill run loop.sched", "distill run loop.schedule="),
    ("distill run loop.schedule=cos", "distill run loop.schedule=cosine "),
    ("distill run method=lad", "distill run method=ladd "),
    ("distill sample run=runs/fir", "distill sample run=runs/first/"),
    ("distill recipes copy nitrosd_v", "distill recipes copy nitrosd_vibrant "),
    ("python -m distill.syn", "python -m distill.synthesize "),
    ("python -m distill.run meth", "python -m distill.run method"),
    ("python -m distill.run method=reg", "python -m distill.run method=regression "),
    (
        "python -m distill.run method=add method.r1_w",
        "python -m distill.run method=add method.r1_weight=",
    ),
    ("python scr", "python script.py "),
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a run and a script, in which `distill` and `python` are this interpreter."""
    (tmp_path / "bin").mkdir()
    for name, words in {"distill": " -m distill", "python": ""}.items():
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n', encoding="utf-8")
        file.chmod(0o755)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").touch()
    (tmp_path / "script.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class Shell:
    """A shell at the other end of a terminal."""

    def __init__(self, name: str):
        words, self.start = START[name]
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.execvp(name, [name, *words])

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """All that comes until the pattern is there, without what moves the cursor."""
        seen, end = b"", time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.terminal], [], [], 0.2)[0]:
                seen += os.read(self.terminal, 4096)
            said = re.sub(
                r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][B0]?|[\r\x07]",
                "",
                seen.decode("utf-8", "replace"),
            )
            if re.search(pattern, said):
                return said
        raise AssertionError(f"{pattern!r} did not come: {said!r}")

    def close(self) -> None:
        os.close(self.terminal)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


@pytest.mark.parametrize("name", START)
def test_a_shell_completes_both_forms_of_the_command(name, place):
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    shell = Shell(name)
    try:
        shell.type(f"{shell.start}; echo rea''dy\n")
        shell.until("ready")
        for typed, line in TYPED:
            shell.type(f"{typed}\t")
            shell.until(re.escape(line))
            shell.type("\x15")  # Ctrl-U: an empty line again
    finally:
        shell.close()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("distill ru", ["run "]),
        ("distill run method=la", ["ladd "]),
        ("distill run -m method=add,la", ["add,ladd "]),
        ("distill run 'method=la", ["method=ladd' "]),
        ("distill run ~met", ["~method.", "~method=", "~metrics.", "~metrics="]),
        ("distill run +trainer.prec", ["+trainer.precision="]),
        ("distill run nonsense=3 method=lad", ["ladd "]),
        ("distill run nonsense=3 trainer.max_s", ["trainer.max_steps="]),
        ("distill sample run=", ["runs/first ", "bin/", "runs/", "script.py "]),
        ("distill run student.init=te", ["teacher "]),
        ("distill run student.checkpointing=", ["true ", "false "]),
        ("distill run --config-dir ", ["bin/", "runs/"]),
        ("distill run --cfg j", ["job "]),
        ("distill recipes copy add_sha", ["add_shapes "]),
        ("distill completion f", ["fish "]),
        ("distill nonsense ", []),
        ("python -m distill recip", ["recipes "]),
        ("python -m pytest tes", None),
        ("python scr", None),
    ],
)
def test_what_a_line_is_answered(line, found, place):
    answer = for_bash(line, BREAKS)
    if line.endswith("student.init=te"):
        answer = answer[:1]
    assert answer == found


def test_a_value_with_spaces_is_escaped_and_read_again(place):
    (place / "my photos").mkdir()
    assert for_bash("distill check data.path=my", BREAKS) == ["my\\ photos/"]
    assert split("distill check data.path=my\\ photos/")[0][-1] == "data.path=my photos/"
    assert for_bash("distill check 'data.path=my", BREAKS) == ["data.path=my photos/"]


def test_options_of_ones_own_folder_are_completed(place):
    (place / "conf" / "experiment").mkdir(parents=True)
    (place / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nseed: 3\n", encoding="utf-8"
    )
    line = ["distill", "run", "--config-dir", "conf", "experiment=mi"]
    assert completions(line) == ["experiment=mine"]


def test_the_tab_key_waits_for_nothing_heavy(place):
    code = (
        "import sys; from distill.commandline.completions import completions; "
        "assert completions(['distill', 'run', 'loop.schedule=c']); "
        "assert completions(['distill', 'run', 'tra']); "
        "assert not {'torch', 'lightning', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "words",
    [
        ["distill", "completion", "bash"],
        ["distill", "-sc", "install=bash"],
        ["python", "-m", "distill.completion", "bash"],
        ["python", "-m", "distill.run", "-sc", "install=bash"],
    ],
)
def test_every_way_to_ask_for_the_script(words, place):
    printed = subprocess.run(
        words, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout
    own = Path(__file__).parents[1] / "src/distill/commandline/completion.bash"
    assert printed.rstrip() == own.read_text(encoding="utf-8").rstrip()
