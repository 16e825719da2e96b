"""A run folder of a stranger: whatever stands at any key, no command calls, fetches or tells by it.

Every key of a run's configuration gets something hostile, for every command that reads runs. The
command refuses it in one sentence, or does not look at it: in either case nothing has been
imported, written, connected to or said.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import tiny
from distill import demo, evaluate, export, inspect, run, sample
from distill.config import texts, trust
from distill.config.compose import dotted, read_unchecked, shipped
from distill.config.continued import resumed_config
from distill.config.errors import print_mistakes
from distill.config.location import CONF_DIR
from distill.data import begun_job
from distill.report import write_report

CANARY = "canary-of-the-environment-4711"
RUN = ("data=renders", "trainer=ddp", "debug=smoke", "callbacks.samples.prompts=[a red star]")
ANOTHER = ("method=add", "teacher=sd15", "data=images", "data.path=d", "metrics=coco5k")
OF_ANOTHER = (
    "metrics.path=m",
    "+method.real._target_=distill.core.score_distillation.TeacherSamples",
)


@dataclass
class Listener:
    """A server that counts who comes."""

    port: int = 0
    heard: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._door = socket.socket()
        self._door.bind(("127.0.0.1", 0))
        self._door.listen()
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                guest, address = self._door.accept()
            except OSError:
                return
            self.heard.append(address)
            guest.close()

    def close(self) -> None:
        self._door.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def hostile(kind: str, key: str, port: int) -> Any:
    """What stands at a key instead of its value."""
    if kind == "class":
        return {"_target_": "evil.Owned", "path": "owned"}
    if kind == "gadget":
        address = f"ftp://me:x@127.0.0.1:{port}/x"
        return {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": address}
    if kind == "resolver":
        return "${oc.env:CANARY}"
    if kind == "hidden resolver":
        return [{"deep": "${oc.decode:'${oc.env:CANARY}'}"}]
    assert kind == "address"
    return f"http://127.0.0.1:{port}/{key}"


KINDS = ("class", "gadget", "resolver", "hidden resolver", "address")


def composed(name: str, *words: str) -> DictConfig:
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        return compose(name, list(words))


def config(*words: str) -> dict[str, Any]:
    """What a run of these words would have written."""
    cfg = composed("config", *words)
    return OmegaConf.to_container(cfg, resolve=True)


def replaced(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    *path, last = key.split(".")
    here = tree
    for name in path:
        here = here[name]
    here[last] = value
    return tree


def folder_of(config: dict[str, Any], place: Path, student: Path | None = None) -> Path:
    """A run folder with this configuration; its student has no weights unless it is given."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # which is YAML
    (place / "checkpoints").mkdir(exist_ok=True)
    (place / "checkpoints" / "step_000001.ckpt").write_bytes(b"none")
    if not (place / "student").is_dir() and student:
        shutil.copytree(student, place / "student")
    elif not (place / "student").is_dir():
        (place / "student").mkdir()
        index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "x"]}
        (place / "student" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return place


# Command -> what it does, the configuration that it composes, and its words but for the run.
COMMANDS: dict[str, tuple[Callable[[DictConfig], Any], str, tuple[str, ...], str]] = {
    "run": (run.start, "config", (), "resume"),
    "sample": (sample.generate, "sample", ("prompt=x",), "run"),
    "evaluate": (evaluate.evaluate, "evaluate", ("metrics.prompts=4",), "run"),
    "inspect": (inspect.examine, "inspect", (), "run"),
    "export": (export.export, "export", ("to=diffusers", "out=exported"), "run"),
    "export delta": (export.export, "export", ("to=delta", "out=delta.safetensors"), "run"),
    "demo": (demo.serve, "demo", ("port=0", "open=false"), "run"),
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to be in, from which a module `evil` could be imported."""
    owned = tmp_path / "owned"
    (tmp_path / "evil.py").write_text(f"open({str(owned)!r}, 'w').close()\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CANARY", CANARY)
    return tmp_path


def nothing_happened(place: Path, listener: Listener, said: str) -> None:
    assert not listener.heard
    assert not (place / "owned").exists()
    assert "evil" not in sys.modules
    assert CANARY not in said
    for path in place.rglob("*"):
        assert CANARY not in str(path)
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def attacked(
    name: str, base: dict[str, Any], kinds: tuple[str, ...], place: Path, listener: Any, capsys: Any
) -> dict[str, str]:
    """Key -> what the command has said, to something hostile there; its kinds come in turn."""
    task, command, words, key_of_run = COMMANDS[name]
    cfg, found = composed(command, *words, f"{key_of_run}={place / 'run'}"), {}
    for number, key in enumerate(dotted(base)):
        value = hostile(kinds[number % len(kinds)], key, listener.port)
        folder_of(replaced(base, key, value), place / "run")
        with pytest.raises(SystemExit) as ended, print_mistakes():
            task(copy.deepcopy(cfg))
        said = "".join(capsys.readouterr())
        assert ended.value.code == 1, (key, said)
        assert len(re.findall("^distill: ", said, re.MULTILINE)) == 1, (key, said)
        assert CANARY not in said
        found[key] = said
    nothing_happened(place, listener, "".join(found.values()))
    return found


def refused(found: dict[str, str]) -> set[str]:
    return {key for key, said in found.items() if f"config.yaml: {key}" in said}


@pytest.mark.parametrize("name", tiny.tiered(COMMANDS, quick=["run"], slow=COMMANDS))
def test_no_key_of_a_strangers_run_does_anything(name, place, listener, capsys):
    base = config(*RUN)
    found = attacked(name, base, ("class", "resolver", "gadget"), place, listener, capsys)
    assert len(found) > 90
    if name == "run":
        assert refused(found) == set(found)  # it reads all of them
    else:
        assert "teacher.path" in refused(found)  # a node's class is not looked at for its path


METHODS = {"ladd": RUN, "add": ANOTHER + OF_ANOTHER}
EACH_KEY = list(product(COMMANDS, METHODS, KINDS))


@pytest.mark.parametrize(
    ("name", "method", "kind"),
    tiny.tiered(EACH_KEY, slow=EACH_KEY[::6]),  # each command, method and kind among them
)
def test_no_key_does_anything_whatever_stands_there(name, method, kind, place, listener, capsys):
    found = attacked(name, config(*METHODS[method]), (kind,), place, listener, capsys)
    if name == "run":
        texts = {key for key in found if trust.TEXTS.fullmatch(key)}
        words_of = {key for key in found if key.endswith(("_partial_", "_target_"))}
        assert set(found) - refused(found) <= (texts | words_of if kind == "address" else set())


LEFT_ALONE = [
    ("sample", "run={run}", "prompt=x", "out=drawn"),
    ("export", "run={run}", "to=diffusers", "dtype=float16", "out=exported"),
    ("compare", "runs={run}"),
    pytest.param(
        ("evaluate", "run={run}", "metrics.prompts=4", "metrics.teacher_steps=[]"),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("words", LEFT_ALONE)
def test_what_a_command_does_not_look_at_may_be_anything(words, place, command, listener):
    """All keys that are not read are hostile at once; the command does its work all the same."""
    run = place / "run"
    for name in ("student", "mmdit"):  # the shipped student leaves its parts to its teacher
        shutil.copytree(shipped(f"shapes:{name}"), run / name)
    odd, kinds = config(), iter(KINDS * 5)
    for group in set(odd) - {"teacher", "sampler", "name", "discriminator"}:
        odd[group] = hostile(next(kinds), group, listener.port)
    odd["discriminator"]["heads"] = hostile("gadget", "heads", listener.port)
    folder_of(odd, run)
    facts = {"name": "x", "method": "${oc.env:CANARY}", "command": "${oc.env:CANARY}"}
    facts |= {"train_seconds": 1.0, "images_seen": 5, "wall_seconds": 1.0}
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    rows = [{"who": "student", "steps": 1, "prompt_accuracy": 0.5}]
    judged = {"rows": rows, "protocol": {"guidance": "${oc.env:CANARY}"}}
    (run / "evaluation.json").write_text(json.dumps(judged), encoding="utf-8")
    name, *arguments = words
    code, out, err = command(name, *(word.format(run=run) for word in arguments))
    assert code == 0, err
    write_report(run)
    assert "oc.env:CANARY" in (run / "report.html").read_text(encoding="utf-8")  # as it stands
    nothing_happened(place, listener, out + err)


def test_shards_that_were_begun_say_nothing_either(place, listener):
    cfg = composed("cache", "data.path=d", "out=out", "teacher=shapes")
    base = OmegaConf.to_container(cfg, resolve=True)
    folder = place / "out"
    folder.mkdir()
    (folder / "latents-000000.tar").write_bytes(b"")
    said = ""
    for key in dotted(base):
        for kind in KINDS:
            begun = replaced(base, key, hostile(kind, key, listener.port))
            (folder / "making.yaml").write_text(json.dumps(begun), encoding="utf-8")
            free = key.startswith(begun_job.FREE) and kind == "address"
            with nullcontext() if free else pytest.raises(ValueError, match="making|settings|_tar"):
                begun_job.refuse_another(cfg, folder)
            if "resolver" in kind:
                with pytest.raises(ValueError, match="holds an interpolation") as error:
                    begun_job.refuse_another(cfg, folder)
                said += str(error.value)
    nothing_happened(place, listener, said)


# -- files of this machine -------------------------------------------------------------------------

READING = ("callbacks.samples.prompts", "metrics.path", "data.path")


def reading(key: str, value: str) -> dict[str, Any]:
    """A configuration in which this key is of a text that is shown."""
    words = ("metrics=prompts", "metrics.path=m") if key == "metrics.path" else ()
    base = config(*RUN, *words)
    if key == "data.path":
        base["data"] = {"_target_": "distill.data.source.prompts", "path": "p", "batch_size": 8}
    return replaced(base, key, value)


def resumed(place: Path, *words: str) -> DictConfig:
    return resumed_config(composed("config", *RUN, f"resume={place / 'run'}", *words))


@pytest.mark.parametrize("key", READING)
@pytest.mark.parametrize("path", ["/proc/self/environ", "/dev/stdin", "/sys/kernel/notes", "link"])
def test_no_key_says_what_the_system_says_of_processes(key, path, place, monkeypatch):
    monkeypatch.setattr("distill.config.continued.overrides", list)
    if path == "link":
        path = str(place / "run" / "prompts.txt")
        (place / "run").mkdir()
        Path(path).symlink_to("/proc/self/environ")
    folder_of(reading(key, path), place / "run")
    with pytest.raises(ValueError, match=rf"{key}={path}: is a file of the system about processes"):
        resumed(place)


@pytest.mark.parametrize("key", READING)
def test_a_text_of_this_machine_is_shown_only_if_the_run_had_it(key, place, monkeypatch):
    monkeypatch.setattr("distill.config.continued.overrides", list)
    text = place / "private.txt"
    text.write_text("a letter\n", encoding="utf-8")
    run = folder_of(reading(key, str(text)), place / "run")
    refusal = rf"{key}={text}: is a text that would be shown.*type {key}=\.\.\. yourself, or if"
    with pytest.raises(ValueError, match=refusal):
        resumed(place)
    # a link to it in the run's folder, and one by a folder that the run says it was moved from
    (run / "mine.txt").symlink_to(text)
    folder_of(reading(key, str(run / "mine.txt")), run)
    with pytest.raises(ValueError, match=r"mine\.txt: is a text that would be shown"):
        resumed(place)
    folder_of(reading(key, "/nowhere/private.txt"), run)
    (run / "run.json").write_text(json.dumps({"folder": "/nowhere/run"}), encoding="utf-8")
    with pytest.raises(ValueError, match=refusal):
        resumed(place)
    # the run's own: as its record says, in its folder, typed, or by the environment
    folder_of(reading(key, str(text)), run)
    values = dotted(OmegaConf.to_container(read_unchecked(run), resolve=True))
    facts = {"content": {"texts": texts.text_hashes(values)}}
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    assert OmegaConf.select(resumed(place), key) == str(text)
    text.write_text("another letter\n", encoding="utf-8")
    with pytest.raises(ValueError, match=refusal):
        resumed(place)
    monkeypatch.setenv("DISTILL_TRUST_RUN", str(run))
    assert OmegaConf.select(resumed(place), key) == str(text)
    monkeypatch.delenv("DISTILL_TRUST_RUN")
    (run / "mine.txt").unlink()
    (run / "mine.txt").write_text("a star\n", encoding="utf-8")
    folder_of(reading(key, str(run / "mine.txt")), run)
    assert OmegaConf.select(resumed(place), key) == str(run / "mine.txt")
    folder_of(reading(key, str(text)), run)
    if key == READING[0]:
        monkeypatch.setattr("distill.config.continued.overrides", lambda: [f"{key}={text}x"])
        assert OmegaConf.select(resumed(place, f"{key}={text}x"), key) == f"{text}x"


# -- what is given again, and what is one's own ----------------------------------------------------


def test_a_place_that_is_typed_again_is_ones_own(place, monkeypatch):
    base = config(*RUN)
    monkeypatch.setattr("distill.config.continued.overrides", lambda: ["data.path=here"])
    base["data"] = {**base["data"], "path": "s3://bucket/shards"}
    folder = folder_of(base, place / "run")
    cfg = composed("config", *RUN, f"resume={folder}", "+data.path=here")
    assert resumed_config(cfg).data.path == "here"
    monkeypatch.setattr("distill.config.continued.overrides", lambda: ["seed=0"])
    with pytest.raises(
        ValueError, match=r"data\.path=s3://bucket/shards: is neither a path on this"
    ):
        resumed_config(cfg)


def test_a_job_that_slurm_runs_again_finds_its_own_run(place, monkeypatch):
    base = config(*RUN)
    base["logger"]["mine"] = {"_target_": "lightning.pytorch.loggers.WandbLogger"}
    folder = folder_of(base, place / "runs" / "slurm_7_run")
    cfg = composed("config", *RUN, "resume=runs/slurm_7_run")
    with pytest.raises(ValueError, match=r"WandbLogger is refused.*DISTILL_TRUST_RUN=runs/slurm_7"):
        resumed_config(cfg)
    for name, value in {"PROCID": "0", "JOB_ID": "7", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert resumed_config(cfg).logger.mine._target_.endswith("WandbLogger")
    cfg.resume = str(folder_of(base, place / "runs" / "another"))
    with pytest.raises(ValueError, match="WandbLogger is refused"):
        resumed_config(cfg)
    assert folder.is_dir()
