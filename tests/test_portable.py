"""What must hold on every system and in every locale: text is UTF-8, and nothing needs a POSIX
system.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

import eyes
from distill import doctor
from distill.commandline import quoting as texts
from distill.config import compose
from distill.data import source
from distill.evaluation import networks
from distill.storage import atomic as aside
from distill.teachers.loading.reading import is_hub_id
from distill.teachers.loading.weights import local_file

ROOT = Path(__file__).parents[1]
# What `open` is called on that opens no text file.
OTHERS = ("Image", "tarfile", "os", "self")
PROCESSES = ("run", "Popen", "check_output")


def without_encoding(source: str) -> Iterator[int]:
    """The line of each call that reads or writes text in the locale's encoding.

    Calls are known by their names alone. Ruff's PLW1514 knows the types, but only where it can
    infer them, which of `folder / "run.json"` it cannot.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        of, _, name = ast.unparse(node.func).rpartition(".")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in keywords:
            continue
        if name == "open":
            mode = keywords.get("mode") or next(
                iter(node.args[0 if of else 1 :]), ast.Constant("r")
            )
            known = isinstance(
                mode, ast.Constant
            )  # a method of ours that is called open has no mode
            text = of not in OTHERS and known and "b" not in str(mode.value)
        elif name in PROCESSES:
            text = "text" in keywords
        else:
            text = name in ("read_text", "write_text")
        if text:
            yield node.lineno


def test_every_text_file_is_utf8_whatever_the_locale():
    folders = ("src", "benchmarks", "experiments", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(files)
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found, f'add encoding="utf-8": {", ".join(found)}'


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open()", True),
        ("(folder / 'a').open('w')", True),
        ("path.open('rb')", False),
        ("Image.open(file)", False),
        ("(folder / 'a').read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command)", False),
    ],
)
def test_text_without_an_encoding_is_found(source, found):
    assert bool(list(without_encoding(source))) is found


# A locale without UTF-8 that Python does not replace by one with it.
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
HAN = "红色 圆"


def call(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in a process of its own, in this folder; what it prints is bytes."""
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=known, capture_output=True, timeout=600
    )


def small(pipelines, shards) -> list[str]:
    data = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "data.batch_size=2"]
    return ["debug=smoke", *data, "~metrics"]


@pytest.mark.slow
def test_a_run_ends_and_goes_on_where_posix_names_are_missing(pipelines, shards, tmp_path):
    """Imitated on Linux: the names that Windows, macOS or a file system may lack are taken away.

    What such a system does otherwise, and its own branches in libraries, this cannot show.
    """
    script = str(Path(__file__).with_name("bare_system.py"))
    options = ["callbacks.checkpoint.every=1", "callbacks.checkpoint.best=g/adv", "run_dir=run"]
    command = [script, "run", *small(pipelines, shards), *options, "data.num_workers=1"]
    first = call(command, tmp_path)
    assert first.returncode == 0, first.stderr.decode()
    kept = tmp_path / "run" / "checkpoints"
    assert {"best.ckpt", "step_000001.ckpt", "step_000002.ckpt"} == {p.name for p in kept.iterdir()}
    more = call([script, "run", "resume=run", "trainer.max_steps=4"], tmp_path)
    assert more.returncode == 0, more.stderr.decode()
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["steps"] == 4
    said = call([script, "doctor", "teacher.path=shapes:mmdit"], tmp_path)
    assert said.returncode == 0, said.stderr.decode()
    assert "GB of memory" in said.stdout.decode()


def sent(thing: object) -> object:
    """What a process gets that is started afresh, as all are on Windows and macOS: a pickled
    copy.
    """
    return pickle.loads(pickle.dumps(thing))


def test_workers_that_start_afresh_get_the_data(shards, tmp_path):
    (tmp_path / "prompts.txt").write_text(HAN, encoding="utf-8")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "1.png")
    (tmp_path / "photos" / "1.txt").write_text(HAN, encoding="utf-8")
    size = {"batch_size": 1, "buckets": [[64, 64], [64, 32]]}
    for made in (
        source.latents(str(shards), batch_size=1),
        source.prompts(str(tmp_path / "prompts.txt"), batch_size=1),
        source.images(str(tmp_path / "photos"), size=64, **size),
    ):
        loader = made.loader(seed=0)
        assert sent(loader.collate_fn) is loader.collate_fn
        assert sent(made.dataset)[0]["caption"] == made.dataset[0]["caption"]
        assert sent(source.Once(made.dataset))[0][0].keys() == made.dataset[0].keys()


def test_workers_that_start_afresh_prepare_pictures(tmp_path):
    places, picture = eyes.write_all(tmp_path), Image.new("RGB", (48, 32), "red")
    for network in (
        networks.Dinov2(str(places["dinov2"]), size=64),
        networks.Clip(str(places["clip"])),
        networks.OpenClip(f"local-dir:{places['open_clip']}"),
    ):
        network.load()
        worker = sent(network)
        assert worker.model is None
        assert worker.prepare(picture).equal(network.prepare(picture))


def test_a_second_name_needs_no_links(tmp_path, monkeypatch):
    old, new = tmp_path / "step.ckpt", tmp_path / "best.ckpt"
    old.write_bytes(b"new")
    new.write_bytes(b"old")
    aside.duplicate(old, new)
    assert new.samefile(old)
    monkeypatch.delattr(os, "link")
    aside.duplicate(old, new)
    assert not new.samefile(old)
    assert new.read_bytes() == b"new"
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "0.pt").write_bytes(b"part")
    aside.duplicate(tmp_path / "parts", new)
    assert (new / "0.pt").read_bytes() == b"part"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.nightly
def test_commands_work_in_a_locale_without_utf8(tmp_path):
    """Real commands with a name, prompts and files that ASCII cannot say; what they write is
    UTF-8.
    """
    (tmp_path / "prompts.txt").write_text(f"{HAN}\na größe\n", encoding="utf-8")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "größe.png")
    (tmp_path / "photos" / "größe.txt").write_text(HAN, encoding="utf-8")

    def command(name: str, *arguments: str) -> str:
        done = call(["-m", f"distill.{name}", *arguments], tmp_path, **ASCII)
        assert done.returncode == 0, done.stderr.decode()
        assert b"Traceback" not in done.stderr
        assert b"Logging error" not in done.stderr
        return done.stdout.decode("ascii")

    command("run", "debug=smoke", "name=Größe", f"callbacks.samples.prompts=['{HAN}']")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.isascii()
    assert OmegaConf.load(run / "config.yaml").name == "Größe"
    assert (run / "samples" / "captions.txt").read_text(encoding="utf-8") == f"{HAN}\n"
    assert "Größe" in (run / "report.html").read_text(encoding="utf-8")

    printed = command("sample", f"run={run}", f"prompt={HAN}")
    with Image.open(tmp_path / printed.strip()) as picture:
        assert picture.text["prompt"] == HAN
    command("sample", f"run={run}", "prompts=prompts.txt", "out=pictures")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3

    command("evaluate", f"run={run}", "steps=1", "metrics.prompts=16", "metrics.teacher_steps=[1]")
    assert "Gr\\xf6\\xdfe" in command("compare", f"runs=[{run}]", "by_name=true")
    assert "Größe" in (tmp_path / "compare" / "compare.html").read_text(encoding="utf-8")
    command("inspect", f"run={run}")
    pictures = ["data.path=photos", "data.size=64", "data.num_workers=1"]
    command("check", "data=images", *pictures)
    command("cache", *pictures, "out=cached")
    command("synthesize", "prompts=prompts.txt", "steps=1", "out=synthetic")
    command("doctor")
    assert "\\xfc" in command("run", "--cfg", "job", "name=ü")


def test_a_path_that_the_locale_cannot_write_is_refused(tmp_path):
    done = call(["-m", "distill.run", "run_dir=größe"], tmp_path, **ASCII)
    assert done.returncode == 1
    said = done.stderr.decode("ascii")
    assert said.startswith("distill: run_dir=gr\\xf6\\xdfe: this locale, ascii, has no file")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ladd_shapes", "ladd_shapes"),
        ('a: "b" <c>|d?*', "a_b_c_d"),
        ("../../etc", "etc"),
        ("C:\\runs\\first", "C_runs_first"),
        ("Größe", "Größe"),
    ],
)
def test_a_file_is_named_as_every_system_takes_it(text, name):
    assert compose.file_name(text) == name


def test_what_a_name_cannot_hold_is_told_apart(monkeypatch):
    long = ["x" * 300, "x" * 301]
    assert len({compose.file_name(text) for text in long}) == 2
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert compose.file_name("Größe").startswith("Gre_")
    assert compose.file_name("红") != compose.file_name("圆")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_commands_of_make_keep_compiled_bytecode(tmp_path):
    """Also where the environment says not to, as in images of containers: a command would compile
    torch and all else that it imports each time.
    """
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nenv\n", encoding="utf-8")
    python.chmod(0o755)
    (tmp_path / ".setup").touch()
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CANARY": "1"}
    command = ["make", "-s", "run", f"VENV={tmp_path}"]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    lines = said.stdout.decode().splitlines()
    assert "CANARY=1" in lines
    assert not any(line.startswith("PYTHONDONTWRITEBYTECODE") for line in lines)


@pytest.mark.parametrize("path", [r"C:\models\x", r"C:\my models\x(1)", r"\\server\share\x"])
def test_a_windows_path_is_read_as_it_is_typed(path):
    word = texts.for_hydra(f"teacher.path={path}", "config")
    assert OverridesParser.create().parse_override(word).value() == path


@pytest.mark.parametrize("path", ["C:/models", "C:/models/x", r"C:\models\x", "./a/b", "~/a"])
def test_a_path_is_no_hub_id(path):
    assert not is_hub_id(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        local_file(path, "teacher.weights")


def test_what_another_system_lacks_is_said(monkeypatch):
    assert doctor.system()[1].startswith(platform.system())
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    level, what, remedy = doctor.system()
    assert (level, "only tested on Linux" in what) == ("warn", True)
    assert "there is no make" in remedy
