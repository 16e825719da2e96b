"""Runs side by side: grouped by what differs, mean and spread over seeds, one page that holds
everything.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torchvision.utils import save_image

from distill.evaluation.categories import with_categories
from distill.evaluation.results import outcomes_of, packed
from distill.evaluation.tables import as_markdown
from distill.report import write_report
from distill.report.along_runs import curves_of
from distill.report.comparison import _pictures
from distill.report.curves import read
from distill.report.differences import differences, headline, notes
from distill.report.runs import grouped, lines_of, read_run, text_table
from distill.training.csv_logger import CsvLog

LADD = {"_target_": "distill.methods.ladd.LADD", "loss": "hinge", "renoise": {"m": 1.0}}
ADD = {"_target_": "distill.methods.add.ADD", "loss": "hinge", "crop": None}


@pytest.fixture
def written(tmp_path):
    """Write a judged run: method's node, seed, one-step accuracy -> its folder."""

    def write(name, method, seed, accuracy, **more):
        folder = tmp_path / "runs" / name
        (folder / "samples").mkdir(parents=True)
        config = {
            "run_dir": str(folder),
            "seed": seed,
            "method": copy.deepcopy(method),
            "data": {"batch_size": 4},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump({**config, **more}), encoding="utf-8")
        facts = {
            "method": method["_target_"].rpartition(".")[2],
            "train_seconds": 60.0,
            "images_seen": 100,
        }
        (folder / "run.json").write_text(
            json.dumps({**facts, "command": "python -m distill.run", "commit": "abc"}),
            encoding="utf-8",
        )
        scores = {"frechet": 100.0, "precision": 1.0}
        rows = [{"who": "teacher", "steps": 28, "prompt_accuracy": 0.9, **scores}]
        rows += [
            {"who": "student", "steps": n, "prompt_accuracy": accuracy + 0.01 * n, **scores}
            for n in (1, 4)
        ]
        (folder / "evaluation.json").write_text(
            json.dumps({"protocol": {"prompts": 8}, "rows": rows}), encoding="utf-8"
        )
        (folder / "metrics.csv").write_text("step,d/accuracy\n1,0.6\n2,0.7\n", encoding="utf-8")
        pictures = (
            torch.arange(3)[:, None].expand(3, 4).flatten().float() / 2
        )  # a grey for each row of the grid
        save_image(
            pictures.view(-1, 1, 1, 1).expand(-1, 3, 8, 8),
            folder / "samples" / "comparison.png",
            nrow=4,
        )
        return folder

    return write


def test_seeds_of_one_setting_make_a_group(written):
    other = {**LADD, "renoise": {"m": 0.5}}
    folders = [written(f"a{seed}", LADD, seed, 0.5 + 0.1 * seed) for seed in range(3)]
    folders += [written(f"b{seed}", other, seed, 0.3) for seed in range(2)]
    groups = grouped([read_run(folder) for folder in folders])
    assert {name: len(runs) for name, runs in groups.items()} == {"m=1.0": 3, "m=0.5": 2}
    line = next(line for line in lines_of(groups) if (line.group, line.steps) == ("m=1.0", 1))
    values = [0.51, 0.61, 0.71]
    assert line.mean("prompt_accuracy") == pytest.approx(statistics.mean(values))
    spread = statistics.stdev(values)
    # no outcomes of prompts: over three seeds alone, by Student's t with two degrees of freedom
    low, high = (0.61 + sign * 4.3027 * spread / 3**0.5 for sign in (-1, 1))
    text = line.formatted("prompt_accuracy", "{:.4f}")
    assert text.startswith(f"0.6100 ± {spread:.4f} [")
    ends = [float(x) for x in text.partition("[")[2].rstrip("]").split(",")]
    assert ends == pytest.approx([low, high], abs=0.005)
    teacher = [line for line in lines_of(groups) if line.who == "teacher"]
    assert [(line.steps, line.values["prompt_accuracy"]) for line in teacher] == [
        (28, [pytest.approx(0.9)])
    ]


def test_methods_are_told_apart_by_name_and_not_by_their_recipes(written):
    runs = [written("l", LADD, 0, 0.5), written("a0", ADD, 0, 0.4, data={"batch_size": 8})]
    runs.append(written("a1", {**ADD, "crop": 8}, 0, 0.4, data={"batch_size": 8}))
    groups = grouped([read_run(folder) for folder in runs])
    assert list(groups) == ["LADD", "ADD, crop=None", "ADD, crop=8"]


def test_runs_that_differ_in_much_have_the_names_of_their_folders(written):
    other = {**LADD, "renoise": {"m": 0.5}, "distill_weight": 2.0, "order": "joint", "r1": 0.1}
    data = {"batch_size": 8}
    runs = [written("l", LADD, 0, 0.5), written("o0", other, 0, 0.4, data=data)]
    runs.append(written("o1", other, 1, 0.4, data=data))
    groups = grouped([read_run(folder) for folder in runs])
    assert {name: len(found) for name, found in groups.items()} == {"l": 1, "o0": 2}


def test_where_and_how_often_a_run_logs_makes_no_other_setting(written):
    trainer = {"max_steps": 10, "accelerator": "cpu", "log_every_n_steps": 5}
    often = {**trainer, "accelerator": "auto", "log_every_n_steps": 10}
    runs = [written(f"r{i}", LADD, i, 0.5, trainer=x) for i, x in enumerate((trainer, often))]
    assert list(grouped([read_run(folder) for folder in runs])) == ["LADD"]


def test_runs_of_one_name_may_be_a_group(written, command, tmp_path):
    for seed, method in enumerate((LADD, ADD)):
        facts = written(f"run{seed}", method, seed, 0.5) / "run.json"
        facts.write_text(
            json.dumps({**json.loads(facts.read_text(encoding="utf-8")), "name": "tuned"}),
            encoding="utf-8",
        )
    code, printed, err = command(
        "compare", f"runs={tmp_path}/runs", "by_name=true", f"out={tmp_path / 'out'}"
    )
    assert code == 0, err
    assert "| tuned | 1 | 2 |" in printed


def test_runs_judged_otherwise_are_not_averaged(written):
    """`distill.evaluate` with more prompts writes over what a run said of itself."""
    folders = [written(f"seed{seed}", LADD, seed, 0.5) for seed in range(3)]
    verdict = json.loads((folders[2] / "evaluation.json").read_text(encoding="utf-8"))
    verdict["protocol"] = {"prompts": 2000, "teacher guidance": 3.0}
    (folders[2] / "evaluation.json").write_text(json.dumps(verdict), encoding="utf-8")
    facts = json.loads((folders[0] / "run.json").read_text(encoding="utf-8")) | {"name": "mine"}
    for folder in folders:
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    runs = [read_run(folder) for folder in folders]
    assert {name: len(found) for name, found in grouped(runs).items()} == {
        "prompts=8": 2,
        "prompts=2000": 1,
    }
    assert list(grouped(runs, by_name=True)) == ["mine, prompts=8", "mine, prompts=2000"]
    teachers = [line.group for line in lines_of(grouped(runs)) if line.who == "teacher"]
    assert teachers == ["teacher, prompts=8", "teacher, prompts=2000"]
    # but a measure more, or what older runs did not say, is no other judging
    verdict["protocol"] = {"prompts": 8, "student sampler": "Consistency()", "fid": "Inception"}
    (folders[2] / "evaluation.json").write_text(json.dumps(verdict), encoding="utf-8")
    assert [len(found) for found in grouped([read_run(folder) for folder in folders]).values()] == [
        3
    ]


def test_two_teachers_are_not_one(written):
    runs = [
        read_run(written(name, LADD, 0, 0.5, teacher={"path": name, "dtype": "float32"}))
        for name in ("a", "b")
    ]
    runs[1].rows[0].scores["prompt_accuracy"] = 0.3
    found = {
        line.group: line.mean("prompt_accuracy")
        for line in lines_of(grouped(runs))
        if line.who == "teacher"
    }
    assert found == {"teacher, path=a": 0.9, "teacher, path=b": 0.3}


def test_the_teacher_of_most_steps_is_drawn_whoever_judged_it(written):
    groups = grouped([read_run(written("a", ADD, 0, 0.4)), read_run(written("l", LADD, 0, 0.5))])
    assert list(groups) == ["ADD", "LADD"]
    (add,) = groups["ADD"]
    add.rows[0] = add.rows[0]._replace(steps=1)
    heads = re.findall("<th>(.*?)</th>", _pictures(groups))
    assert heads == [
        "teacher<br>28 steps",
        *(f"{name}<br>{n}" for name in groups for n in ("1 step", "4 steps")),
    ]


def test_the_best_is_told_by_the_fewest_steps_that_were_judged(written):
    run = read_run(written("a", LADD, 0, 0.4))
    tile, said = headline(lines_of({"LADD": [run]}))
    assert (tile, said) == (
        ("With 1 step", "41.0%", "LADD"),
        "LADD with 1 step: prompts right 41.0%.",
    )
    del run.rows[1]
    tile, said = headline(lines_of({"LADD": [run]}))
    assert (tile, said) == (
        ("With 4 steps", "44.0%", "LADD"),
        "LADD with 4 steps: prompts right 44.0%.",
    )


# -- what stands -----------------------------------------------------------------------------------


@pytest.fixture
def judged(written):
    """Write runs of one method with outcomes: its node, one-step accuracy of each seed, prompts."""

    def write(name, method, accuracies, prompts=200, **more):
        folders = []
        for seed, accuracy in enumerate(accuracies):
            folder = written(f"{name}{seed}", method, seed, accuracy, **more)
            right = np.zeros(prompts)
            right[: round(accuracy * prompts)] = 1  # the same prompts are the hard ones, always
            file = folder / "evaluation.json"
            evaluation = json.loads(file.read_text(encoding="utf-8"))
            for row in evaluation["rows"]:
                row["prompt_accuracy"] = right.mean()
                row["outcomes"] = packed({"prompt_accuracy": right})
            evaluation["protocol"] = {"prompts": prompts}
            file.write_text(json.dumps(evaluation), encoding="utf-8")
            folders.append(folder)
        return [read_run(folder) for folder in folders]

    return write


def test_the_headline_says_best_only_of_a_difference_that_stands(judged):
    better = judged("l", LADD, [0.80, 0.81, 0.82])
    worse = judged("a", ADD, [0.60, 0.61, 0.62])
    lines = lines_of({"LADD": better, "ADD": worse})
    tile, said = headline(lines)
    assert tile[::2] == ("Best with 1 step", "LADD")
    assert said.startswith("LADD is best with 1 step: prompts right 81.0% ± 1.0% [")
    first = differences(lines)[0]
    assert (first.words, first.over) == ("LADD is better", "3 and 3 seeds, 200 prompts")
    assert first.interval.low < 0.2 < first.interval.high
    assert list(notes(lines)) == [  # the distance has none here
        "Interval over seeds alone, for want of outcomes of single prompts: fréchet distance of"
        " LADD, ADD."
    ]
    # Of seeds that differ as much as the groups, nothing is shown.
    lines = lines_of({"LADD": better, "ADD": judged("w", ADD, [0.40, 0.80, 0.90])})
    tile, said = headline(lines)
    assert tile[0] == "Best mean with 1 step"
    assert "is best" not in said
    assert "no difference is shown between LADD" in said


def test_equal_zeros_make_nobody_the_best(judged):
    """Found on runs of eight prompts: "ADD is best: prompts right 0.0%"."""
    groups = {"ADD": judged("a", ADD, [0.0], 8), "LADD": judged("l", LADD, [0.0], 8)}
    _, said = headline(lines_of(groups))
    assert "is best" not in said
    assert "no difference is shown between ADD" in said


def test_a_difference_of_single_seeds_is_one_of_these_runs_alone(judged):
    groups = {"LADD": judged("l", LADD, [0.9]), "ADD": judged("a", ADD, [0.5])}
    lines = lines_of(groups)
    assert differences(lines)[0].words == (
        "shown for these runs, not for their settings: fewer than 3 seeds"
    )
    assert headline(lines)[0][0] == "Best mean with 1 step"
    assert "Interval over prompts alone, for one seed: prompts right of LADD, ADD." in notes(lines)


def test_runs_of_one_seed_count_once(judged):
    """Three copies of a run are no three seeds."""
    runs = judged("l", LADD, [0.9, 0.91, 0.92])
    for run in runs:
        run.config["seed"] = 0
    lines = lines_of({"LADD": runs, "ADD": judged("a", ADD, [0.5, 0.51, 0.52])})
    assert not differences(lines)[0].stands
    assert differences(lines)[0].seeds == [1, 3]


def test_a_run_that_has_diverged_is_named_and_not_silently_left_out(judged):
    groups = {}
    for name, lost in (("LADD", 1), ("ADD", 3)):
        runs = judged(name, LADD, [0.8, 0.81, 0.82])
        for run in runs[:lost]:
            file = run.folder / "evaluation.json"
            evaluation = json.loads(file.read_text(encoding="utf-8"))
            for row in evaluation["rows"]:
                row["frechet"] = math.nan
            file.write_text(json.dumps(evaluation), encoding="utf-8")
        groups[name] = [read_run(run.folder) for run in runs]
    said = list(notes(lines_of(groups)))
    end = "have a finite one, and the mean is over such runs."
    assert f"Fréchet distance of LADD, 1 step: 2 of 3 runs {end}" in said
    assert any(text.startswith("Fréchet distance of ADD, 1 step: 0 of 3 runs") for text in said)


def test_other_prompts_are_not_compared(judged):
    groups = {"LADD": judged("l", LADD, [0.8] * 3), "ADD": judged("a", ADD, [0.5] * 3, prompts=100)}
    found = differences(lines_of(groups))[0]
    assert found.words == "no interval: evaluated by different protocols"
    assert not found.stands


def test_an_evaluation_without_a_protocol_is_named(judged):
    """As older versions wrote it: nothing says that its prompts are those of the others."""
    old = judged("l", LADD, [0.8] * 3)
    for run in old:
        file = run.folder / "evaluation.json"
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**evaluation, "protocol": {}}), encoding="utf-8")
    groups = {"LADD": [read_run(run.folder) for run in old], "ADD": judged("a", ADD, [0.5] * 3)}
    said = [text for text in notes(lines_of(groups)) if "do not say on what prompts" in text]
    assert [text.rpartition(": ")[2] for text in said] == ["LADD."]


def test_outcomes_that_are_no_numbers_are_damage(judged, tmp_path):
    (run,) = judged("l", LADD, [0.5])
    file = run.folder / "evaluation.json"
    text = file.read_text(encoding="utf-8")
    for wrong in ("1 x", "1 nan", "1 inf"):
        file.write_text(re.sub(r'"1 1[ 01]*"', f'"{wrong}"', text), encoding="utf-8")
        with pytest.raises(ValueError, match="outcomes"):
            read_run(run.folder)


def test_scores_along_the_runs_are_curves_with_a_band(judged, command, tmp_path):
    runs = judged("l", LADD, [0.8, 0.9])
    for i, run in enumerate(runs):
        rows = [
            f"{step},{16 * step},{60 * step * (i + 1)},{0.1 * step + 0.02 * i}" for step in (0, 5)
        ]
        text = "\n".join(["step,images_seen,train_seconds,prompt_accuracy", *rows, ""])
        (run.folder / "scores.csv").write_text(text, encoding="utf-8")
    tables = [read(run.folder / "scores.csv")[0] for run in runs]
    curve = curves_of({"LADD": tables}, "prompt_accuracy", "train_seconds")["LADD"]
    assert curve.x.tolist() == [0.0, 7.5]  # minutes, the mean of 5 and 10
    assert curve.low == pytest.approx([0.0, 0.5])
    assert curve.high == pytest.approx([0.02, 0.52])
    code, _, err = command("compare", f"runs={tmp_path}/runs", f"out={tmp_path / 'out'}")
    assert code == 0, err
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert page.count("Prompts right ↑ along the run</h3>") == 2
    assert "By training minutes" in page
    assert "By thousand pictures seen" in page
    (runs[0].folder / "scores.csv").write_text("", encoding="utf-8")
    assert command("compare", f"runs={tmp_path}/runs", f"out={tmp_path / 'out'}")[0] == 0


def test_another_class_is_one_difference(written):
    one = {**LADD, "renoise": {"_target_": "distill.core.times.LogitNormal", "m": 1.0}}
    two = {**LADD, "renoise": {"_target_": "distill.core.times.Discrete", "levels": [1.0]}}
    groups = grouped([read_run(written("one", one, 0, 0.5)), read_run(written("two", two, 0, 0.5))])
    assert list(groups) == ["renoise=LogitNormal", "renoise=Discrete"]


def test_the_command_writes_a_page_that_needs_nothing_else(written, command, tmp_path):
    for seed in range(2):
        written(f"ladd{seed}", LADD, seed, 0.5)
    written("add", ADD, 0, 0.45)
    (tmp_path / "runs" / "unjudged").mkdir()
    (tmp_path / "runs" / "unjudged" / "run.json").write_text("{}", encoding="utf-8")
    out = tmp_path / "out"
    code, printed, err = command("compare", f"runs=[{tmp_path}/runs/*,gone]", f"out={out}")
    assert code == 0, err
    assert "left out, no runs there: gone\n" in printed
    assert "left out, not evaluated yet" in printed
    assert "unjudged" in printed
    html = (out / "compare.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]+"', html)  # nothing is fetched
    assert "$" not in re.sub(r"<script>.*?</script>|base64,[^\"]+", "", html, flags=re.S)
    assert "No group is shown to be best with 1 step." in html
    assert "no interval: single seeds, and no outcomes of single prompts" in html
    rows = list(csv.DictReader((out / "compare.csv").open(encoding="utf-8")))
    assert len(rows) == 3 * 3
    assert {row["group"] for row in rows} == {"LADD", "ADD"}
    table = (out / "compare.md").read_text(encoding="utf-8")
    assert table in printed
    first = table.partition("\n\n")[0]
    assert first.count("\n") == 2 + 2 * 2
    grid = re.search(r'<table class="grid">.*?</table>', html, re.S)[0]
    assert grid.count("<th>") == 1 + 2 * 2  # the teacher once, each group at each number of steps
    assert grid.count("<img") == 4 * 5


def test_nothing_to_compare_is_said(command, tmp_path):
    code, _, err = command("compare", f"runs={tmp_path}/*", f"out={tmp_path / 'out'}")
    assert code == 1
    assert err.count("\n") == 1
    assert "no runs" in err
    assert not (tmp_path / "out").exists()


def test_the_table_reads_as_markdown(written):
    table = as_markdown(text_table(lines_of(grouped([read_run(written("a", LADD, 0, 0.5))]))))
    widths = {line.count("|") for line in table.splitlines()}
    assert len(widths) == 1


def test_a_method_without_a_discriminator_has_no_curve_of_it(written, command, tmp_path):
    first, second = (
        written("ladd", LADD, 0, 0.5),
        written("none", {"_target_": "distill.methods.regression.R"}, 0, 0.5),
    )
    (second / "metrics.csv").write_text("step,g/regression\n1,0.6\n2,0.7\n", encoding="utf-8")
    for runs, shown in (([first, second], True), ([second], False)):
        code, _, err = command(
            "compare", f"runs=[{','.join(map(str, runs))}]", f"out={tmp_path / 'out'}"
        )
        assert code == 0, err
        assert (
            "Discriminator&#x27;s accuracy"
            in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
        ) is shown
    (second / "metrics.csv").unlink()
    assert command("compare", f"runs={second}", f"out={tmp_path / 'out'}")[0] == 0


DAMAGE = {
    "evaluation.json": (
        '{"rows": [',
        "[]",
        '{"rows": [{"who": "student"}]}',
        '{"rows": 3}',
        "\xff",
    ),
    "run.json": ("{", "[1]", '{"train_seconds": "long"}'),
    "config.yaml": ("{", "junk", "a: [b", "\x00\x01"),
}


def test_scores_too_large_for_a_spread_are_left_out(command, written, tmp_path):
    for seed, name in enumerate(("one", "two")):
        run = written(name, LADD, seed, 0.5)
        found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
        for row in found["rows"]:
            row["kid"] = 1e308
        (run / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    code, out, err = command("compare", "runs=runs/*")
    assert (code, err) == (0, "")
    assert "KID" not in out


@pytest.mark.parametrize(
    ("file", "text"), [(file, text) for file, texts in DAMAGE.items() for text in texts]
)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_damaged_run_is_named_and_the_others_compared(
    by_name, file, text, command, written, tmp_path
):
    good, bad = written("good", LADD, 0, 0.5), written("bad", LADD, 1, 0.6)
    (bad / file).write_bytes(text.encode("latin-1"))
    code, out, err = command("compare", "runs=runs/*", f"by_name={by_name}")
    assert (code, err) == (0, "")
    assert f"left out, damaged: {Path('runs/bad', file)}" in out
    assert len([line for line in out.splitlines() if "damaged" in line]) == 1
    assert (tmp_path / "compare" / "compare.html").is_file()
    assert good.name in (tmp_path / "compare" / "compare.csv").read_text(encoding="utf-8")
    (good / file).write_bytes(text.encode("latin-1"))
    code, _, err = command("compare", "runs=runs/*")
    assert (code, len(err.splitlines())) == (1, 1)


@pytest.mark.parametrize(("file", "keep"), [("metrics.csv", 9), ("samples/comparison.png", 60)])
def test_curves_and_pictures_that_are_cut_cost_no_comparison(
    file, keep, command, written, tmp_path
):
    written("good", LADD, 0, 0.5)
    bad = written("bad", LADD, 1, 0.6)
    (bad / file).write_bytes((bad / file).read_bytes()[:keep])
    code, _, err = command("compare", "runs=runs/*")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("damage", ["null", "nan", "keys", "dates", "fifo", "folder", "cell"])
def test_a_damaged_run_does_not_stop_the_comparison_of_others(damage, written, command, tmp_path):
    """What can be shown of it is; what cannot is named."""
    folder = written("a", LADD, 0, 0.5)
    written("b", ADD, 0, 0.6)
    facts, config, table = (folder / name for name in ("run.json", "config.yaml", "metrics.csv"))
    if damage in ("null", "nan"):
        said = {"null": None, "nan": float("nan")}[damage]
        known = json.loads(facts.read_text(encoding="utf-8"))
        facts.write_text(json.dumps({**known, "train_seconds": said}), encoding="utf-8")
    elif damage in ("keys", "dates"):
        more = {"keys": "5: x\ntrue: y\nnull: z\nmethod: {1: 2, loss: hinge}\n"}
        more["dates"] = "when: 2026-01-02\nall: [2026-01-02, 1.0]\nwhat: !!set {a}\n"
        config.write_text(more[damage], encoding="utf-8")
    elif damage == "cell":
        table.write_text(f'step,d/accuracy\n1,{"9" * 200000}\n2,"0.5\n3,0.7\n', encoding="utf-8")
    else:
        table.unlink()
        os.mkfifo(table) if damage == "fifo" else table.mkdir()
    code, out, err = command("compare", f"runs={tmp_path / 'runs' / '*'}", f"out={tmp_path / 'c'}")
    assert (code, err) == (0, "")
    page = (tmp_path / "c" / "compare.html").read_text(encoding="utf-8")
    assert "2 runs side by side" in page
    assert ("A curve is left out: " in page) == (damage in ("fifo", "folder"))


def test_a_cell_of_a_table_that_cannot_be_read_costs_its_row_alone(tmp_path):
    table = tmp_path / "metrics.csv"
    table.write_text(f'step,a\n1,{"9" * 200000}\n2,"0.5\n3,0.7\n4,0.8\n', encoding="utf-8")
    curves, strange = read(table)
    assert curves["a"].tolist() == [[2.0, 3.0, 4.0], [0.5, 0.7, 0.8]]
    assert strange == 1
    table.write_text(f"step,{'9' * 200000}\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="column names"):
        read(table)
    with pytest.raises(ValueError, match="its first line is no header"):
        CsvLog(str(tmp_path))
    assert "metrics.csv cannot be shown" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_judge_gives_win_rates_and_ratings(judged, command, tmp_path):
    judged("ladd", LADD, (0.8, 0.81, 0.82))
    judged("add", ADD, (0.4, 0.41, 0.42))
    out = tmp_path / "out"
    code, printed, err = command("compare", f"runs={tmp_path}/runs", "judge=reader", f"out={out}")
    assert code == 0, err
    assert "ELO" in printed
    with open(out / "wins.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wins = [r for r in rows if r["measure"] == "win_rate" and "teacher" not in r["model"]]
    (one,) = [r for r in wins if r["model"].endswith("1 step") and r["against"].endswith("1 step")]
    # the better one is right at 40 % of the prompts more, and ties at the others
    better = float(one["value"]) if "LADD" in one["model"] else 1 - float(one["value"])
    assert better == pytest.approx(0.7)
    assert float(one["low"]) < float(one["value"]) < float(one["high"])
    (verdict,) = json.loads((out / "wins.json").read_text(encoding="utf-8"))["verdicts"]
    assert verdict["judge"] == "reader"
    found = {(w["model"], w["against"]): w for w in verdict["win_rates"]}
    same = found[one["model"], one["against"]]
    ends = ("value", "low", "high")
    assert [same[end] for end in ends] == pytest.approx([float(one[end]) for end in ends])
    assert {r["model"] for r in verdict["elo"]} == {m for pair in found for m in pair}


def test_categories_of_prompts_are_compared_one_by_one(judged, command, tmp_path):
    """Right are the first 80 and the first 40 % of 200 prompts, which are in three categories."""
    judged("ladd", LADD, (0.8, 0.8, 0.8))
    judged("add", ADD, (0.4, 0.4, 0.4))
    labels = ["Colors"] * 80 + ["Counting"] * 110 + ["Rare | words"] * 10
    for file in (tmp_path / "runs").glob("*/evaluation.json"):
        evaluation = json.loads(file.read_text(encoding="utf-8"))
        numbers = [outcomes_of(row) for row in evaluation["rows"]]
        pairs = zip(evaluation["rows"], numbers, strict=True)
        evaluation["rows"] = [with_categories(row, single, labels) for row, single in pairs]
        few = evaluation["rows"][0]["by_category"]["Rare | words"]
        assert (few["prompts"], few["few"]) == (10, True)
        file.write_text(json.dumps(evaluation), encoding="utf-8")
    out = tmp_path / "out"
    code, _, err = command("compare", f"runs={tmp_path}/runs", "judge=reader", f"out={out}")
    assert code == 0, err
    table = (out / "compare.md").read_text(encoding="utf-8")
    lines = [line for line in table.splitlines() if "LADD" in line and "| 1 |" in line]
    assert any(
        "| Colors | 80 |" in line and "| 100.0% | [100.0%, 100.0%]" in line for line in lines
    )
    counting = next(line for line in lines if "| Counting | 110 |" in line)
    assert f"| {80 / 110:.1%} |" in counting
    assert any("Rare \\| words (few) | 10 |" in line for line in lines)
    assert "fewer than 20 prompts" in table
    assert "By category" in (out / "compare.html").read_text(encoding="utf-8")
    (verdict,) = json.loads((out / "wins.json").read_text(encoding="utf-8"))["verdicts"]
    rates = {
        w["category"]: w
        for w in verdict["by_category"]
        if w["model"].endswith("1 step") and w["against"].endswith("1 step")
    }
    wins = {name: max(w["value"], 1 - w["value"]) for name, w in rates.items()}
    assert wins["Colors"] == pytest.approx(0.5)  # both are right
    assert wins["Counting"] == pytest.approx(0.5 + 0.5 * 80 / 110)
    assert rates["Counting"]["low"] < rates["Counting"]["value"] < rates["Counting"]["high"]
    assert [rates[name]["few"] for name in dict.fromkeys(labels)] == [False, False, True]
    text = (out / "wins.md").read_text(encoding="utf-8")
    assert "| reader | Counting | 110 |" in text
    evaluation["rows"][0]["categories"]["of"] = "0 7"
    file.write_text(json.dumps(evaluation), encoding="utf-8")
    _, printed, _ = command("compare", f"runs={tmp_path}/runs", f"out={out}")
    assert "categories hold a number without a name" in printed


@pytest.mark.parametrize("judge", ["nobody", "pick_score"])
def test_a_judge_without_outcomes_is_one_sentence(judge, judged, command, tmp_path):
    judged("ladd", LADD, (0.8, 0.81))
    out = tmp_path / "out"
    code, _, err = command("compare", f"runs={tmp_path}/runs", f"judge={judge}", f"out={out}")
    assert code == 1
    assert f"judge={judge}: " in err
    assert not (out / "compare.md").exists()
