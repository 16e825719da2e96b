"""Several protocols on one run: none replaces another, and runs are compared by one that all
have.
"""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from distill.evaluation.results import (
    add_result,
    comparable,
    packed,
    promote_newest,
    results_in,
)
from distill.evaluation.tables import rows_of
from distill.report.runs import read_comparable

OWN = {"prompts": 400, "seed": 0, "teacher guidance": 4.0}
QUICK = {"prompts": 8, "seed": 0}


def verdict(protocol, **scores):
    """By this protocol, `student_1=0.5` and the like."""
    rows = []
    for name, value in scores.items():
        who, _, steps = name.partition("_")
        rows.append({"who": who, "steps": int(steps), "frechet": value})
    return {"protocol": protocol, "rows": rows}


def test_another_protocol_stands_beside_a_run_s_own():
    file, _ = add_result({}, verdict(OWN, teacher_4=1.0, student_1=2.0), "a")
    own = promote_newest(file)
    after, entry = add_result(own, verdict(QUICK, student_1=9.0), "a")
    assert [v["protocol"] for v in results_in(after)] == [OWN, QUICK]
    assert rows_of(after) == rows_of(own)
    assert entry["picture"] not in (own["picture"], "comparison.png")
    again, _ = add_result(after, verdict(QUICK, student_2=8.0), "a")
    assert [len(v["rows"]) for v in results_in(again)] == [2, 2]
    assert again["protocol"] == OWN


def test_protocols_that_differ_in_the_teacher_alone_have_pictures_of_their_own():
    file = {}
    for guidance in (4.0, 5.0, 6.0):
        protocol = {**OWN, "teacher guidance": guidance}
        file, _ = add_result(file, verdict(protocol, teacher_4=1.0), "a")
    assert len({v["picture"] for v in results_in(file)}) == 3


def test_the_same_protocol_takes_the_new_rows_and_keeps_the_others():
    file, _ = add_result({}, verdict(OWN, teacher_4=1.0, student_1=2.0, student_2=3.0), "a")
    fewer = {k: v for k, v in OWN.items() if not k.startswith("teacher")}
    after, entry = add_result(
        promote_newest(file), verdict({**fewer, "kid": "Inception"}, student_2=5.0), "a"
    )
    found = {(row["who"], row["steps"]): row["frechet"] for row in after["rows"]}
    assert found == {("teacher", 4): 1.0, ("student", 1): 2.0, ("student", 2): 5.0}
    assert after["protocol"] == {**OWN, "kid": "Inception"}
    assert entry["picture"] == "comparison.png"


def test_rows_that_come_later_stand_in_the_order_of_their_steps():
    file, _ = add_result({}, verdict(OWN, teacher_28=1.0, student_1=2.0, student_4=3.0), "a")
    after, _ = add_result(file, verdict(OWN, student_2=2.5, teacher_4=4.0), "a")
    found = [(row["who"], row["steps"]) for row in after["rows"]]
    assert found == [("teacher", 4), ("teacher", 28), *(("student", n) for n in (1, 2, 4))]


def test_outcomes_of_single_prompts_are_merged_by_measure():
    old = verdict(OWN, student_1=2.0)
    old["rows"][0]["outcomes"] = packed({"frechet": [1.0, 3.0], "fid": [2.0, 2.0]})
    new = verdict(OWN, student_1=2.5)
    new["rows"][0]["outcomes"] = packed({"frechet": [2.0, 3.0]})
    after, _ = add_result(promote_newest(add_result({}, old, "a")[0]), new, "a")
    assert rows_of(after)[0].outcomes == {"frechet": [2.0, 3.0], "fid": [2.0, 2.0]}


def test_verdicts_on_another_student_go():
    file, _ = add_result({}, verdict(OWN, student_1=2.0), "a")
    after, _ = add_result(promote_newest(file), verdict(QUICK, student_1=1.0), "b")
    assert [v["protocol"] for v in results_in(after)] == [QUICK]
    assert not after["own"]


def test_of_what_is_no_run_the_newest_stands_first():
    file, _ = add_result({}, verdict(QUICK, student_1=2.0), "a")
    after, _ = add_result(file, verdict(OWN, student_1=1.0), "a")
    assert [v["protocol"] for v in results_in(after)] == [OWN, QUICK]


def test_a_run_that_judges_itself_anew_has_that_as_its_own():
    file, _ = add_result({}, verdict(QUICK, student_1=2.0), "a")
    after = promote_newest(add_result(promote_newest(file), verdict(OWN, student_1=1.0), "a")[0])
    assert [v["protocol"] for v in results_in(after)] == [OWN, QUICK]


def test_a_file_of_before_is_a_run_s_own_verdict_and_is_kept():
    old = verdict(OWN, student_1=2.0)
    after, _ = add_result(old, verdict(QUICK, student_1=1.0), "a")
    assert {v["protocol"]["prompts"] for v in results_in(after)} == {8, 400}


def test_what_can_be_compared():
    assert comparable(OWN, {**OWN, "fid": "Inception"})
    assert not comparable(OWN, QUICK)
    assert not comparable({"data": "a"}, {"prompts": 8})


def test_a_picture_elsewhere_is_not_shown():
    (found,) = results_in({"rows": [], "picture": "../../../secret.png"})
    assert found["picture"] == "comparison.png"


# -- with real runs --------------------------------------------------------------------------------


@pytest.fixture
def run(command, pipelines, shards, tmp_path):
    folder = tmp_path / "runs" / "own"
    few = ["trainer.max_steps=1", "metrics.prompts=16", "metrics.student_steps=[1,2]"]
    arguments = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", *few]
    code, _, err = command("run", *arguments, "metrics.teacher_steps=[1]", f"run_dir={folder}")
    assert code == 0, err
    return folder


def read(folder):
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_quick_look_does_not_replace_a_run_s_scores(run, command, tmp_path):
    before, picture = read(run), (run / "samples" / "comparison.png").read_bytes()
    quick = ["steps=1", "metrics.prompts=8", "metrics.teacher_steps=[]"]
    assert command("evaluate", f"run={run}", *quick)[0] == 0
    after = read(run)
    assert (after["rows"], after["protocol"]) == (before["rows"], before["protocol"])
    assert (run / "samples" / "comparison.png").read_bytes() == picture
    (beside,) = after["beside"]
    assert beside["protocol"]["prompts"] == 8
    assert (run / "samples" / beside["picture"]).is_file()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "By another protocol" in page
    assert "prompts: 8" in page
    assert "prompts: 16" in page

    # A run that has the quick protocol alone is compared by that.
    other = shutil.copytree(run, tmp_path / "runs" / "other")
    alone = {k: after[k] for k in ("model", "newest")} | beside | {"own": True, "beside": []}
    (other / "evaluation.json").write_text(json.dumps(alone), encoding="utf-8")
    runs = read_comparable([run, other])
    assert [r.protocol["prompts"] for r in runs] == [8, 8]
    assert command("compare", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'out'}")[0] == 0
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "prompts: 8" in page
    assert "evaluated by different protocols" not in page


@pytest.mark.nightly
def test_more_steps_by_the_same_protocol_join_the_others(run, command):
    before = read(run)
    with Image.open(run / "samples" / "comparison.png") as grid:
        old = grid.convert("RGB").copy()
    more = ["steps=3", "metrics.prompts=16", "metrics.teacher_steps=[]"]
    assert command("evaluate", f"run={run}", *more)[0] == 0
    after = read(run)
    names = [(row["who"], row["steps"]) for row in after["rows"]]
    had = [(row["who"], row["steps"]) for row in before["rows"]]
    assert names == [*had, ("student", 3)]
    assert after["rows"][:3] == before["rows"]
    assert after["beside"] == []
    with Image.open(run / "samples" / "comparison.png") as grid:
        new = grid.convert("RGB")
    height = (old.height - 2) // len(had)
    assert new.height == height * len(names) + 2
    kept = (0, 0, old.width, height * len(had))
    assert new.crop(kept).tobytes() == old.crop(kept).tobytes()
    last = new.crop((0, height * len(had) + 2, old.width, new.height - 2))
    assert len(set(last.tobytes())) > 2
