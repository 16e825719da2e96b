"""A mistyped path asks nobody: what looks like a path, or begins with a folder here, is never a
repository's name.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from distill.config import compose
from distill.teachers.loading import locate

SRC = Path(__file__).parents[1] / "src"

# Command and options; what its one sentence begins with, and the nearest name that it gives, if
# any.
MISTYPED = [
    ("sample run=runs/nope prompt=x", "run=runs/nope: neither a finished run", "runs/nape"),
    ("sample run=mine/nope prompt=x", "run=mine/nope: neither a finished run", "mine/nape"),
    ("sample run=models/x prompt=x", "run=models/x: neither", ""),
    ("sample run=./nope prompt=x", "run=./nope: neither", ""),
    ("sample run=a/b/c prompt=x", "run=a/b/c: neither", ""),
    ("sample run=~/no_such_run prompt=x", "run=", ""),
    (r"sample run=mine\nope prompt=x", r"run=mine\nope: neither", ""),
    ("evaluate run=runs/nope", "run=runs/nope: neither", "runs/nape"),
    ("export run=runs/nope to=diffusers", "run=runs/nope: neither", "runs/nape"),
    ("inspect run=runs/nope", "run=runs/nope: not a run folder", "runs/nape"),
    ("run resume=runs/nope", "resume=runs/nope: not a run folder", "runs/nape"),
    ("run teacher=sd3 teacher.path=models/x data.path=x", "teacher.path=models/x: no such", ""),
    ("run teacher=sd3 teacher.path=mine/nope data.path=x", "teacher.path=mine/nope", "mine/nape"),
    ("run teacher=sd3 teacher.path=mine/x.safetensors data.path=x", "teacher.path=mine/x.s", ""),
    ("run +teacher.vae=mine/nope", "teacher.vae=mine/nope: no such folder", "mine/nape"),
    ("run +teacher.weights=mine/a/b", "teacher.weights=mine/a/b: no such file", ""),
    ("run student.init=mine/nope", "student.init=mine/nope: must be", "mine/nape"),
    (
        "run method=add discriminator=dino discriminator.features.path=mine/nope",
        "discriminator.features.path=mine/nope: no such folder",
        "mine/nape",
    ),
    (
        "evaluate run=pictures metrics=prompts metrics.path=prompts.txt "
        "metrics.measures=[clip_score] metrics.networks.clip_g.path=local-dir:mine/nope",
        "metrics.networks.clip_g.path=local-dir:mine/nope: no such file or folder",
        "mine/nape",
    ),
    ("run method=add discriminator=dino "
     "method.decoder={_target_:distill.teachers.decoder.TinyDecoder,"
     "path:mine/nope}", "method.decoder.path=mine/nope: no such folder", "mine/nape"),
]  # fmt: skip
DOORS = ("HF_ENDPOINT", "http_proxy", "https_proxy", "HTTP_proxy", "HTTPS_proxy")
SCRIPT = """
import importlib, json, sys
for words in json.loads(sys.argv[1]):
    name, *rest = words
    sys.argv = [f"distill.{name}", *rest]
    try:
        importlib.import_module(f"distill.{name}").main()
        print("no error", file=sys.stderr)
    except SystemExit:
        pass
    print("torch" in sys.modules, "-----", file=sys.stderr)
"""


@pytest.fixture
def hub():
    """A door where the hub would be, and all who have knocked."""
    knocked = []
    door = socket.create_server(("127.0.0.1", 0))

    def watch():
        while True:
            try:
                visitor, _ = door.accept()
            except OSError:
                return
            knocked.append(visitor.recv(200))
            visitor.close()

    threading.Thread(target=watch, daemon=True).start()
    yield f"http://127.0.0.1:{door.getsockname()[1]}", knocked
    door.close()


@pytest.fixture
def asked(hub, tmp_path):
    """Run commands in one process, in a folder of a few names, with the hub at that door -> what
    each says.
    """
    address, _ = hub
    for name in ("runs/nape", "mine/nape", "pictures"):
        (tmp_path / name).mkdir(parents=True)
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "prompts.txt").write_text("a star\n", encoding="utf-8")

    def ask(commands):
        import json

        environment = {**os.environ, "PYTHONPATH": str(SRC)}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment |= dict.fromkeys(DOORS, address)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(commands)],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            encoding="utf-8",
        )  # fmt: skip
        return [part.strip() for part in done.stderr.split("-----")][: len(commands)]

    return ask


@pytest.mark.slow
def test_a_mistyped_path_is_said_and_nobody_is_asked(asked, hub):
    found = asked([words.split() for words, _, _ in MISTYPED])
    for (words, begins, nearest), text in zip(MISTYPED, found, strict=True):
        said = [line for line in text.splitlines() if line.startswith("distill: ")]
        assert len(said) == 1, (words, text)
        assert said[0].startswith(f"distill: {begins}"), (words, text)
        assert f"(did you mean {nearest}?)" in said[0] if nearest else True, (words, text)
        assert text.endswith("False"), words  # torch is not imported yet
    assert hub[1] == []


def test_a_name_of_the_hub_is_asked_for(hub, forks, tmp_path):
    address, err = hub[0], tmp_path / "err.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    environment |= dict.fromkeys(DOORS, address)
    done = forks.command(
        "sample", ["run=owner/name", "prompt=x"], folder=tmp_path, environment=environment, err=err
    )
    assert done.wait(timeout=300) == 1
    said = done.said()
    assert "run=owner/name" in said
    assert hub[1], said  # else the test above says nothing


@pytest.mark.parametrize(
    "path",
    [
        "owner/name",
        "stabilityai/stable-diffusion-3.5-medium",
        "black-forest-labs/FLUX.1-dev",
        "a/b.c",
    ],
)
def test_names_of_the_hub_are_still_read(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate.is_hub_id(path)
    assert locate.in_repository(f"{path}/folder/x.safetensors")
    (tmp_path / path.partition("/")[0]).mkdir()
    assert not locate.is_hub_id(path)
    assert not locate.in_repository(f"{path}/folder/x.safetensors")
    assert locate.is_repository(path)


@pytest.mark.parametrize(
    "path",
    [
        ".",
        "../a",
        "./a/b",
        "/a/b",
        "~/a",
        "C:/a",
        "C:a",
        r"a\b",
        "a/b.safetensors",
        "runs/a",
        "a/b/c",
    ],
)
def test_paths_are_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not locate.is_hub_id(path)


def test_home_is_expanded_in_files_too(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose.shipped("~/model") == str(tmp_path / "model")
    from omegaconf import OmegaConf

    node = OmegaConf.create(
        {"_target_": "distill.core.times.LogitNormal", "m": ["~/x", "~x", "a ~/x"]}
    )
    assert compose.checked_node(node, "method.renoise")["m"] == [str(tmp_path / "x"), "~x", "a ~/x"]
