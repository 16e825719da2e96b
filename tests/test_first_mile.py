"""The run that a new user starts, as it is but for the number of its steps, where nobody sees a
bar.
"""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from omegaconf import OmegaConf

STEPS, HEAD_START = 12, 3
COMMAND = f"trainer.max_steps={STEPS} loop.head_start={HEAD_START}"
SILENCE = 30  # seconds that may pass without a line
BUSY = 15  # seconds more on a machine that does other things too


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, the lines of stdout and stderr with the seconds at which they came, and when a
    row was on disk.
    """
    place = tmp_path_factory.mktemp("first")
    began, said, process = time.monotonic(), [], None
    process = subprocess.Popen(
        [sys.executable, "-m", "distill.run", *COMMAND.split()],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED",)},
        encoding="utf-8")  # fmt: skip
    rows = []

    def watch():
        while process.poll() is None and not rows:
            rows.extend(time.monotonic() - began for _ in place.glob("runs/*/metrics.csv"))
            time.sleep(0.2)

    watching = threading.Thread(target=watch)
    watching.start()
    for line in process.stdout:
        said.append((time.monotonic() - began, line.rstrip("\n")))
    watching.join()
    assert process.wait(timeout=60) == 0, said
    (folder,) = (place / "runs").iterdir()
    return folder, said, rows[0]


def when(said, begins) -> float:
    """The second at which the first line came that begins so."""
    return next(seconds for seconds, line in said if line.startswith(begins))


@pytest.mark.slow
def test_it_is_the_default_run(run):
    """No callback, logger or metric is left out."""
    config = OmegaConf.load(run[0] / "config.yaml")
    assert set(config.callbacks) == {
        "progress",
        "health",
        "alarms",
        "samples",
        "scores",
        "checkpoint",
    }
    assert set(config.logger) == {"csv", "tensorboard"}
    assert config.metrics.prompts == 400
    assert (config.data.batch_size, config.method._target_) == (16, "distill.methods.ladd.LADD")


@pytest.mark.slow
def test_it_is_never_silent(run):
    _, said, row = run
    times = [0.0, *(seconds for seconds, _ in said)]
    silences = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert max(silences) <= SILENCE + BUSY, said
    assert times[1] < 10 + BUSY  # something comes at once
    assert row - when(said, "training: ") < 60 + BUSY  # and a row of the log in the first minute


@pytest.mark.slow
def test_what_it_says(run):
    folder, said, _ = run
    text = [line for _, line in said]
    begins = [
        "importing torch",
        "loading ",
        "run folder: ",
        f"training: {STEPS} steps",
        "training: done in ",
        "saving the student",
        "student: ",
        *(f"evaluating the teacher in {n} step" for n in (1, 4, 28)),
        *(f"evaluating the student in {n} step" for n in (1, 2, 4)),
        "writing the report",
        "report: ",
    ]
    order = [next(i for i, line in enumerate(text) if line.startswith(start)) for start in begins]
    assert order == sorted(order), text
    patterns = [
        r"training: done in \S+, \S+ images/s, g/adv [\d.-]+ d/adv [\d.-]+ ",
        r"evaluating the teacher in 28 steps: done in \S+, \S+ images/s$",
    ]
    first, *_, last = (seconds for seconds, line in said if "teacher in 28 steps" in line)
    if last - first > 10:  # as everywhere but on a GPU
        patterns.append(r"evaluating the teacher in 28 steps: image \d+ of 464, \S+ images/s, ")
    for pattern in patterns:
        assert any(re.match(pattern, line) for line in text), (pattern, text)
    assert not any("\x1b" in line or "\r" in line for line in text)
    heading, *log = (folder / "run.log").read_text(encoding="utf-8").splitlines()
    assert heading.endswith(f"python -m distill.run {COMMAND}")
    assert log == text


@pytest.mark.slow
def test_what_it_writes(run):
    folder, _, _ = run
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    iterations = [int(float(row["iteration"])) for row in rows if row["iteration"]]
    assert iterations == [1, 10]
    assert {"g/adv", "d/adv", "d/accuracy", "images_seen", "g/update_ratio"} <= set(rows[0])
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (facts["status"], facts["steps"]) == ("finished", STEPS)
    judged = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["who"], row["steps"]) for row in judged] == [
        *(("teacher", n) for n in (1, 4, 28)),
        *(("student", n) for n in (1, 2, 4)),
    ]
    assert (folder / "alarms.jsonl").read_text(encoding="utf-8") == ""
    assert "No health alarm was raised." in (folder / "report.html").read_text(encoding="utf-8")
    written = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert written >= {
        f"checkpoints/step_{STEPS:06d}.ckpt",
        "samples/captions.txt",
        "samples/comparison.png",
        "samples/step_000000.png",
        f"samples/step_{STEPS:06d}.png",
        "student/README.md",
    }
    assert any(name.startswith("events.out.tfevents") for name in written)
