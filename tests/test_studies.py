"""Studies: what their pages say is in the CSV files beside them, and one command runs them."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

from run import main  # noqa: E402
from runner.jobs import Queue, Run, compose_all  # noqa: E402
from runner.methods import write_methods  # noqa: E402
from runner.pages import replace_parts  # noqa: E402
from runner.results import NOT_RUN, recorded_lines, verdict, write_results  # noqa: E402
from runner.study import StudyError, read_study  # noqa: E402

from distill.evaluation.statistics import mean_interval  # noqa: E402
from distill.evaluation.tables import MEASURES, SPACE  # noqa: E402

STUDIES = sorted(file.parent for file in EXPERIMENTS.glob("*/study.yaml"))
RUN = EXPERIMENTS / "run.py"
CELL = re.compile(
    r"(-?[\d,.]+)(%?)(?: ± (-?[\d,.]+)%?)?(?: \[(-?[\d,.]+)%?, (-?[\d,.]+)%?\])?"
    r"(?: \((\d+) of (\d+) seeds\))?"
)


def names(folders):
    return pytest.mark.parametrize("folder", folders, ids=lambda folder: folder.name)


def part(page: Path, name: str, by: str = "run.py") -> str:
    """What is between the markers of a part, made `by` a file of `experiments`."""
    text = page.read_text(encoding="utf-8")
    begin = f"<!-- made by experiments/{by}: {name} -->"
    assert text.count(begin) == 1, f"{page}: {name}"
    return text.partition(begin)[2].partition("<!-- end -->")[0]


def table_in(text: str) -> list[dict[str, str]]:
    """The rows of the first table of a part, by the texts of its heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def numbers(cell: str) -> list[float | None]:
    """Mean, spread, and the ends of the interval in a cell, as shares where it has percent."""
    found = CELL.fullmatch(cell)
    assert found, cell
    scale = 0.01 if found[2] else 1.0
    texts = (found[1], found[3], found[4], found[5])
    return [scale * float(text.replace(",", "")) if text else None for text in texts]


def check_numbers(folder: Path) -> int:
    """Hold every number of a study's tables against its CSV files; returns how many there were."""
    heads = {m.head.replace(SPACE, " "): key for key, m in MEASURES.items()}
    checked = 0
    for table in read_study(folder).tables:
        if not (folder / f"{table.name}.csv").is_file():
            assert "No run of this study" in part(folder / "README.md", table.name)
            continue
        runs = rows_of(folder / f"{table.name}.csv")
        ends = {
            (row["group"], row["steps"], row["measure"]): row
            for row in rows_of(folder / f"{table.name}_intervals.csv")
        }
        for row in table_in(part(folder / "README.md", table.name)):
            group, steps = row[""], row["steps"]
            if row["seeds"]:
                seeds = {r["seed"] for r in runs if (r["group"], r["steps"]) == (group, steps)}
                assert row["seeds"] == str(len(seeds)), group
            for head, key in heads.items():
                if head not in row or row[head] == "–":
                    continue
                who = "teacher" if group.startswith("teacher") else "student"
                scores = [
                    float(run[key])
                    for run in runs
                    if (run["who"], run["steps"]) == (who, steps)
                    and (who == "teacher" or run["group"] == group)
                    and run[key]
                ]
                interval = ends[group, steps, key]
                expected = [statistics.fmean(scores), None, interval["low"], interval["high"]]
                if who == "student" and len(scores) > 1:
                    expected[1] = statistics.stdev(scores)
                shown = numbers(row[head])
                for text, number in zip(shown, expected, strict=True):
                    if number in (None, ""):
                        assert text is None, row[head]
                        continue
                    form, beside = MEASURES[key].form, (1 - 1e-12, 1, 1 + 1e-12)  # of a tie
                    rounded = {form.format(float(number) * factor) for factor in beside}
                    assert form.format(text) in rounded, (group, head)
                    checked += 1
    return checked


def test_the_ratings_of_the_proxy_user_study_are_those_of_its_file():
    folder = ROOT / "experiments" / "proxy_user_study"
    made = runpy.run_path(str(EXPERIMENTS / "ratings.py"))
    between = part(folder / "README.md", "ratings", "ratings.py")
    assert between.strip() == made["table"](folder / "wins.csv")
    won = made["rates"](folder / "wins.csv")
    assert won["LADD, 4 steps"][1] < 0.5 < won["LADD, 4 steps"][2]  # the page says so
    assert won["LADD, 1 step"][2] < 0.5


def measured(study: str, name: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of a table that `measured.py` wrote, and those of the file beside its page."""
    folder = ROOT / "experiments" / study
    written = table_in(part(folder / "README.md", name, "measured.py"))
    return written, rows_of(folder / f"{name}.csv")


def given(cell: str) -> list[float]:
    return [number for number in numbers(cell) if number is not None]


def test_the_table_of_guidance_is_that_of_its_file():
    rows, file = measured("edit_shapes", "guidance")
    assert len(rows) == 12
    halves = {"followed": 0.005, "right": 0.005, "change": 0.005, "Fréchet": 0.5}
    for row in rows:
        scales = row["guidance by instruction, by source"].split(", ")
        name, _, steps = row["model"].partition(", ")
        wanted = (name, steps.split()[0], *scales)
        columns = ("model", "steps", "guidance", "image_guidance")
        found = [one for one in file if tuple(one[key] for key in columns) == wanted]
        assert len(found) == (1 if name == "teacher" else 3)
        for head, half in halves.items():
            key = {"right": "edited", "Fréchet": "frechet"}.get(head, head)
            values = [float(one[key]) for one in found]
            expected = [statistics.fmean(values)]
            expected += [statistics.stdev(values)] if len(values) > 1 else []
            assert given(row[head]) == pytest.approx(expected, abs=half * 1.001)


def test_the_table_of_preference_is_that_of_its_file():
    rows, file = measured("preference_shapes", "win_rates")
    assert [row["model"] for row in rows] == [one["model"] for one in file]
    keys = {
        "won over plain": (("won", "low", "high"), 0.0005),
        "won over itself": (("own", "own_low", "own_high"), 0.0005),
        "measure": (("measure",), 0.0005),
        "prompt accuracy": (("prompt_accuracy",), 0.0005),
        "Fréchet distance": (("frechet",), 0.5),
    }
    for row, one in zip(rows, file, strict=True):
        assert float(row["LoRA"] or 0) == float(one["lora_scale"])
        assert row["steps"] == one["steps"]
        for head, (columns, half) in keys.items():
            expected = [float(one[column]) for column in columns]
            if not row[head]:  # against itself there is nothing to win
                assert expected == [0.5] * 3
                continue
            assert given(row[head]) == pytest.approx(expected, abs=half * 1.001)


@names(STUDIES)
def test_every_number_of_a_made_table_is_in_the_file_beside_it(folder):
    checked = check_numbers(folder)
    assert checked > 300 or folder.name != "methods_on_shapes"


@pytest.fixture(scope="module")
def made_again(tmp_path_factory):
    """A copy of all studies whose pages were made anew from the files beside them."""
    copied = shutil.copytree(EXPERIMENTS, tmp_path_factory.mktemp("again") / "experiments")
    (copied / "methods.yaml").unlink()  # its tables and picture have a test of their own
    for folder in STUDIES:
        write_results(read_study(copied / folder.name), None, copied / "README.md")
    return copied


@pytest.mark.parametrize("name", ["README.md", *(folder.name for folder in STUDIES)])
def test_a_page_that_is_made_again_is_the_same(made_again, name):
    """So no digit, verdict or word of a made part was typed, also not in the overview."""
    before = EXPERIMENTS / name
    files = [before] if before.is_file() else [f for f in before.iterdir() if f.is_file()]
    for file in files:
        assert (made_again / file.relative_to(EXPERIMENTS)).read_bytes() == file.read_bytes(), file


def check_row(row: dict[str, str], expected: dict[str, float | None], interval) -> int:
    """Hold a row of a made file against what its runs' scores give."""
    low, high = interval.low, interval.high
    if "prompts" in row["over"] and row["low"]:  # whose outcomes are not in the files
        low, high = float(row["low"]), float(row["high"])
        assert low <= interval.value <= high, row
    elif not row["low"]:
        low = high = None
    expected = {**expected, "low": low, "high": high}
    for key, number in expected.items():
        found = float(row[key]) if row[key] else None
        assert found == (None if number is None else pytest.approx(number, rel=1e-6)), row
    return len(expected)


def check_files(folder: Path) -> int:
    """Hold the means, spreads and differences of the made files of a study against the scores of
    its runs, and intervals over seeds alone too; returns how many there were.
    """
    checked, study = 0, read_study(folder)
    lines = {table.name: recorded_lines(folder / f"{table.name}.csv") for table in study.tables}
    for name, of_table in lines.items():
        file = folder / f"{name}_intervals.csv"
        for row in rows_of(file) if file.is_file() else ():
            who, steps, key = row["who"], int(row["steps"]), row["measure"]
            found = [line for line in of_table if (line.who, line.steps) == (who, steps)]
            (line,) = [each for each in found if who == "teacher" or each.group == row["group"]]
            spread = statistics.stdev(line.values[key]) if line.values[key][1:] else None
            expected = {"mean": statistics.fmean(line.values[key]), "std": spread}
            checked += check_row(row, expected, mean_interval(line.samples[key]))
    for claim, row in zip(study.claims, rows_of(folder / "claims.csv"), strict=True):
        found = verdict(claim, lines[claim.table]).difference
        assert (found is None) == (not row["difference"]), row
        if found:
            assert row["seeds"] == " and ".join(map(str, found.seeds))
            expected = {"difference": found.interval.value}
            checked += check_row(row, expected, found.interval)
    return checked


@names(STUDIES)
def test_every_number_of_the_made_files_follows_from_the_scores_of_the_runs(folder):
    check_files(folder)


# -- the table of all methods ----------------------------------------------------------------------

ROOT = EXPERIMENTS.parent
OVERVIEWS = [ROOT / "README.md", ROOT / "docs" / "understand" / "results.md"]


def check_methods(page: Path) -> int:
    """Hold every number of the table of methods against the CSV file of its study in
    methods.yaml; returns how many there were.
    """
    named = yaml.safe_load((EXPERIMENTS / "methods.yaml").read_text(encoding="utf-8"))
    nodes = {node["about"].partition("`]")[0].strip("[`"): node for node in named["methods"]}
    nodes |= {node["about"].strip("`"): node for node in named["teachers"]}
    heads = {m.head.replace(SPACE, " "): key for key, m in MEASURES.items()}
    node, checked, seen = {}, 0, []
    for row in table_in(part(page, "methods")):
        name = row[""].partition("`]")[0].strip("[`")
        node = nodes[name] if name else node
        seen += [name] if name else []
        source = node["source"]
        file = EXPERIMENTS / source["study"] / f"{source['table']}.csv"
        if name:
            assert f"experiments/{source['study']}/README.md)" in row["study"]
        wanted = ("student", source["group"]) if "group" in source else ("teacher", None)
        runs = [
            run
            for run in rows_of(file)
            if run["who"] == wanted[0] and wanted[1] in (None, run["group"])
        ]
        if row["pictures"]:
            assert {f"{float(run['images_seen']):,.0f}" for run in runs} == {row["pictures"]}
        for head, key in heads.items():
            if head in row:
                scores = [float(run[key]) for run in runs if run["steps"] == row["steps"]]
                shown, form = numbers(row[head]), MEASURES[key].form
                assert form.format(shown[0]) == form.format(statistics.fmean(scores)), (name, head)
                if "group" in source:
                    assert len(scores) >= 3
                    assert form.format(shown[1]) == form.format(statistics.stdev(scores))
                checked += 1 + ("group" in source)
    assert seen == list(nodes)[len(named["methods"]) :] + list(nodes)[: len(named["methods"])]
    return checked


@names(OVERVIEWS)
def test_every_number_of_the_table_of_methods_is_in_the_file_of_its_study(folder):
    assert check_methods(folder) >= 9 * 3


def test_a_number_that_is_typed_into_the_table_of_methods_is_found(tmp_path):
    text = OVERVIEWS[0].read_text(encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(text.replace("94.2%", "95.2%"), encoding="utf-8")
    with pytest.raises(AssertionError):
        check_methods(page)


def test_tables_and_picture_of_all_methods_are_those_that_the_studies_make(tmp_path):
    """Also: what nothing has changed is not written anew."""
    copied = shutil.copytree(EXPERIMENTS, tmp_path / "experiments")
    (tmp_path / "docs" / "understand").mkdir(parents=True)
    pages = {tmp_path / page.relative_to(ROOT): page for page in OVERVIEWS}
    for copy, page in pages.items():
        shutil.copy(page, copy)
    grid = copied / "methods_on_shapes" / "grid.png"
    before = grid.stat().st_mtime_ns
    write_methods(copied)
    assert all(copy.read_bytes() == page.read_bytes() for copy, page in pages.items())
    assert grid.stat().st_mtime_ns == before
    grid.unlink()
    write_methods(copied)
    assert grid.read_bytes() == (EXPERIMENTS / "methods_on_shapes" / "grid.png").read_bytes()


@names(STUDIES)
def test_the_verdicts_of_a_page_are_those_of_the_rule(folder):
    """`holds` and `does not` need three seeds and an interval without zero."""
    claims, rows = read_study(folder).claims, rows_of(folder / "claims.csv")
    assert [claim.tested for claim in claims] == [row["tested"] for row in rows]
    shown = table_in(part(folder / "README.md", "claims"))
    overview = part(EXPERIMENTS / "README.md", "claims")
    assert len(shown) == len(rows)
    for claim, row, made in zip(claims, rows, shown, strict=True):
        assert row["claim"] == claim.claim == made["claim"]
        assert made["verdict"].strip("*") == row["verdict"]
        if row["low"]:
            low, high = float(row["low"]), float(row["high"])
            decided = low * high > 0 and min(map(int, row["seeds"].split(" and "))) >= 3
            agrees = (float(row["difference"]) > 0) == (claim.sign > 0)
            expected = ("holds" if agrees else "does not") if decided else "open"
            assert row["verdict"].partition(":")[0] == expected
            form = MEASURES[claim.measure].form
            value, _, *ends = numbers(made["difference [95 %]"])
            for text, key in zip((value, *ends), ("difference", "low", "high"), strict=True):
                assert form.format(text) == form.format(float(row[key]))
        else:
            assert row["verdict"].startswith("open")
        line = f"| {made['claim']} | {made['the paper']} | {made['tested here']} |"
        assert f"[{folder.name}]({folder.name}/README.md) {line}" in overview


def test_thirty_claims_at_least_have_three_seeds_and_an_interval():
    rows = [row for folder in STUDIES for row in rows_of(folder / "claims.csv")]
    seeds = [min(map(int, row["seeds"].split(" and "))) for row in rows if row["low"]]
    assert sum(count >= 3 for count in seeds) >= 30


@names(STUDIES)
def test_the_jobs_of_a_study_compose(folder, tmp_path):
    study = read_study(folder)
    assert len(study.seeds) >= 3
    compose_all(Queue(study, tmp_path).runs)


# -- verdicts --------------------------------------------------------------------------------------

STUDY = {
    "jobs": {"a": [], "b": ["seed=1"]},
    "claims": [{"claim": "a is better", "a": "a", "b": "b", "measure": "prompt_accuracy"}],
}


@pytest.fixture
def study(tmp_path):
    """Write a study, with what is given changed, and the scores of its jobs; returns it read."""

    def write(scores=(), **changed):
        folder = tmp_path / "study"
        folder.mkdir(exist_ok=True)
        text = yaml.safe_dump({**STUDY, **changed})
        (folder / "study.yaml").write_text(text, encoding="utf-8")
        found = read_study(folder)
        if scores:
            columns = ["group", "run", "seed", "train_seconds", "images_seen", "who", "steps"]
            lines = [",".join([*columns, *MEASURES])]
            for group, values in scores.items():
                for seed, value in enumerate(values):
                    cells = [value if key == "prompt_accuracy" else "" for key in MEASURES]
                    row = [group, f"{group}_{seed}", seed, 1.0, 16, "student", 1, *cells]
                    lines.append(",".join(map(str, row)))
            (folder / "results.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
        return found

    return write


@pytest.mark.parametrize(
    ("a", "b", "sign", "expected"),
    [
        ([0.8, 0.81, 0.82], [0.6, 0.61, 0.62], "+", "holds"),
        ([0.8, 0.81, 0.82], [0.6, 0.61, 0.62], "-", "does not"),
        ([0.8, 0.81], [0.6, 0.61], "+", "open: fewer than 3 seeds"),
        ([0.8, 0.7, 0.6], [0.6, 0.61, 0.65], "+", "open: no difference shown"),
        ([0.8], [0.6, 0.61, 0.62], "+", "open: no interval"),
        ([0.8, 0.81, 0.82], [], "+", NOT_RUN),
    ],
)
def test_a_verdict_needs_three_seeds_and_an_interval_without_zero(study, a, b, sign, expected):
    found = study({"a": a, "b": b}, claims=[{**STUDY["claims"][0], "sign": sign}])
    lines = recorded_lines(found.folder / "results.csv")
    assert verdict(found.claims[0], lines).text.startswith(expected)


@pytest.mark.parametrize("changed", [{"steps": 4}, {"measure": "frechet"}])
def test_a_claim_on_what_its_runs_do_not_have_is_said_to_be_not_measured(study, changed):
    scores = {"a": [0.8, 0.81, 0.82], "b": [0.6, 0.61, 0.62]}
    found = study(scores, claims=[{**STUDY["claims"][0], **changed}])
    lines = recorded_lines(found.folder / "results.csv")
    assert verdict(found.claims[0], lines).text == "open: not measured"


def test_a_page_without_runs_is_made_from_the_files_and_stays_when_they_are_gone(study, tmp_path):
    found = study({"a": [0.8, 0.81, 0.82], "b": [0.6, 0.61, 0.62]})
    page, overview = found.folder / "README.md", tmp_path / "README.md"
    page.write_text("# Study\n\nBefore.\n", encoding="utf-8")
    overview.write_text("# All\n", encoding="utf-8")
    write_results(found, None, overview)
    assert check_numbers(found.folder) == 2 * 4
    first = page.read_text(encoding="utf-8")
    assert first.startswith("# Study\n\nBefore.\n")
    assert "**holds**" in first
    assert "[study](study/README.md) | a is better |" in overview.read_text(encoding="utf-8")
    (found.folder / "results.csv").unlink()
    write_results(found, tmp_path / "no_runs", overview)
    assert page.read_text(encoding="utf-8") == first


def test_a_number_that_is_typed_into_a_page_is_found(study, tmp_path):
    found = study({"a": [0.8, 0.81, 0.82], "b": [0.6, 0.61, 0.62]})
    write_results(found, None, tmp_path / "README.md")
    page = found.folder / "README.md"
    page.write_text(page.read_text(encoding="utf-8").replace("81.0%", "91.0%"), encoding="utf-8")
    with pytest.raises(AssertionError):
        check_numbers(found.folder)


def test_a_part_without_its_end_is_a_mistake(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- made by experiments/run.py: x -->\nmy text\n", encoding="utf-8")
    with pytest.raises(StudyError, match="has no `<!-- end -->`"):
        replace_parts(page, {"x": "new"})
    assert "my text" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"job": {}}, "job: no such key"),
        ({"jobs": {}}, "jobs: has none"),
        ({"jobs": {"a": "seed=1"}}, "jobs.a: must be a list"),
        ({"jobs": {"teacher": []}}, "this name means the teacher"),
        ({"tables": {"results": {"jobs": ["x"]}}}, "there is no job x"),
        ({"tables": {"results": {"measures": ["x"]}}}, "x: no such measure"),
        ({"claims": [{"claim": "c", "a": "a", "b": "b"}]}, "measure is missing"),
        ({"claims": [{**STUDY["claims"][0], "b": "x"}]}, "b=x: there is no such job"),
        ({"claims": [{**STUDY["claims"][0], "sign": 1}]}, "sign is + or -"),
        ({"claims": [{**STUDY["claims"][0], "times": "x"}]}, "times=x: must be a number above 0"),
        ({"seeds": [0, 1, 1]}, "seeds: has a number twice"),
        ({"seeds": 3}, "seeds: must be a list of whole numbers"),
        ({"overrides": "method=ladd"}, "overrides: must be a list of overrides"),
        ({"jobs": {"../a": []}}, "jobs.../a: give a name of letters"),
        ({"budget": {"minutes": 0}}, "budget.minutes=0: must be a number above 0"),
        ({"prepare": [{"run": "x"}]}, "prepare: makes is missing"),
    ],
)
def test_a_mistake_of_a_study_is_one_sentence(study, changed, what):
    with pytest.raises(StudyError) as raised:
        study(**changed)
    assert what in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_job_that_is_there_twice_is_a_mistake(study):
    folder = study().folder
    (folder / "study.yaml").write_text("jobs:\n  a: []\n  a: [seed=1]\n", encoding="utf-8")
    with pytest.raises(StudyError, match="duplicate key a"):
        read_study(folder)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def ran(tmp_path):
    """Write the folder of a run that has this share of right prompts; returns the folder of all."""
    out = tmp_path / "out"

    def write(study, job, seed, right, status="finished", prompts=4):
        (job,) = [each for each in study.jobs if each.name == job]
        run = Run(study, job, seed, out)
        run.folder.mkdir(parents=True)
        outcomes = " ".join("1" * round(right * prompts) + "0" * round((1 - right) * prompts))
        row = {"who": "student", "steps": 1, "prompt_accuracy": right, "outcomes": {}}
        row["outcomes"] = {"prompt_accuracy": outcomes}
        evaluation = {"protocol": {"prompts": prompts}, "rows": [row]}
        facts = {"status": status, "overrides": run.overrides, "train_seconds": 1.0}
        facts["images_seen"] = 16
        for name, content in (("evaluation.json", evaluation), ("run.json", facts)):
            (run.folder / name).write_text(json.dumps(content), encoding="utf-8")
        (run.folder / "config.yaml").write_text(f"seed: {seed}\n", encoding="utf-8")
        return out

    return write


def shown_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Job -> its seeds and share of right prompts in the table of a page."""
    rows = table_in(part(folder / "README.md", "results"))
    return {row[""]: (row["seeds"], row["Prompts right ↑"].partition(" ")[0]) for row in rows}


def test_what_is_recorded_of_other_jobs_stays_beside_new_runs(study, ran, tmp_path):
    """As on another machine, which has only the runs of one job. A job is not replaced by fewer
    seeds either.
    """
    found = study({"a": [0.8, 0.81, 0.82], "b": [0.6, 0.61]})
    (found.folder / "results.png").write_bytes(b"of all jobs")
    out = ran(found, "a", 0, 0.25)
    for seed in (0, 1, 2):
        ran(found, "b", seed, 0.75)
    write_results(found, out, tmp_path / "README.md", partial=True)
    assert shown_in(found.folder) == {"a": ("3", "81.0%"), "b": ("3", "75.0%")}
    assert [row["run"] for row in rows_of(found.folder / "results.csv")] == [
        *("a_0", "a_1", "a_2"),
        *("seed_0", "seed_1", "seed_2"),
    ]
    check_numbers(found.folder)
    (claim,) = rows_of(found.folder / "claims.csv")
    assert (claim["over"], claim["verdict"]) == ("3 and 3 seeds", "holds")
    assert float(claim["difference"]) == pytest.approx(0.06)
    assert (found.folder / "results.png").read_bytes() == b"of all jobs"


def test_a_run_that_is_not_finished_is_not_in_the_page(study, ran, tmp_path):
    """Also one that was evaluated by hand in the middle of its training."""
    found = study()
    for seed in (0, 1):
        ran(found, "a", seed, 0.75)
    out = ran(found, "a", 2, 0.0, status="interrupted")
    write_results(found, out, tmp_path / "README.md", partial=True)
    assert shown_in(found.folder) == {"a": ("2", "75.0%")}


def test_seeds_of_a_job_that_were_evaluated_on_other_prompts_are_not_mixed(study, ran, tmp_path):
    found = study()
    ran(found, "a", 0, 0.75)
    out = ran(found, "a", 1, 0.75, prompts=8)
    with pytest.raises(StudyError, match="seed_1: was evaluated by another protocol"):
        write_results(found, out, tmp_path / "README.md", partial=True)
    assert not (found.folder / "results.csv").exists()


def test_a_page_says_of_how_many_seeds_a_measure_is(study, tmp_path):
    """A run that has diverged has no distance."""
    found = study({"a": [0.8, "", 0.82], "b": [0.6, 0.61, 0.62]})
    text = (found.folder / "results.csv").read_text(encoding="utf-8")
    columns = text.splitlines()[0].split(",")
    place, rows = columns.index("frechet"), [line.split(",") for line in text.splitlines()[1:]]
    for row in rows:
        row[place] = "400.0"
    lines = [columns, *rows]
    (found.folder / "results.csv").write_text(
        "".join(",".join(line) + "\n" for line in lines), encoding="utf-8"
    )
    write_results(found, None, tmp_path / "README.md")
    (row, _) = table_in(part(found.folder / "README.md", "results"))
    assert row["seeds"] == "3"
    assert row["Prompts right ↑"].endswith(" (2 of 3 seeds)")
    check_numbers(found.folder)
    assert "open: fewer than 3 seeds" in part(found.folder / "README.md", "claims")


def test_other_settings_of_a_job_that_is_not_chosen_are_a_mistake_too(study, ran):
    """Its numbers would go into the page."""
    out = ran(study(), "b", 0, 0.5)
    changed = study(jobs={"a": [], "b": ["method.renoise.m=2"]})
    with pytest.raises(StudyError, match="was run with other settings"):
        main([str(changed.folder), f"out={out}", "only=a"])


def test_a_run_without_its_evaluation_is_not_thrown_away(study, ran):
    found = study(jobs={"a": []}, claims=[])
    out = ran(found, "a", 0, 0.5)
    (out / "a" / "seed_0" / "evaluation.json").unlink()
    with pytest.raises(StudyError, match="seed_0: has lost its evaluation.json; evaluate it"):
        main([str(found.folder), f"out={out}"])
    assert (out / "a" / "seed_0" / "run.json").is_file()


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_numbers_of_the_others_in_the_page(study, ran):
    found = study(seeds=[0])
    out = ran(found, "a", 0, 0.75)
    (out / "b").mkdir()
    (out / "b" / "seed_0").write_text("a file instead of a folder", encoding="utf-8")
    done = called(str(found.folder), f"out={out}", "page=partial")
    assert done.returncode == 1
    assert f"1 of 2 runs failed; see {out / 'b' / 'seed_0.log'}" in done.stderr
    assert shown_in(found.folder) == {"a": ("1", "75.0%")}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_was_being_prepared_when_it_was_cut_off_is_prepared_again(study, tmp_path):
    script = tmp_path / "prepare.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "first = not out.exists()\n"
        "out.mkdir(exist_ok=True)\n"
        "time.sleep(60 * first)\n"
        "(out / 'whole').touch()\n",
        encoding="utf-8",
    )
    step = {"run": f"python {script} {{out}}/data", "makes": "{out}/data"}
    found = study(seeds=[0], jobs={"a": []}, claims=[], prepare=[step])
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "seed_0").write_text("so that the run fails at once", encoding="utf-8")
    words = [sys.executable, str(RUN), str(found.folder), f"out={out}"]
    runner = subprocess.Popen(words)
    end = time.monotonic() + 120
    while not (out / "data").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    runner.send_signal(signal.SIGINT)
    assert runner.wait(timeout=30) == 3
    assert not (out / "data" / "whole").exists()
    assert "preparing" in called(*words[2:]).stdout
    assert (out / "data" / "whole").exists()
    assert "preparing" not in called(*words[2:]).stdout


# -- running ---------------------------------------------------------------------------------------

TINY = {
    "seeds": [0, 1],
    "overrides": [
        "method=ladd",
        "teacher=shapes_small",
        "data.batch_size=4",
        "data.limit=32",
        "loop.head_start=0",
        "trainer.accelerator=cpu",
        "callbacks.checkpoint.every=2",
    ],
    "evaluation": [
        "metrics.prompts=16",
        "metrics.student_steps=[1]",
        "callbacks.scores.every=8",
        "callbacks.scores.prompts=8",
    ],
    "teacher_steps": [1],
    "budget": {"steps": 16},
    "jobs": {"ladd": []},
    "claims": [
        {
            "claim": "one step is nearer",
            "a": "ladd",
            "b": "teacher",
            "measure": "frechet",
            "sign": "-",
        }
    ],
}


def called(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(RUN), *words], capture_output=True, text=True, encoding="utf-8"
    )


def test_a_job_that_does_not_compose_stops_the_study_before_its_first_run(study, tmp_path):
    found = study(jobs={"good": [], "bad": ["method.no_such_key=1"]}, claims=[])
    out = tmp_path / "out"
    done = called(str(found.folder), f"out={out}")
    assert done.returncode == 1
    assert done.stderr.startswith("run.py: job bad: method.no_such_key: no such key")
    assert done.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("worker=2", "worker=2: no such option"),
        ("workers=0", "workers=0: must be a whole number above 0"),
        ("page=all", "page=all: must be one of complete"),
        ("list=yes", "list=yes: must be one of true, false"),  # and not a study that begins
        ("only=x", "only=x: there is no job x"),
    ],
)
def test_an_option_that_is_wrong_is_one_sentence(study, word, what):
    with pytest.raises(StudyError, match=what):
        main([str(study().folder), word])


def test_a_misspelt_study_and_a_question_for_help_are_answered(capsys):
    with pytest.raises(StudyError, match=r"ad_shapes: there is no such study \(did you mean add_"):
        main(["ad_shapes"])
    with pytest.raises(StudyError, match="give a study: add_ablations, "):
        main([])
    assert main(["-h"]) == 0
    assert "Studies: add_ablations, " in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_study_that_is_killed_goes_on_and_writes_its_page(study, tmp_path):
    found = study(**TINY)
    out, page = tmp_path / "out", found.folder / "README.md"
    page.write_text("# Tiny\n", encoding="utf-8")
    words = [sys.executable, str(RUN), str(found.folder), "workers=1", f"out={out}"]
    first = out / "ladd" / "seed_0"
    runner = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not any((first / "checkpoints").glob("*.ckpt")):
        assert time.monotonic() < end, "the first run has no checkpoint"
        assert runner.poll() is None
        time.sleep(0.1)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert not (first / "evaluation.json").exists()
    again = called(*words[2:])
    assert again.returncode == 0, again.stderr
    assert f"resume={first}" in again.stdout
    assert json.loads((first / "run.json").read_text(encoding="utf-8"))["resumed"]
    rows = rows_of(found.folder / "results.csv")
    assert {(row["who"], row["seed"]) for row in rows} == {
        ("teacher", "0"),
        ("student", "0"),
        ("student", "1"),
    }
    steps = [row["step"] for row in rows_of(first / "scores.csv")]
    assert steps == ["0", "8", "16"]  # no row twice, none lost
    assert check_numbers(found.folder) > 10
    text = page.read_text(encoding="utf-8")
    assert "open: fewer than 3 seeds" in text
    for name in ("results.png", "results_curves.svg"):
        assert f"({name})" in text
        assert (found.folder / name).stat().st_size > 1000
    drawn = (found.folder / "results_curves.svg").read_text(encoding="utf-8")
    assert "mathdefault" not in drawn  # no source of a formula
    # A third call trains nothing, and makes the same page.
    before = (first / "run.json").stat().st_mtime_ns
    third = called(*words[2:])
    assert "0 of 2 runs to do" in third.stdout
    assert (first / "run.json").stat().st_mtime_ns == before
    assert page.read_text(encoding="utf-8") == text
    # Other settings are no going on.
    changed = study(**{**TINY, "budget": {"steps": 20}})
    refused = called(str(changed.folder), f"out={out}")
    assert refused.returncode == 1
    assert "was run with other settings" in refused.stderr


@pytest.mark.slow
def test_all_heads_of_a_pool_are_asked_for_overfitting(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "nitrofusion_ablations")
    import overfitting

    for name, value in {"TRAINED": 16, "ASKED": 8, "EVERY": 1}.items():
        monkeypatch.setattr(overfitting, name, value)
    few = ["data.batch_size=4", "loop.head_start=1", "trainer.max_steps=1", "seed=0"]
    words = [str(tmp_path / "out.csv"), *few, "trainer.accelerator=cpu"]
    monkeypatch.setattr(sys, "argv", ["overfitting.py", *words])
    overfitting.main()
    rows = rows_of(tmp_path / "out.csv")
    assert [row["step"] for row in rows] == ["0", "1"]
    for row in rows:
        gap = float(row["seen"]) - float(row["held_out"])
        assert float(row["seen - held_out"]) == pytest.approx(gap)
        assert row["seen"] != row["held_out"] != row["fake"]
