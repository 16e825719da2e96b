"""Texts reach a command as they were typed, and a group is left out by any word for nothing."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tarfile

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf
from PIL import Image

import distill.demo
import tiny
from distill.commandline import quoting as texts
from distill.config import compose
from distill.config.compose import to_yaml
from distill.data.lines import Lines
from test_sample import EXACT, exported  # noqa: F401  # a fixture

PROMPTS = [
    "[a, b]", "costs ${5}", "${HOME}", "${oc.env:HOME}", "a, b", "a: b", "a = b", "{}", "{a: b}",
    "[]",
    "  a  ", "-a", "--help", "null", "true", "42", "1e3", "@a #b ~c 100%", "~", "a\\b", "a\\",
    "\\${a}",
    'it\'s "so"', "'", "a\nb", "\t", "glob(*)", "choice(a,b)", "range(1,3)", "(a:1.3), [b|c]",
    "𝔞" * 300,
    "🦊" * 200, "a]", "a}", "$", "a;b", "0x1", "é", "", "inf", ".5", "a/b", "../a", "*?<>|",
]  # fmt: skip
# 𝔞 and 🦊 have four bytes each in UTF-8.


def meant(word: str, config: str, **how: bool):
    """What a command finds under the key of this word: through Hydra's grammar, and OmegaConf's."""
    override = OverridesParser.create().parse_override(texts.for_hydra(word, config, **how))
    value = override.value()
    cfg = OmegaConf.create({"key": None})
    cfg.key = value.text if isinstance(value, QuotedString) else value
    return cfg.key


@pytest.mark.parametrize("text", PROMPTS)
@pytest.mark.parametrize("key", ["prompt", "negative"])
def test_a_prompt_is_the_text_that_was_typed(text, key):
    assert meant(f"{key}={text}", "sample") == text


@pytest.mark.parametrize("text", [text for text in PROMPTS if text != "null"])
def test_a_negative_prompt_of_a_method_is_one_too(text):
    assert meant(f"method.negative={text}", "config") == text
    assert meant("method.negative=null", "config") is None
    assert meant("method.negative=costs ${seed}", "config") == "costs ${seed}"


@pytest.mark.parametrize("text", [text for text in PROMPTS if text not in ("null", "~")])
@pytest.mark.parametrize("key", ["out", "name", "data.path", "teacher.weights", "run"])
def test_a_name_and_a_path_are_texts_too(text, key, monkeypatch):
    if not text.startswith(("${oc.env", "\\${")):  # which refer to a variable, and are escaped
        assert meant(f"{key}={text}", "config") == text


def test_any_text_survives():
    letters = [*"a \\'\"${}[],=:\n\t%#@~()5é;", "null", "𝔞", "${", "\\$"]
    draw = random.Random(0)
    for _ in range(1500):
        text = "".join(draw.choices(letters, k=draw.randint(0, 8)))
        typed = meant(f"prompt={text}", "sample")
        quoted = text[:1] == text[-1:] in ("'", '"') and len(text) > 1  # Hydra's own way, as ever
        assert typed == text or quoted, text


def test_what_refers_to_something_in_a_path_still_does():
    for path in ("${oc.env:X}/a", "runs/${name}_${seed}", "${teacher.path}/b", "runs/${now:%Y}"):
        override = OverridesParser.create().parse_override(
            texts.for_hydra(f"run_dir={path}", "config")
        )
        assert override.value() == path
    assert meant("run_dir=a${nothing}b", "config") == "a${nothing}b"


def test_a_configuration_is_read_as_it_was_written(tmp_path):
    values = [*PROMPTS, "\\\\${a}", "a\\${b}\\${c"]
    cfg = OmegaConf.create({"a": 1, "b": "${a}"})
    cfg.texts = [texts.escaped(text) for text in values]
    (tmp_path / "config.yaml").write_bytes(to_yaml(cfg))
    again = OmegaConf.load(tmp_path / "config.yaml")
    assert list(again.texts) == values
    assert again.b == 1
    plain = OmegaConf.create({"a": {"b": [1, None, "x", "???"]}, "c": True})
    assert to_yaml(plain).decode() == OmegaConf.to_yaml(plain, resolve=True)


@pytest.mark.parametrize(
    "word", ['prompts=["a, b","costs ${5}",[c]x]', "prompts=[[a],b]", "prompts=[1984]"]
)
def test_a_list_that_cannot_be_read_is_named(word):
    with pytest.raises(ValueError, match=r"cannot be read as a list of texts; write \[\"one\""):
        texts.for_hydra(word, "sample")


def test_several_prompts_are_a_list_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = meant("""prompts=["a, b","costs ${5}",a red star,'null']""", "sample")
    assert Lines(found, "prompts").lines == ["a, b", "costs ${5}", "a red star", "null"]
    assert len(Lines(found).digest()) == 64
    (tmp_path / "[a]").write_text("one\ntwo\n", encoding="utf-8")
    assert meant("prompts=[a]", "sample") == "[a]"  # a file that is there
    assert meant("runs=[runs/a,runs/b]", "compare") == ["runs/a", "runs/b"]
    assert meant("runs=runs/[0-9]*", "compare") == "runs/[0-9]*"
    assert meant('run=["a=b"]', "search") == ["a=b"]  # words for every trial: no path there


def test_pictures_of_prompts_that_hydra_would_read_otherwise(exported, command, tmp_path):  # noqa: F811
    run = f"run={exported('mmdit')}"
    for prompt in ("[a, b]", "costs ${5}", "null", "𝔞" * 300, "🦊" * 90, "-a = {b}: 'c'"):
        out = tmp_path / "out, [of] = ${1}"
        seed = 10**18  # a long name
        code, _, err = command(
            "sample", EXACT, run, f"prompt={prompt}", f"out={out}", f"seed={seed}"
        )
        assert code == 0, err
        newest = max(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert Image.open(newest).text["prompt"] == prompt
        assert len(newest.name.encode()) <= 255
    several = """prompts=["costs ${5}","a, b"]"""
    assert command("sample", EXACT, run, several, "out=list")[0] == 0
    drawn = {Image.open(path).text.get("prompt") for path in (tmp_path / "list").iterdir()}
    assert drawn == {"costs ${5}", "a, b", None}  # the grid has none


def test_the_teacher_of_the_demo_is_a_path(command, monkeypatch):
    """Though there is a group of this name, of which Hydra would have it be an option."""
    seen = []
    monkeypatch.setattr(distill.demo, "serve", lambda cfg: seen.append((cfg.teacher, cfg.prompt)))
    for path in ("shapes:mmdit", "owner/name", "a${b}, [c]", "it's"):
        code, _, err = command("demo", f"teacher={path}", "prompt=[a, ${b}]")
        assert code == 0, err
        assert seen.pop() == (path, "[a, ${b}]")
    assert command("demo", "teacher=null")[0] == 0
    assert seen.pop() == (None, None)


@pytest.mark.slow
def test_a_run_is_called_by_any_text(command, tmp_path):
    """And goes on: its name is read from its folder as it was typed."""
    name = "costs ${5}, [it's] 𝔞 = {b}"
    words = ["debug=smoke", "metrics=null", "logger=null", "callbacks.checkpoint.every=1"]
    code, _, err = command("run", *words, f"name={name}", "run_dir=a, [b] = ${1}")
    assert code == 0, err
    folder = tmp_path / "a, [b] = ${1}"
    assert OmegaConf.load(folder / "config.yaml").name == name
    code, _, err = command("run", f"resume={folder}", "trainer.max_steps=3", "metrics=null")
    assert code == 0, err
    assert OmegaConf.load(folder / "config.yaml").name == name


def test_prompts_of_a_run_are_what_was_typed(command, shards, pipelines, tmp_path):
    """To the method, in the pictures on the way, in the run's files, and when it goes on."""
    prompts, negative = ["costs ${5}", "${seed}", "\\\\${a}"], "worth ${oc.env:HOME} {a, b}"
    words = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "data.num_workers=0"]
    words += ["debug=smoke", "metrics=null", "logger=null", "callbacks.checkpoint.every=1"]
    words += ["method=add", f"discriminator.features.path={tiny.vit()}"]
    typed = ",".join(f'"{prompt}"' for prompt in prompts)
    asked = [f"method.negative={negative}", f"callbacks.samples.prompts=[{typed}]"]
    code, _, err = command("run", *words, *asked, "run_dir=run")
    assert code == 0, err
    captions = tmp_path / "run" / "samples" / "captions.txt"
    assert captions.read_text(encoding="utf-8").splitlines() == prompts
    code, _, err = command("run", "resume=run", "trainer.max_steps=3")
    assert code == 0, err
    kept = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert list(kept.callbacks.samples.prompts) == prompts
    assert compose.make(kept.method, "method").keywords["negative"] == negative


def test_a_file_of_a_name_that_is_an_interpolation_is_refused(command, pipelines, shards, tmp_path):
    """Before anything is read of it; prompts alone, and what is written, may have any name."""
    (tmp_path / "p.txt").write_text("costs ${5}\n", encoding="utf-8")
    there = {"teacher.path": pipelines("mmdit"), "data.path": shards}
    for key, place in (there | {"callbacks.samples.prompts": tmp_path / "p.txt"}).items():
        (tmp_path / f"{place.name}${{b}}").symlink_to(place)
        word = f"{key}={place.name}${{b}}"
        code, _, err = command("run", "debug=smoke", word)
        said = "must not hold ${, an interpolation's; rename it, or give a link to it"
        assert (code, err) == (1, f"distill: {word}: {said}\n")


def test_prompts_in_a_file_are_what_stands_there(command, pipelines, tmp_path):
    (tmp_path / "p${1}.txt").write_text("costs ${5}\n${seed}\n", encoding="utf-8")
    words = [f"teacher.path={pipelines('mmdit')}", "prompts=p${1}.txt", "out=made${1}", "steps=1"]
    for _ in range(2):  # the same command again
        code, out, err = command("synthesize", *words)
        assert code == 0, err
    with tarfile.open(tmp_path / "made${1}" / "latents-000000.tar") as tar:
        texts_in = {tar.extractfile(member).read() for member in tar if member.name[-4:] == ".txt"}
    assert texts_in == {b"costs ${5}", b"${seed}"}


# -- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", ["null", "none", "", "false", "None"])
def test_a_group_is_left_out_by_any_word_for_nothing(nothing):
    for group in texts.OPTIONAL["config"]:
        is_option = group == "logger" and nothing == "none"  # which keeps metrics.csv
        expected = "logger=none" if is_option else f"~{group}"
        assert texts.for_hydra(f"{group}={nothing}", "config") == expected
    assert texts.for_hydra(f"discriminator={nothing}", "config") == "discriminator=none"
    assert texts.for_hydra(f"teacher={nothing}", "evaluate") == "~teacher"
    needed = ["method", "teacher", "student", "data", "optimizer", "trainer", "sampler"]
    for group in needed:
        with pytest.raises(ValueError, match=f"^{group}={nothing}: a run needs it; choose"):
            texts.for_hydra(f"{group}={nothing}", "config")


def test_groups_of_other_commands():
    assert texts.for_hydra("+method=add", "config") == "method=add"
    assert texts.for_hydra("method=add,ladd", "config", sweep=True) == "method=add,ladd"
    for word, config, said in (
        ("~metrics", "evaluate", "~metrics: evaluate needs it; choose one by metrics="),
        ("data=null", "cache", "data=null: cache needs it"),
        ("teacher=sdxl", "sample", "teacher=sdxl: sample has no such key"),
        (
            "data=images",
            "pretrain",
            "data=images: has keys of its own; name one of them, as data.path",
        ),
        ("method=[add,ladd]", "config", "method takes the name of one option, there is add, cons"),
        ("=ladd", "config", "=ladd: has no key; write key=value"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            texts.for_hydra(word, config)


@pytest.mark.parametrize(
    ("words", "ordered"),
    [
        ("a=1 -m seed=0,1", "a=1 seed=0,1 -m"),
        ("--cfg job a=1", "a=1 --cfg job"),
        ("a=1 --cfg job --resolve b=2", "a=1 b=2 --cfg job --resolve"),
        ("--info a=1", "a=1 --info"),
        ("--info defaults a=1 -cd my b=2", "a=1 b=2 --info defaults -cd my"),
        ("--config-dir=my a=1", "a=1 --config-dir=my"),
        ("--config-d my a=1", "a=1 --config-d my"),
        ("a=1 --nope b=2", "a=1 b=2 --nope"),
    ],
)
def test_flags_may_stand_anywhere(words, ordered):
    assert texts.flags_last(words.split()) == ordered.split()


def test_a_flag_between_keys_is_read(command):
    code, out, err = command("run", "trainer.max_steps=7", "--cfg", "job", "seed=5")
    assert (code, err) == (0, "")
    assert "seed: 5" in out
    assert "max_steps: 7" in out


CLOSED = [
    *(("distill", "--help", 0), ("distill", "recipes", 0), ("distill.run", "--help", 0)),
    *(("distill.run", "--cfg job", 0), ("distill.check", "data.path=nope", 1)),
    *(("distill.compare", "runs=nope", 1), ("distill.completion", "bash", 0)),
    ("distill.doctor", "teacher.nope=1", 1),
    pytest.param("distill.doctor", "", 0, marks=pytest.mark.nightly),  # loads torch
    ("distill.demo", "run=./nope", 1),
]


@pytest.mark.nightly
@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
def test_a_fail_of_doctor_is_a_line_of_its_table(tmp_path):
    """So it goes where the table goes, and nothing else is said where that is closed."""
    for closed, lines in (("", 1), (">&-", 0), ("<&- >&- 2>&-", 0)):
        line = f"exec {sys.executable} -m distill.doctor teacher.path=nope {closed}"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, timeout=300)
        assert done.returncode == 1
        assert done.stdout.decode().count("fail teacher.path=nope: no such folder") == lines
        assert done.stderr == b""


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes streams")
@pytest.mark.parametrize(("module", "words", "ends"), CLOSED)
def test_a_closed_stream_is_no_fault(module, words, ends, tmp_path):
    """Of a command that was started with `>&-`, or with neither stream, as by a service."""
    for closed in (">&-", "<&- >&- 2>&-"):
        line = f"exec {sys.executable} -m {module} {words} {closed}"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, timeout=300)
        said = done.stderr.decode()
        assert done.returncode == ends, said
        assert said.count("\n") == (ends if closed == ">&-" else 0), said


def test_a_sweep_lists_what_failed_as_it_was_typed(command):
    code, _, err = command("run", "-m", "metrics=null", "data.path=nope,none")
    assert code == 1
    listed = err.splitlines()[-2:]
    assert [line.partition(": ")[0] for line in listed] == [
        "  metrics=null data.path=nope",
        "  metrics=null data.path=none",
    ]


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a folder that a process works in")
def test_a_working_folder_that_was_removed_is_said(command, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = command("compare", "runs=x")
    monkeypatch.chdir(tmp_path)
    what = "the working folder does not exist any more; change into another, or into it again"
    assert (code, err) == (1, f"distill: {what}\n")
