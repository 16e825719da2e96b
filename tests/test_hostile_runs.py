"""Run folders that a stranger has made: what they say is shown as text, and what has no bounds is
left out by name.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import resource
import shutil
import zipfile
from html.parser import HTMLParser

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from distill.config import paths
from distill.demonstration import html as demo_html
from distill.discriminators.images import ImageFeatures as Pictures
from distill.evaluation import networks, results
from distill.evaluation.tables import rows_of
from distill.exporting.card import write_card
from distill.report import write_report
from distill.report.curves import charts
from distill.report.page import figure
from distill.storage import bounded, checkpoint_files
from distill.teachers.families import family_of_kind
from distill.teachers.loading import locate, settings, sizes, weights
from distill.terminal import console, shown
from distill.training import run_folders as folders
from hostile import EVIL, laughs, png

ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]")


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def is_plain(page: str, scripts: int = 0) -> None:
    """That a page has no script but ours, no handler, no address outside, and nothing that acts."""
    tags = Tags(page).found
    assert sum(tag == "script" for tag, _ in tags) == scripts
    for tag, attributes in tags:
        assert tag not in ("iframe", "object", "embed", "base", "form"), tag
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href"):
                assert value.startswith(("data:image/", "data:,")), value
    assert not ACTING.search(page)
    assert "alert(1)" in page  # as text
    assert "<script>alert" not in page


def evil_run(folder, **results):
    """A judged run in which every text is an attack."""
    (folder / "samples").mkdir(parents=True)
    config = {"seed": EVIL, "method": {"_target_": EVIL, EVIL: EVIL}, "teacher": {"path": EVIL}}
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config, allow_unicode=True), encoding="utf-8"
    )
    facts = dict.fromkeys(("name", "method", "teacher", "command", "commit", "hardware"), EVIL)
    facts |= {"status": EVIL, "train_seconds": 60.0, "images_seen": 100, "steps": 3}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    rows = [{"who": who, "steps": n, "fid": 2.0} for who, n in ((EVIL, 1), ("student", 1))]
    said = {"protocol": {EVIL: EVIL}, "rows": [*rows, {"who": "teacher", "steps": 4, "fid": 1}]}
    (folder / "evaluation.json").write_text(json.dumps(said | results), encoding="utf-8")
    columns = f"step,d/accuracy,g/<script>alert(1)</script>$\\frac{{$,g/{EVIL[:6]}"
    (folder / "metrics.csv").write_text(f"{columns}\n1,0.6,1,1\n2,0.7,2,1\n", encoding="utf-8")
    (folder / "alarms.jsonl").write_text(json.dumps({"alarm": EVIL, "step": 3}), encoding="utf-8")
    (folder / "samples" / "captions.txt").write_text(EVIL, encoding="utf-8")
    (folder / "samples" / "comparison.png").write_bytes(png(98, 146))
    return folder


def test_shown_is_one_line_of_text():
    assert shown.shown("a\x1b[2J\nb\u202e\x9b\ud800c") == r"a\x1b[2J\nb\u202e\x9b\ud800c"
    assert shown.shown("Ein Größter 红 👩\u200d🔬 a\\b") == "Ein Größter 红 👩\u200d🔬 a\\b"
    assert shown.in_html("<a href=\"'\n") == "&lt;a href=&quot;&#x27;\\n"
    assert shown.in_markdown("a|b`c`<x> *y* [l](u)") == r"a\|b\`c\`\<x> \*y\* [l\](u)"
    assert shown.in_markdown("head_start=[1, 2]") == "head_start=[1, 2]"
    assert len(shown.shown("x" * 10**6)) == shown.MOST


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "＝1", "=", "-"]
)
def test_a_cell_that_begins_like_a_formula_is_text(text):
    assert shown.in_csv(text) == f"'{text}"


@pytest.mark.parametrize("value", [-1, -0.5, "-1", "+2.5", "-1e-5", None, "", "a=b", "1-2", "[-1]"])
def test_numbers_and_other_text_stay_in_a_cell(value):
    assert shown.in_csv(value) is value or shown.in_csv(value) == value
    assert shown.in_csv("\t=1") == "\\t=1"


def test_the_report_shows_a_strangers_words_as_text(tmp_path):
    is_plain(write_report(evil_run(tmp_path / EVIL.replace("/", ""))).read_text(encoding="utf-8"))


def test_the_comparison_shows_a_strangers_words_as_text(command, tmp_path):
    folders = [evil_run(tmp_path / "runs" / name) for name in ("a", "b\x1b[2J|`<script>alert(1)")]
    config = yaml.safe_load((folders[0] / "config.yaml").read_text(encoding="utf-8"))
    text = yaml.safe_dump(config | {"method": {"_target_": "x.Other", "k": EVIL}})
    (folders[1] / "config.yaml").write_text(text, encoding="utf-8")
    code, out, err = command("compare", f"runs={tmp_path / 'runs'}/*")
    assert code == 0, err
    is_plain((tmp_path / "compare" / "compare.html").read_text(encoding="utf-8"), scripts=1)
    table = (tmp_path / "compare" / "compare.md").read_text(encoding="utf-8")
    for text in (table, out):
        assert not ACTING.search(text)
        assert not re.search(r"(?<!\\)[`<]", text.split("\nwrote")[0])
    for part in table.split("\n\n"):  # the table of means, sentences, that of differences
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in part.splitlines()}) == 1
    assert not ACTING.search((tmp_path / "compare" / "compare.csv").read_text(encoding="utf-8"))


def test_no_cell_of_a_comparison_is_a_formula(command, tmp_path):
    """A run's name and what its files say; numbers stay numbers."""
    for i, name in enumerate(("=cmd()", "@x", "+y", "-z")):
        run = evil_run(tmp_path / "runs" / name)
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        text = yaml.safe_dump(config | {"name": f"={i}", "seed": -1})
        (run / "config.yaml").write_text(text, encoding="utf-8")
    code, _, err = command("compare", f"runs={tmp_path / 'runs'}/*", "by_name=true")
    assert code == 0, err
    table = (tmp_path / "compare" / "compare.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(table.splitlines()))
    assert {row["run"] for row in rows} == {"'=cmd()", "'@x", "'+y", "'-z"}
    assert {row["seed"] for row in rows} == {"-1"}
    for cell in (cell for row in rows for cell in row.values()):
        assert not cell.startswith(("=", "@", "+")), cell


@pytest.mark.parametrize(
    "row",
    [
        {"who": "student", "steps": "<script>alert(1)</script>", "fid": 1.0},
        {"who": "student", "steps": [1], "fid": 1.0},
        {"who": "student", "steps": True, "fid": 1.0},
        {"who": "student", "steps": -1, "fid": 1.0},
        {"who": "student", "steps": 10**400, "fid": 1.0},
        {"who": ["student"], "steps": 1, "fid": 1.0},
        {"steps": 1, "fid": 1.0},
        {"who": "student", "steps": 1, "fid": "inf"},
        {"who": "student", "steps": 1, "fid": [1]},
        {"who": "student", "steps": 1, "fid": 10**400},
        {"who": "student", "steps": 1, "fid": {"a": 1}},
        ["student", 1],
        "student",
    ],
)
def test_rows_that_are_no_results_are_refused(row):
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        rows_of({"rows": [row]})


def test_rows_may_lack_numbers():
    rows = rows_of({"rows": [{"who": "student", "steps": 1, "fid": float("nan"), "kid": None}]})
    assert rows[0].scores == {}


DAMAGED = {
    "config.yaml": [
        laughs(), "a: " + "[" * 5000 + "]" * 5000, "a: &a [*a]", "- 1\n", "x: y: z", b"\xff\xfe",
        "3",
        "!!python/object/apply:os.system ['true']",
    ],
    "evaluation.json": [
        "[" * 100_000, "[]", "3", '{"rows": 3}', '{"rows": [], "protocol": 3}', '{"rows": ',
        b"\xff",
        '{"rows": [{"who": "student", "steps": 1, "fid": ' + "9" * 5000 + "}]}",
        json.dumps({"rows": [{"who": "student", "steps": 1}] * 2000}),
    ],
    "run.json": ["[" * 100_000, "[]", '{"train_seconds": "x"}',
        '{"images_seen": 1' + "0" * 400 + "}"],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_run_is_left_out_by_its_name(name, command, tmp_path):
    evil_run(tmp_path / "runs" / "good")
    for i, text in enumerate(DAMAGED[name]):
        folder = evil_run(tmp_path / "runs" / f"bad{i}")
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name).write_bytes(data)
    code, out, err = command("compare", f"runs={tmp_path / 'runs'}/*")
    assert code == 0, err
    said = [line for line in out.splitlines() if line.startswith("left out")]
    assert len(said) == len(DAMAGED[name])
    for i, line in enumerate(said):
        assert f"/bad{i}/" in line
    assert "1 runs side by side" in (tmp_path / "compare/compare.html").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "runs" / "good")
    code, _, err = command("compare", f"runs={tmp_path / 'runs'}/*")
    assert (code, err.count("\n")) == (1, 1)


@pytest.mark.parametrize("name", ["evaluation.json", "run.json"])
def test_a_report_is_written_of_whatever_a_run_holds(name, tmp_path):
    for i, text in enumerate(DAMAGED[name]):
        folder = evil_run(tmp_path / str(i))
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        alarms = '{"alarm": "x", "step": 1e999}\n' + "[" * 9999
        (folder / "alarms.jsonl").write_text(alarms, encoding="utf-8")
        assert write_report(folder).is_file()


def test_files_of_gibibytes_are_not_read(tmp_path):
    folder = evil_run(tmp_path / "run")
    names = ("evaluation.json", "run.json", "config.yaml", "metrics.csv", "alarms.jsonl")
    for name in names:
        with (folder / name).open("r+b") as file:
            file.truncate(2**33)  # of zeros, which take no room
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in names[:2]:
        with pytest.raises(ValueError, match=f"{name}: has 8 GiB, and such a file may have 16 MiB"):
            bounded.mapping_of(folder / name)
    with pytest.raises(ValueError, match=r"config\.yaml: has 8 GiB"):
        bounded.yaml_of(folder / "config.yaml")
    with pytest.raises(ValueError, match=r"metrics\.csv: has 8 GiB"):
        charts(folder / "metrics.csv")
    (folder / "alarms.jsonl").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert page.count("cannot be shown: ") >= 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB


@pytest.mark.parametrize(
    "command_line", ["inspect run={}", "evaluate run={}", "sample run={} prompt=x"]
)
def test_a_bomb_as_configuration_is_refused_in_a_sentence(
    command_line, command, tmp_path, pipelines
):
    folder = evil_run(tmp_path / "run")
    shutil.copytree(pipelines("mmdit"), folder / "student")
    (folder / "config.yaml").write_text(laughs(), encoding="utf-8")
    name, *words = command_line.format(folder).split()
    code, _, err = command(name, *words)
    assert code == 1
    said = [line for line in err.splitlines() if line.startswith("distill: ")]
    assert len(said) == 1
    assert re.search("config.yaml: holds (more than 100,000 values|an alias)", said[0])
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step_000001.ckpt").touch()
    code, _, err = command("run", f"resume={folder}")
    assert code == 1
    assert re.search("config.yaml: holds (more than 100,000 values|an alias)", err)


def test_ordinary_yaml_is_read_as_before():
    text = "a: &x {b: [1, 2.5, null, 1e-3]}\nc: *x\nd: 'x'\n"
    bounded.check_yaml(text, "x")
    assert yaml.safe_load(io.StringIO(text)) == yaml.safe_load(text)
    bounded.check_yaml("\n".join(f"key{i}: {i}" for i in range(40_000)), "x")


# -- pictures, archives ----------------------------------------------------------------------------


def test_a_page_shows_only_png_within_bounds(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for name, data in (("eps.png", eps), ("large.png", png(20_000, 8_000))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises((OSError, ValueError), match="cannot identify|20000 x 8000 pixels"):
            figure(tmp_path / name, "x")
    (tmp_path / "good.png").write_bytes(png(8, 8))
    assert "&lt;b&gt;" in figure(tmp_path / "good.png", "<b>")


def test_a_checkpoint_that_would_unpack_to_more_is_refused(tmp_path):
    path = tmp_path / "step_000001.ckpt"
    checkpoint_files.write_checkpoint(
        {"distill": {"iteration": 1}, "about": {"config": {}}, "x": torch.zeros(4)}, path
    )
    assert checkpoint_files.read_checkpoint(path)["distill"] == {"iteration": 1}
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    for compression, size in ((zipfile.ZIP_DEFLATED, 2**24), (zipfile.ZIP_STORED, 16)):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in parts.items():
                archive.writestr(name, bytes(size) if name.endswith("data/0") else data)
        if compression == zipfile.ZIP_DEFLATED:
            with pytest.raises(
                ValueError, match="holds compressed parts, which may be of any size"
            ):
                checkpoint_files.read_checkpoint(path)
        else:
            checkpoint_files.read_checkpoint(path)


@pytest.mark.parametrize("kind", ["view", "meta", "sparse"])
def test_tensors_that_their_file_does_not_hold_are_refused(kind, tmp_path):
    """A file of a kilobyte may declare a tensor of terabytes."""
    make = {"view": lambda: torch.ones(1).expand(2**20, 2**20)}
    make["meta"] = lambda: torch.empty(2**40, device="meta")
    place = torch.tensor([[0]])
    make["sparse"] = lambda: torch.sparse_coo_tensor(place, torch.ones(1), (2**40,))
    tensor, file = make[kind](), tmp_path / "step_000001.ckpt"
    torch.save({"a.lora_A.weight": tensor}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"lora\.pt: .*(take 4096 GiB|tensor on)"):
        weights.read_weights(tmp_path / "lora.pt")
    state = {"distill": {"iteration": 1}, "optimizer_states": [{"state": {0: {"a": tensor}}}]}
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"no checkpoint of distill \(.*(take|tensor on)"):
        checkpoint_files.read_checkpoint(file)


# -- a student's card, the demo, the terminal ------------------------------------------------------


def test_a_card_shows_a_strangers_words_as_text(tmp_path):
    run = evil_run(tmp_path / "run")
    folder = run / "student"
    folder.mkdir()
    code = {"guidance_scale": "__import__('os').system('x')", "x);evil(": 1, "height": 8}
    index = {"_class_name": EVIL, "scheduler": [EVIL, EVIL], "_distill": {"call": code}}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    licence = f"---\nlicense: other\nlicense_name: {json.dumps(EVIL)}\n---\n# x\n"
    (folder / "README.md").write_text(licence, encoding="utf-8")
    (run / "samples" / "comparison.png").unlink()
    (run / "samples" / "comparison.png").symlink_to(run / "run.json")
    text = write_card(folder, run).read_text(encoding="utf-8")
    assert not (folder / "comparison.png").exists()  # it is of somebody else
    assert not ACTING.search(text)
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license_name"] == shown.shown(EVIL)
    assert not re.search(r"(?<!\\)<(?!this folder>)", body)
    assert "guidance_scale=\"__import__('os').system('x')\"" in body  # text, if pasted
    assert "evil(" not in body
    assert body.count("```") == 2
    (folder / "README.md").write_text(f"---\n{laughs()}license: *a8\n---\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"README\.md: its metadata holds more than|: holds more"):
        write_card(folder, run)


def test_a_card_names_no_line_of_another_file(tmp_path):
    """A link would put the first line of a private file into a page that is pushed."""
    run = evil_run(tmp_path / "run")
    (tmp_path / "private").write_text("machine x login y password hunter2\n", encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "comparison.png").write_bytes(png(98, 146))
    shutil.rmtree(run / "samples")
    (run / "samples").symlink_to(tmp_path / "pictures")
    (run / "student").mkdir()
    (run / "student" / "LICENSE").symlink_to(tmp_path / "private")
    assert "hunter2" not in write_card(run / "student", run).read_text(encoding="utf-8")
    assert not (run / "student" / "comparison.png").exists()


def test_the_comparison_shows_no_files_behind_links(command, tmp_path, monkeypatch):
    for name in "abc":
        evil_run(tmp_path / "runs" / name)
    private = tmp_path / "private.yaml"
    private.write_text("github.com: {oauth_token: hunter2}", encoding="utf-8")
    (tmp_path / "runs" / "a" / "config.yaml").unlink()
    (tmp_path / "runs" / "a" / "config.yaml").symlink_to(private)
    shown_picture = (tmp_path / "runs" / "b" / "samples").rename(tmp_path / "pictures")
    (tmp_path / "runs" / "b" / "samples").symlink_to(shown_picture)
    code, out, _ = command("compare", "runs=runs/*", "by_name=true")
    assert code == 0
    assert "left out, damaged: runs/a/config.yaml: is a link out of the run's folder" in out
    page = (tmp_path / "compare" / "compare.html").read_text(encoding="utf-8")
    assert "hunter2" not in page
    (tmp_path / "runs" / "c").rename(tmp_path / "c")
    code, _, _ = command("compare", "runs=runs/*")
    page = (tmp_path / "compare" / "compare.html").read_text(encoding="utf-8")
    assert "None of these runs kept its pictures" in page
    monkeypatch.setenv("DISTILL_TRUST_RUN", "runs/b")  # its owner's link
    assert command("compare", "runs=runs/b")[0] == 0
    page = (tmp_path / "compare" / "compare.html").read_text(encoding="utf-8")
    assert "None of these runs kept its pictures" not in page


def test_no_curve_is_drawn_of_a_table_behind_a_link(command, tmp_path):
    run = evil_run(tmp_path / "runs" / "a")
    table = tmp_path / "private.csv"
    table.write_text("step,images_seen,train_seconds,frechet\n0,0,0,9\n1,8,2,7\n", encoding="utf-8")
    (run / "scores.csv").symlink_to(table)
    assert command("compare", "runs=runs/*")[0] == 0
    page = (tmp_path / "compare" / "compare.html").read_text(encoding="utf-8")
    assert "scores.csv: is a link out of the run" in page
    assert "along the run" not in page


def test_the_demo_shows_words_as_text():
    page = demo_html.heading(EVIL, EVIL) + demo_html.refused("student", 1, EVIL)
    page += demo_html.status(EVIL, 1, 0) + demo_html.picture(torch.zeros(3, 8, 8).byte(), EVIL)
    is_plain(page)


def test_a_terminal_and_a_log_get_text(capsys, tmp_path):
    log = logging.getLogger("distill.hostile")
    log.propagate = False  # to handlers of other tests
    with console.record_output():
        handler = logging.StreamHandler()
        log.addHandler(handler)
        console.log_to(tmp_path / "run.log", "x")
        log.warning("skipped %s: %s", EVIL, ValueError(EVIL))
        log.removeHandler(handler)
        print(EVIL)
        console.say(EVIL)
        print("\x1b[31mred\x1b[0m\tand\rover")
    out, err = capsys.readouterr()
    logged = (tmp_path / "run.log").read_text(encoding="utf-8")
    for text in (out, err, logged):
        assert not re.search("\x1b(?!\\[(31|0)m)|[\x07\u202e\x9b]", text)
    assert len([line for line in err.splitlines() if "skipped" in line]) == 1
    assert err.count("\n") == 1
    assert "\x1b[31mred\x1b[0m\tand\rover" in out


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said", "reason"),
    [
        ("x.safetensors.index.json", {"weight_map": {"a": "../../etc/passwd"}}, "files of weights"),
        ("x.safetensors.index.json", {"weight_map": {"a": "/x.safetensors"}}, "files of weights"),
        ("x.safetensors.index.json", {"weight_map": {"a": "..\\x.safetensors"}}, "files of weig"),
        ("x.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "files of weights"),
        ("x.safetensors.index.json", {"weight_map": {"a": "passwd"}}, "files of weights"),
        ("x.safetensors.index.json", {"weight_map": [1]}, "names no weights"),
        ("adapter_config.json", {"base_model_name_or_path": "evil/x"}, "names another model"),
        (
            "config.json",
            {"a": {"attn_implementation": "evil/x"}},
            "is code that would be downloaded",
        ),
        (
            "config.json",
            {"_attn_implementation": {"": "kernels-community/x"}},
            "is code that would",
        ),
        ("config.json", {"num_layers": 10**9}, "num_layers=1000000000, and at most 1000 are built"),
        ("config.json", {"num_hidden_layers": 10**9}, "at most 1000 are built"),
        ("config.json", {"layers_per_block": [2, 10**9]}, "at most 1000 are built"),
        ("config.json", [], "is no JSON object"),
        ("config.json", None, "is nested too deeply"),
    ],
)
def test_a_hostile_model_folder_is_refused_before_it_is_built(
    name, said, reason, command, pipelines, tmp_path
):
    folder = shutil.copytree(pipelines("mmdit"), tmp_path / "copy")
    text = json.dumps(said) if said is not None else "[" * 100_000
    (folder / "transformer" / name).write_text(text, encoding="utf-8")
    code, _, err = command("sample", f"run={folder}", "prompt=x", "guidance=4")
    assert code == 1
    said = [line for line in err.splitlines() if line.startswith("distill: ")]
    assert len(said) == 1
    assert name in said[0]
    assert reason in said[0]


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "{", '{"a": ' + "9" * 5000 + "}"])
def test_a_hostile_index_of_a_pipeline_is_refused_in_a_sentence(text, command, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text(text, encoding="utf-8")
    for words in (
        ["sample", "run=model", "prompt=x", "guidance=4"],
        ["export", "run=model", "to=diffusers"],
    ):
        code, _, err = command(*words)
        assert (code, err.count("\n")) == (1, 1)
        assert "model_index.json" in err


@pytest.mark.parametrize("name", ["../evil", "../../evil", "/etc", "a/b", "a\\b", "x\x1b[2J", "."])
def test_a_part_of_a_strangers_pipeline_stays_in_its_folder(name, command, pipelines, tmp_path):
    folder = shutil.copytree(pipelines("mmdit"), tmp_path / "in" / "model")
    for place in (tmp_path / "in" / "evil", tmp_path / "evil"):
        place.mkdir()
        (place / "secret.json").write_text("{}", encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index[name] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "er" / "out"
    for words in (["to=diffusers", f"out={out}"], ["to=single_file"]):
        code, _, err = command("export", f"run={folder}", *words)
        assert (code, err.count("\n")) == (1, 1)
        assert "model_index.json names a part" in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("length", [2**62, 2**45, 2**63 + 1, 10])
def test_a_header_of_safetensors_is_not_believed(length, tmp_path):
    shapes = json.dumps({"x": {"shape": [10**300, 10**300]}}).encode()
    data = (length if length > 10 else len(shapes)).to_bytes(8, "little") + shapes
    (tmp_path / "model.safetensors").write_bytes(data)
    assert sizes.parameters(tmp_path) == 0


NUMBERS = [
    *(("text_encoder", "eos_token_id", value) for value in (10**20, "x", [1, 10**20], -7)),
    *(("transformer", "sample_size", value) for value in (10**9, -1, "x", [16, 10**9])),
    *(("vae", "scaling_factor", value) for value in ("x", 0, 10**400, True)),
    *(("vae", "shift_factor", value) for value in ("x", float("nan"), [1])),
    *(("tokenizer", "model_max_length", value) for value in (10**30, -1, "x", 1, 2.5)),
    ("tokenizer_2", "model_max_length", 10**30),
    *(("scheduler", "num_train_timesteps", value) for value in (10**10, 0, "x", [1])),
]


@pytest.mark.parametrize(("part", "key", "value"), NUMBERS)
def test_numbers_of_a_model_that_are_none_are_said_in_a_sentence(
    part, key, value, command, pipelines, tmp_path
):
    folder = shutil.copytree(pipelines("mmdit"), tmp_path / "copy")
    kind = part.partition("_")[0]
    name = f"{kind}_config.json" if kind in ("tokenizer", "scheduler") else "config.json"
    said = json.loads((folder / part / name).read_text(encoding="utf-8"))
    (folder / part / name).write_text(json.dumps(said | {key: value}), encoding="utf-8")
    code, _, err = command("sample", f"run={folder}", "prompt=x", "guidance=4")
    assert code == 1
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("distill: ")]
    assert f"run={folder}: " in line
    assert f"{key}=" in line
    assert "; " in line


def test_ordinary_numbers_are_read_as_before(pipelines, tmp_path):
    ordinary = {"eos_token_id": [1, 107], "pad_token_id": -1, "bos_token_id": None}
    ordinary |= {"sample_size": [128, 96], "scaling_factor": 0.18215, "shift_factor": None}
    ordinary |= {"latents_mean": [0.1, -0.2], "_attn_implementation": "sdpa"}
    (tmp_path / "config.json").write_text(json.dumps(ordinary), encoding="utf-8")
    # of a tokenizer that is told a length at each call; the number is transformers' own for none
    long = {"model_max_length": 1000000000000000019884624838656}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(long), encoding="utf-8")
    locate.check_part(tmp_path, "x")
    sana = family_of_kind("SanaPipeline")
    settings.check_settings(sana, lambda part: long if part == "tokenizer" else {}, "x")


@pytest.mark.parametrize("value", ["x", ["x"], [True]])
def test_mean_and_spread_of_latents_are_numbers(value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"latents_mean": value}), encoding="utf-8")
    with pytest.raises(ValueError, match="latents_mean=.*must be a list of numbers; fetch it anew"):
        locate.check_part(tmp_path, "x")


def test_a_network_of_pictures_names_no_other_model(tmp_path):
    said = json.dumps({"base_model_name_or_path": "evil/x"})
    (tmp_path / "adapter_config.json").write_text(said, encoding="utf-8")
    where = rf"discriminator\.features\.path={tmp_path}: .*base_model_name_or_path=evil/x names ano"
    with pytest.raises(ValueError, match=where):
        Pictures(str(tmp_path))
    with pytest.raises(ValueError, match="metrics: .*names another model"):
        networks.load_complete(None, str(tmp_path))


def test_adapters_above_the_parts_name_no_other_model(command, pipelines, tmp_path):
    folder = shutil.copytree(pipelines("mmdit"), tmp_path / "copy")
    said = json.dumps({"base_model_name_or_path": "evil/x"})
    (folder / "adapter_config.json").write_text(said, encoding="utf-8")
    code, _, err = command("sample", f"run={folder}", "prompt=x", "guidance=4")
    assert code == 1
    assert "base_model_name_or_path=evil/x names another model" in err


def test_settings_of_real_models_are_within_bounds(pipelines):
    for family in ("mmdit", "unet"):
        for part in pipelines(family).iterdir():
            if part.is_dir():
                locate.check_part(part, "x")


def test_deep_json_in_a_run_folder_counts_as_damaged(tmp_path):
    """Everything that a folder's own files are read by: Python would end in a RecursionError."""
    folder = evil_run(tmp_path / "run")
    for name in ("run.json", "evaluation.json"):
        (folder / name).write_text("[" * 100_000, encoding="utf-8")
    assert not folders.untouched(folder)
    assert results.read_evaluation(folder) == {}
    assert paths.relocated(OmegaConf.create({"a": 1}), folder) == {"a": 1}
