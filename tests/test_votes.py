"""Blind votes: the page of `compare votes=true`, and its file given back as `votes=votes.json`."""

from __future__ import annotations

import csv
import json
import re
import shutil

import pytest
import torch
import yaml
from torchvision.utils import save_image

from distill.evaluation.results import captions_digest
from distill.report.blind import KEY, PAGE, ballot
from distill.report.people import people
from distill.report.runs import grouped, read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
HOSTILE = "<b>\"&'</script><script>alert(1)</script>"
CAPTIONS = [HOSTILE, "a cat", "a dog", "a bird"]
METHODS = {"aladd": "distill.methods.ladd.LADD", "zadd": "distill.methods.add.ADD"}


@pytest.fixture
def run(tmp_path):
    """Write a run that was evaluated on prompts, whose student drew one grey: its folder."""

    def write(name, grey, captions=CAPTIONS, steps=(1, 4), kept=True, categories=None):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        method = {"_target_": METHODS[name]}
        config = yaml.safe_dump({"seed": 0, "method": method})
        (folder / "config.yaml").write_text(config, encoding="utf-8")
        facts = {"method": METHODS[name].rpartition(".")[2]}
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        rows = [{"who": "student", "steps": n, "clip_score": grey} for n in steps]
        rows = [{**row, "categories": categories} if categories else row for row in rows]
        protocol = {"data": f"x, {captions_digest(captions)}", "prompts": len(captions)}
        text = json.dumps({"protocol": protocol, "rows": rows})
        (folder / "evaluation.json").write_text(text, encoding="utf-8")
        for n in steps if kept else ():
            images = folder / "evaluation" / f"student-{n}-0123abcd"
            images.mkdir(parents=True)
            (images / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
            for i in range(len(captions)):
                save_image(torch.full((3, 8, 8), grey), images / f"{i:06d}.png")
        return folder

    return write


@pytest.fixture
def two(run):
    return [run("aladd", 0.2), run("zadd", 0.8)]


@pytest.fixture
def compare(command, tmp_path):
    """Run the command on all runs of the test -> (exit code, out, err)."""
    return lambda *keys: command(
        "compare", f"runs={tmp_path}/runs", f"out={tmp_path / 'out'}", *keys
    )


@pytest.fixture
def groups(two):
    return grouped([read_run(folder) for folder in two])


@pytest.fixture
def asked(groups, tmp_path):
    """The folder with the page of two runs and its key, without the rest of the command."""
    out = tmp_path / "out"
    out.mkdir()
    for name, text in zip((PAGE, KEY), ballot(groups, seed=0), strict=True):
        (out / name).write_text(text, encoding="utf-8")
    return out


def key_of(out):
    return json.loads((out / "votes_key.json").read_text(encoding="utf-8"))


def voted(out, name, choice):
    """A file with the vote of `choice(prompt, model on the left)` on every prompt."""
    key = key_of(out)
    votes = [{"prompt": int(p), "vote": choice(int(p), left)} for p, left in key["left"].items()]
    file = out.parent / name
    file.write_text(json.dumps({"page": key["page"], "votes": votes}), encoding="utf-8")
    return file


def for_first(_, left):
    return "right" if left else "left"


def test_the_page_holds_every_pair_and_no_names(two, compare, tmp_path):
    asked = tmp_path / "out"
    code, printed, err = compare("votes=true")
    assert code == 0, err
    assert "votes_key.json, to keep back" in printed
    page = (asked / "votes.html").read_text(encoding="utf-8")
    assert re.findall(r'data-prompt="(\d+)"', page) == list(key_of(asked)["left"])
    assert sorted(key_of(asked)["left"]) == ["0", "1", "2", "3"]
    assert page.count("<img src=") == 8
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]+"', page)  # nothing is fetched
    bare = re.sub(r"base64,[^\"]+", "", page).lower()
    assert not re.search(r"l?add\b|runs|student", bare)
    assert "alert" in bare
    assert "<script>alert" not in bare
    assert "<b>" not in bare
    comparison = (asked / "compare.html").read_text(encoding="utf-8")
    assert 'href="votes.html"' in comparison


def test_a_seed_gives_one_page_and_each_model_is_left_as_often(groups):
    page, key = ballot(groups, seed=0)
    assert sorted(json.loads(key)["left"].values()) == [0, 0, 1, 1]
    assert ballot(groups, seed=0) == (page, key)
    assert ballot(groups, seed=1)[0] != page


def test_the_key_says_whose_picture_is_left(asked):
    page = (asked / "votes.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section class="pair".*?</section>', page, re.DOTALL)
    lefts = [re.search(r'src="([^"]+)"[^>]*alt="left"', section)[1] for section in sections]
    sides = list(key_of(asked)["left"].values())
    assert len(set(lefts)) == 2  # one grey of each model
    assert len(set(zip(lefts, sides, strict=True))) == 2


def test_votes_become_win_rates_and_ratings(asked, compare):
    file = voted(asked, "votes.json", lambda p, left: "tie" if p == 3 else for_first(p, left))
    code, printed, err = compare(f"votes={file}")
    assert code == 0, err
    assert "| people | LADD, 1 step | ADD, 1 step | 87.5% |" in printed
    with open(asked / "wins.csv", encoding="utf-8") as table:
        rate, *ratings = csv.DictReader(table)
    assert (rate["judge"], float(rate["value"])) == ("people", 0.875)
    assert float(rate["low"]) <= 0.875 <= float(rate["high"]) <= 1
    found = {row["model"]: float(row["value"]) for row in ratings}
    assert found["LADD, 1 step"] > 1000 > found["ADD, 1 step"]
    assert compare(f"votes={file}")[0] == 0  # its own files are overwritten


@pytest.mark.parametrize("known_to", [2, 1])
def test_votes_have_win_rates_by_category(run, compare, tmp_path, known_to):
    """Of the list that the runs were evaluated on, in every file and on the page; also where one
    run was evaluated before its list had categories.
    """
    categories = {"names": ["Signs", "Animals"], "of": "0 1 1 1"}
    for i, name in enumerate(METHODS):
        run(name, 0.2 + 0.6 * i, categories=categories if i < known_to else None)
    assert compare("votes=true")[0] == 0
    out = tmp_path / "out"
    file = voted(out, "votes.json", lambda p, left: "tie" if p in (0, 3) else for_first(p, left))
    code, printed, err = compare(f"votes={file}")
    assert code == 0, err
    row = "| people | Animals (few) | 3 | LADD, 1 step | ADD, 1 step | 83.3% |"
    assert row in printed
    (verdict,) = json.loads((out / "wins.json").read_text(encoding="utf-8"))["verdicts"]
    found = {entry["category"]: entry for entry in verdict["by_category"]}
    assert list(found) == ["Signs", "Animals"]
    animals = found["Animals"]
    assert (animals["prompts"], animals["few"], animals["over"]) == (3, True, ["prompts"])
    assert animals["value"] == pytest.approx(5 / 6)
    assert animals["low"] < animals["value"] <= animals["high"] <= 1
    assert found["Signs"]["value"] == 0.5
    page = (out / "compare.html").read_text(encoding="utf-8")
    assert "<h3>Win rates</h3>" in page
    shown = page.partition("<h3>Win rates by category</h3>")[2].partition("</table>")[0]
    cells = re.findall(r"<td>([^<]*)</td>", shown)
    assert [cells[k : k + 6] for k in range(0, len(cells), 8)] == [
        ["people", "Signs (few)", "1", "LADD, 1 step", "ADD, 1 step", "50.0%"],
        ["people", "Animals (few)", "3", "LADD, 1 step", "ADD, 1 step", "83.3%"],
    ]


def test_several_people_are_averaged(asked, groups):
    one = voted(asked, "one.json", for_first)
    other = voted(asked, "other.json", lambda p, left: "tie" if p else "left" if left else "right")
    verdict = people([one, other], groups, asked)
    assert verdict.wins[0][2].value == (0.75 * 3 + 0.5) / 4


def test_the_steps_can_be_chosen(groups):
    assert json.loads(ballot(groups, 0, steps=4)[1])["models"] == ["LADD, 4 steps", "ADD, 4 steps"]
    with pytest.raises(ValueError, match=r"votes_steps=2: .*, but at 1, 4; take another"):
        ballot(groups, 0, steps=2)


def test_pictures_of_a_comparison_are_enough(run, compare, tmp_path):
    folders = [run("aladd", 0.2, kept=False), run("zadd", 0.8, kept=False)]
    code, _, err = compare("votes=true")
    assert code == 1
    assert err.count("\n") == 1
    assert "keeps no pictures" in err
    assert not (tmp_path / "out").exists()
    for folder in folders:
        (folder / "samples").mkdir()
        save_image(torch.rand(6, 3, 8, 8), folder / "samples" / "comparison.png", nrow=3)
    page, key = ballot(grouped([read_run(folder) for folder in folders]), seed=0)
    assert sorted(json.loads(key)["left"]) == ["0", "1", "2"]
    assert "<h2>Pair 1</h2>" in page


def test_links_out_of_a_run_and_captions_of_other_prompts_are_not_shown(two):
    images = two[0] / "evaluation" / "student-1-0123abcd"
    secret = two[0].parent / "secret.png"
    (images / "000002.png").rename(secret)
    (images / "000002.png").symlink_to(secret)
    other = two[1] / "evaluation" / "student-1-4567abcd"  # newer, of an evaluation on other prompts
    other.mkdir()
    (other / "captions.json").write_text('["other"]', encoding="utf-8")
    page, key = ballot(grouped([read_run(folder) for folder in two]), seed=0)
    assert sorted(json.loads(key)["left"]) == ["0", "1", "3"]
    assert "<h2>a cat</h2>" in page


def test_a_broken_picture_is_one_sentence(two):
    broken = two[1] / "evaluation" / "student-1-0123abcd" / "000001.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"^{re.escape(str(broken))}: is a picture that cannot"):
        ballot(grouped([read_run(folder) for folder in two]), seed=0)


def test_captions_of_shapes_are_known(run):
    from distill.worlds.shapes.judge import judging_prompts

    folders = [run(name, 0.5, kept=False) for name in METHODS]
    for folder in folders:
        file = folder / "evaluation.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        found["protocol"] = {"prompts": 400, "seed": 0, "feature network": "reader of shapes, 96"}
        file.write_text(json.dumps(found), encoding="utf-8")
        (folder / "samples").mkdir()
        save_image(torch.rand(4, 3, 8, 8), folder / "samples" / "comparison.png", nrow=2)
    page, _ = ballot(grouped([read_run(folder) for folder in folders]), seed=0)
    captions = [prompt.caption for prompt in judging_prompts(2, seed=0)]
    assert sorted(re.findall(r"<h2>(a .*?)</h2>", page)) == sorted(captions)


def test_a_page_is_for_two_models(run, compare):
    run("aladd", 0.2)
    code, _, err = compare("votes=true")
    assert code == 1
    assert "votes=true: a page is for two models, and runs= has 1" in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ('{"page": "PAGE"}', "holds no votes"),
        ('{"page": "PAGE", "votes": [{"prompt": 0, "vote": "up"}]}', "is no vote"),
        ('{"page": "PAGE", "votes": [{"prompt": true, "vote": "tie"}]}', "is no vote"),
        ('{"page": "PAGE", "votes": [{"prompt": 77, "vote": "tie"}]}', "prompt 77, which"),
        ('{"page": "PAGE", "votes": [ONE, ONE]}', "two votes on prompt 0"),
        ('{"page": "other", "votes": [ONE]}', "another page"),
        (" " * (2**20 + 1), "such a file may have 1 MiB"),
    ],
)
def test_other_files_are_one_sentence(text, said, asked, groups):
    page = key_of(asked)["page"]
    text = text.replace("PAGE", page).replace("ONE", '{"prompt": 0, "vote": "tie"}')
    file = asked.parent / "bad.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^votes={re.escape(str(file))}: .*{said}"):
        people([file], groups, asked)


def test_votes_on_other_runs_or_without_the_key_are_refused(asked, two, compare):
    file = voted(asked, "votes.json", for_first)
    two[0].rename(two[0].with_name("other"))
    code, _, err = compare(f"votes={file}")
    assert code == 1
    assert "which runs= has not" in err
    assert err.count("\n") == 1
    assert not (asked / "compare.html").exists()
    assert f"votes={asked}/none.json: No such file" in compare(f"votes={asked}/none.json")[2]
    assert "votes=5: is no file" in compare("votes=5")[2]
    assert "seed=-1: is no number" in compare("votes=true", "seed=-1")[2]
    (asked / KEY).write_text('{"page": "x", "left": 5}', encoding="utf-8")
    assert "is damaged" in compare(f"votes={file}")[2]
    (asked / KEY).unlink()
    assert "votes_key.json: No such file" in compare(f"votes={file}")[2]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_one_votes_by_keys_in_a_browser_and_the_file_is_read(two, compare, tmp_path):
    asked = tmp_path / "out"
    assert compare("votes=true")[0] == 0
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    wrong = []
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto((asked / "compare.html").as_uri())
        page.click("a[href='votes.html']")
        assert page.inner_text("#progress") == "0 of 4"
        assert page.locator(".pair:visible").count() == 1
        assert "add" not in page.inner_text("body").lower()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Backspace")
        for pressed in ("ArrowLeft", "ArrowRight", "ArrowDown"):
            page.keyboard.press(pressed)
        assert page.inner_text("#progress") == "3 of 4"
        page.locator(".pair:visible img[alt=left]").click()
        assert page.locator(".pair:visible").count() == 0
        page.keyboard.press("ArrowLeft")  # after the last pair keys do nothing
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "votes.json")
        browser.close()
    assert not wrong
    found = json.loads((tmp_path / "votes.json").read_text(encoding="utf-8"))
    assert [vote["vote"] for vote in found["votes"]] == ["left", "right", "tie", "left"]
    lefts = list(key_of(asked)["left"].values())
    assert [str(vote["prompt"]) for vote in found["votes"]] == list(key_of(asked)["left"])
    code, printed, err = compare(f"votes={tmp_path / 'votes.json'}")
    assert code == 0, err
    wins = (lefts[0] == 0) + (lefts[1] == 1) + 0.5 + (lefts[3] == 0)
    assert f"| {wins / 4:.1%} |" in printed
