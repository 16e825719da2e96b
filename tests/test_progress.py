"""What long work says: lines without a terminal, bars on one, and all of it in the log of the
run.
"""

from __future__ import annotations

import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from distill.terminal import console, progress
from distill.terminal.console import log_to, record_output, say
from distill.terminal.progress import Bar, stage, track

LOG = "run.log"


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is told: `clock.now += 5`."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


# -- what a line says ------------------------------------------------------------------------------


def test_a_line_has_step_speed_time_left_and_what_the_work_says(clock, capsys):
    with Bar("training", 1200, rate="images") as bar:
        clock.now += 60  # the first step is slow, and no measure
        bar.update(20, images=320)
        clock.now += 50
        bar.update(120, images=1920, said="g/adv 0.71 d/adv 0.52")
        assert bar.tail() == "step 120 of 1200, 32.0 images/s, 0:09:00 left, g/adv 0.71 d/adv 0.52"
        assert bar.share == 0.1
        bar.update(1200, images=19200)
    first, *_, last = lines(capsys)
    assert first == "training: 1200 steps"
    assert last == "training: done in 0:01:50, 175 images/s, g/adv 0.71 d/adv 0.52"


def test_the_time_left_is_not_that_of_a_head_start(clock, capsys):
    with Bar("training", 10, rate="images") as bar:
        for k in range(1, 101):
            clock.now += 1
            bar.update(0, images=16 * k, place=f"head start, iteration {k} of 100")
        assert bar.tail() == "head start, iteration 100 of 100, 16.0 images/s"
        clock.now += 4
        bar.update(1, images=1616)
        clock.now += 4
        bar.update(2, images=1632)
        assert bar.tail() == "step 2 of 10, 4.0 images/s, 0:00:32 left"


def test_lines_come_soon_then_every_half_a_minute(clock, capsys):
    with Bar("training", 1200) as bar:
        for second in range(1, 121):
            clock.now += 1
            bar.update(second)
            bar.tick(clock.now)
    said = [line for line in lines(capsys) if ": step" in line]
    steps = [int(re.search(r"step (\d+) of", line)[1]) for line in said]
    assert steps[0] == 5
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) <= 30
    assert steps[-1] > 90


def test_a_step_that_lasts_is_said_to_last(clock, capsys):
    with Bar("training", 1200) as bar:
        clock.now += 10
        bar.tick(clock.now)
        bar.update(3, said="g/adv 0.71")
        clock.now += 40
        bar.tick(clock.now)
        clock.now += 40
        bar.tick(clock.now)
    assert lines(capsys)[1:4] == [
        "training: step 0 of 1200, 0:00:10 so far",
        "training: step 3 of 1200, g/adv 0.71",
        "training: still at step 3 of 1200, for 0:01:20, g/adv 0.71",
    ]


def test_a_thread_speaks_when_the_work_does_not(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST", 0.1)
    monkeypatch.setattr(progress, "EVERY", 0.1)
    monkeypatch.setattr(progress, "TICK", 0.02)
    with stage("loading the teacher"):
        time.sleep(0.5)
    said = lines(capsys)
    assert said[0] == "loading the teacher"
    assert len(said) > 2
    assert set(said[1:]) == {"loading the teacher: 0:00:00 so far"}
    time.sleep(0.2)
    assert lines(capsys) == []  # it is over


def test_what_goes_on_says_from_where_and_what_stops_says_how_far(clock, capsys):
    def work():
        with Bar("training", 9, done=4) as bar:
            bar.update(6)
            clock.now += 7
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert lines(capsys) == [
        "training: from step 4 of 9",
        "training: stopped at step 6 of 9 after 0:00:07",
    ]


def test_the_innermost_speaks_and_leaves_with_what_is_around_it(clock, capsys):
    inner = Bar("drawing", 4, unit="image")

    def work():
        with Bar("judging", 2, unit="row"):
            inner.__enter__()  # and an exception passes
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert progress._reporter._bars == []
    said = lines(capsys)
    inner.__exit__(None, None, None)
    assert lines(capsys) == []
    assert said == [
        "judging: 2 rows",
        "drawing: 4 images",
        "judging: stopped at row 0 of 2 after 0:00:00",
    ]


def test_track_counts_what_is_done_with(capsys):
    assert list(track([1, 2, 3], "reading", unit="sample")) == [1, 2, 3]
    assert lines(capsys) == ["reading: 3 samples", "reading: done in 0:00:00"]


def test_only_the_first_process_speaks(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "1")

    def work():
        with record_output():
            log_to(tmp_path / LOG)
            print("printed")
            say("said")
            with Bar("training", 3) as bar:
                bar.advance()
            assert not (tmp_path / LOG).exists()
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        work()
    assert capsys.readouterr().out == ""
    log = (tmp_path / LOG).read_text(encoding="utf-8")
    assert log.startswith("process 1: Traceback")
    assert "RuntimeError: broken" in log


# -- the log ---------------------------------------------------------------------------------------


def test_the_log_has_what_was_printed_before_there_was_a_folder_and_all_that_follows(
    tmp_path, capsys
):
    handler = logging.StreamHandler(sys.stderr)  # as libraries have one before we begin
    logger = logging.getLogger("distill.test")
    logger.addHandler(handler)
    try:
        with record_output():
            with stage("loading the teacher"):
                pass
            log_to(tmp_path / LOG, "python -m distill.run")
            print("run folder: somewhere")
            logger.warning("an alarm")
            print("\r 10 %", end="", file=sys.stderr)  # a library's own bar
            print("\r100 %", file=sys.stderr)
            print("no end", end="")
    finally:
        logger.removeHandler(handler)
    assert handler.stream is sys.stderr
    heading, *rest = (tmp_path / LOG).read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"== \d{4}-\d\d-\d\d .* python -m distill.run", heading)
    assert rest[:3] == ["loading the teacher", "run folder: somewhere", "an alarm"]
    assert rest[-2:] == ["100 %", "no end"]
    out, err = capsys.readouterr()
    assert out == "loading the teacher\nrun folder: somewhere\nno end"
    assert "an alarm" in err


def test_the_log_is_gone_on_with_and_has_the_exception_that_ends_a_run(tmp_path):
    def work():
        with record_output():
            log_to(tmp_path / LOG, "python -m distill.run")
            raise RuntimeError("broken")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            work()
    log = (tmp_path / LOG).read_text(encoding="utf-8")
    assert log.count("== 2") == 2
    assert log.count('raise RuntimeError("broken")') == 2


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    with record_output():
        log_to(tmp_path / "nowhere" / LOG)
        print("said")
    assert capsys.readouterr().out == "said\n"
    assert not (tmp_path / "nowhere").exists()


def test_handlers_of_libraries_do_not_close_the_terminal(capsys):
    """Some close their stream when logging ends, as absl's; what is said afterwards is not lost."""
    with record_output():
        kept = (sys.stdout, sys.stderr)
        for stream in kept:
            stream.close()
        say("still here")
        print("and an error", file=sys.stderr)
    kept[0].close()  # after the command
    print("and later")
    said = capsys.readouterr()
    assert said.out.splitlines() == ["still here", "and later"]
    assert said.err == "and an error\n"


@pytest.mark.parametrize("kept", [True, False])
def test_a_pipe_that_nobody_reads_ends_no_work(kept, tmp_path):
    """Nor does it a run, which has a log, when more than progress is printed:
    `distill.run | head`.
    """
    keeps, prints = ("log_to(Path('log'))", "print(7)") if kept else ("pass", "pass")
    script = (
        "from pathlib import Path\n"
        "from distill.terminal.console import log_to, record_output\n"
        "from distill.terminal.progress import track\n"
        "with record_output():\n"
        f"    {keeps}\n"
        "    assert sum(track([1, 2], 'adding')) == 3\n"
        f"    {prints}\n"
        "open('end', 'w').close()\n"
    )
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run([sys.executable, "-c", script], stdout=write, cwd=tmp_path, check=False)
    os.close(write)
    assert (tmp_path / "end").exists()
    if kept:
        assert ended.returncode == 0
        assert (tmp_path / "log").read_text(
            encoding="utf-8"
        ) == "adding: 2 steps\nadding: done in 0:00:00\n7\n"


# -- on a terminal ---------------------------------------------------------------------------------

SCRIPT = """
import logging, sys, time, warnings
from pathlib import Path
from distill.terminal import progress
from distill.terminal.console import log_to, record_output
from distill.terminal.progress import Bar, stage
progress.FIRST = 0.2
handler = logging.StreamHandler(sys.stdout)
logging.getLogger("distill.health").addHandler(handler)
with record_output():
    log_to(Path("run.log"))
    with stage("loading the teacher"):
        time.sleep(0.6)
    with Bar("search", 2, unit="trial") as outer, Bar("training", 40, rate="images") as bar:
        for k in range(40):
            time.sleep(0.05)
            bar.update(k + 1, images=16 * (k + 1), said="g/adv 0.71")
            if k == 20:
                print("a line that is printed meanwhile")
                print("and one on stderr", file=sys.stderr)
                logging.getLogger("distill.health").warning("step 21: an alarm")
                warnings.warn("a warning")
        outer.update(2)
"""


def on_a_terminal(script, folder, **environment) -> str:
    """What a script writes to a terminal of 100 columns."""
    first, second = pty.openpty()
    words = {"COLUMNS": "100", "LINES": "30", "TERM": "xterm", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=second, stdout=second, stderr=second, cwd=folder,
        env={**os.environ, **words}, close_fds=True,
    )  # fmt: skip
    os.close(second)
    found = b""
    while True:
        if not select.select([first], [], [], 60)[0]:
            break
        try:
            part = os.read(first, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    assert process.wait(timeout=60) == 0, found.decode()
    os.close(first)
    return found.decode()


def test_a_terminal_has_bars_and_what_is_printed_stands_above_them(tmp_path):
    shown = on_a_terminal(SCRIPT, tmp_path)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "━" in plain
    assert re.search(r"loading the teacher\s+━+ \S+ so far", plain)
    assert re.search(r"training\s+━.*step \d+ of 40, \d+ images/s, \S+ left, g/adv 0.71", plain)
    assert re.search(r"search\s+━.*trial 0 of 2", plain)
    whole = {line.strip() for line in re.split(r"[\r\n]+", plain)}
    printed = ["a line that is printed meanwhile", "and one on stderr", "step 21: an alarm"]
    assert whole.issuperset(printed)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor is there again
    log = (tmp_path / LOG).read_text(encoding="utf-8")
    assert "\x1b" not in log
    assert "\r" not in log
    said = log.splitlines()
    assert [line for line in said if line in printed] == printed
    assert any(line.endswith("UserWarning: a warning") for line in said)
    assert {"loading the teacher", "search: 2 trials", "training: 40 steps"} <= set(said)
    assert any(re.match(r"training: step \d+ of 40, ", line) for line in said)
    assert re.match(r"training: done in 0:00:0\d, \d+ images/s", said[-2])


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path):
    shown = on_a_terminal(SCRIPT, tmp_path, TERM="dumb")
    assert "\x1b" not in shown
    assert "training: 40 steps" in shown


def test_a_library_s_own_bar_gets_the_place(tmp_path):
    script = SCRIPT.split("with recorded")[0] + (
        "with record_output(), stage('loading'):\n"
        "    time.sleep(0.3)\n"
        "    for k in range(3):\n"
        "        print(f'\\rfetched {k} of 2', end='', file=sys.stderr, flush=True)\n"
        "        time.sleep(0.3)\n"
        "    print(file=sys.stderr)\n"
    )
    shown = on_a_terminal(script, tmp_path)
    tail = shown[shown.index("fetched 0") :]
    assert "loading" not in tail
    assert "\rfetched 1 of 2\rfetched 2 of 2\r\n" in tail


def test_what_goes_to_a_file_is_not_drawn_on_the_terminal(tmp_path):
    """`sample > paths.txt`: the paths are for the file, the bar is on stderr."""
    script = (
        "import sys, time\n"
        "from distill.terminal.console import print_to_stderr, record_output\n"
        "from distill.terminal.progress import track\n"
        "sys.stdout = open('paths.txt', 'w')\n"
        "with record_output(), print_to_stderr():\n"
        "    for k in track(range(4), 'drawing', unit='image'):\n"
        "        print(f'{k}.png')\n"
        "        time.sleep(0.1)\n"
    )
    shown = on_a_terminal(script, tmp_path)
    assert (tmp_path / "paths.txt").read_text(encoding="utf-8") == "0.png\n1.png\n2.png\n3.png\n"
    assert ".png" not in shown
    assert "drawing" in shown
    assert console.stream() is sys.stdout
