"""Commands that are killed at random points and given again: benchmarks/kills.py, in a process of
its own that has imported everything.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


RUN = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def killed(forks):
    """The results of trials, of which none may have lost anything or left anything behind."""

    def killed(out: Path, *options: str) -> list[dict]:
        script = ROOT / "benchmarks" / "kills.py"
        ended = forks.script(
            RUN, script, f"out={out}", *options, folder=out.parent, err=out.parent / "err.txt"
        )
        code = ended.wait(timeout=3600)
        lines = (out / "trials.jsonl").read_text(encoding="utf-8").splitlines()
        results = [json.loads(line) for line in lines]
        bad = [r for r in results if r["code"] or r["lost"] or r["litter"]]
        assert not bad, json.dumps(bad, indent=1)
        assert code == 0, ended.said()
        return results

    return killed


@pytest.mark.nightly
def test_a_few_kills_cost_nothing(killed, tmp_path):
    results = killed(tmp_path / "kills", "trials=3", "seed=20", "commands=run,synthesize")
    assert [r["command"] for r in results] == ["run", "synthesize", "run"]
    assert sum(r["killed"] for r in results) >= 2  # a command may end before its moment comes


@pytest.mark.nightly
def test_many_kills_cost_nothing(killed, tmp_path):
    from kills import COMMANDS

    results = killed(tmp_path / "kills", "trials=40", "seed=1000")
    assert len(results) == 40
    assert {r["command"] for r in results} == set(COMMANDS)
    assert sum(r["killed"] for r in results) > 30


def test_what_is_lost_or_left_is_seen(tmp_path):
    """The comparison itself: other bits, rows and names are found, and times are not."""
    from kills import snapshot

    def write(folder: Path, **files: str) -> dict[str, str]:
        folder.mkdir()
        whole = {"metrics.csv": "step,a,images_per_second\n1,0.5,{}\n2,0.25,\n", "a.tar": "xyz"}
        whole |= {"evaluation.json": '{{"rows": [{{"fid": 1, "seconds_per_image": {}}}]}}'}
        for name, text in (whole | files).items():
            (folder / name).write_text(text.format(len(folder.name)), encoding="utf-8")
        return snapshot(folder)

    first = write(tmp_path / "a")
    assert write(tmp_path / "bcd") == first
    assert set(write(tmp_path / "more", **{"x.part": ""})) - set(first) == {"x.part"}
    for name, text in {
        "metrics.csv": "step,a\n1,0.5\n",
        "a.tar": "xy",
        "evaluation.json": '{{"rows": []}}',
    }.items():
        other = write(tmp_path / f"of {name}", **{name: text})
        assert [key for key in first if other[key] != first[key]] == [name]
