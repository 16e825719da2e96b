"""Values that are nobody else's are used, and stand in no file, log or error."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distill import search
from distill.commandline import secret_arguments as private
from distill.config import typed
from distill.config.compose import dotted
from distill.config.location import CONF_DIR
from distill.terminal import secret
from distill.training import rank_process as worker

VALUE = "hunter-of-the-4711"
LOGGER = """
import os
from lightning.pytorch.loggers.logger import DummyLogger

class Keyed(DummyLogger):
    def __init__(self, api_key, address=None, save_dir=None):
        super().__init__()
        os.environ["TOLD"] = f"{api_key} {address}"
"""


def below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hf_token", "teacher.token", "logger.x.api_key", "apiKey", "a.credentials.b"),
        *("accessToken", "authorization", "X-Api-Key", "HFToken", "clientSecret", "pwd"),
        *("key", "aws_secret", "password", "DB_PASSWORD", "access_key", "secret_key", "passphrase"),
    ],
)
def test_keys_that_look_so_are_secret(key):
    assert secret.is_secret(key)
    assert secret.masked_tree({"a": {key: "x"}}) == {"a": {key: "***"}} or "." in key


def test_no_key_of_ours_is_taken_for_one():
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        for words in (["data=images", "data.path=x"], ["method=add", "metrics=coco5k"]):
            tree = OmegaConf.to_container(compose("config", words), resolve=False)
            assert [key for key in dotted(tree) if secret.is_secret(key)] == []
    for key in ("tokens", "max_tokens", "caption_key", "data.caption_key", "keys", "keyword"):
        assert not secret.is_secret(key)


@pytest.mark.parametrize(
    ("text", "without"),
    [
        (f"+logger.c.api_key={VALUE}", "+logger.c.api_key=***"),
        (f"+logger.c={{api_key: {VALUE}, b: 2}}", "+logger.c={api_key: ***, b: 2}"),
        (f"run=['+logger.c.token={VALUE}','seed=1']", "run=['+logger.c.token=***','seed=1']"),
        (f"x.uri=http://me:{VALUE}@host/x", "x.uri=http://***@host/x"),
        ("+logger.c.api_key=${oc.env:NAME}", "+logger.c.api_key=${oc.env:NAME}"),
        ("+logger.c.api_key='${oc.env:NAME}'", "+logger.c.api_key='${oc.env:NAME}'"),
        ("run=runs/token=5 seed=1", "run=runs/token=5 seed=1"),
        ("use key=value pairs", "use key=value pairs"),
        ("x.uri=http://u:corr@horse@host/x", "x.uri=http://***@host/x"),
        ("x.uri=http://u:p/w@host/x", "x.uri=http://***@host/x"),
        ("http://host:8080/users/@me", "http://host:8080/users/@me"),
        ("at http://h/x?a=1&token=4711&b=2", "at http://h/x?a=1&token=***&b=2"),
        ("{'apiKey': 'it\\'s', \"b\": 2}", "{'apiKey': ***, \"b\": 2}"),
        ("Authorization: Bearer 4711", "Authorization: ***"),
    ],
)
def test_a_text_is_said_without_them(text, without):
    assert secret.masked(text) == without


@pytest.mark.parametrize(
    ("word", "said", "values"),
    [
        ("+c.m.password=correct horse battery", "+c.m.password=***", ["correct horse battery"]),
        (r"+c.m.password='correct\'horse'", "+c.m.password=***", ["correct'horse"]),
        ("+m={_target_:a,password: correct horse}", "+m={_target_:a,password:***}", ["correct ho"]),
        ("+m=[{apiKey:'a b, c'}]", "+m=[{apiKey:***}]", ["a b, c"]),
        ("+x.password=12345678.50", "+x.password=***", ["12345678.50", "12345678.5"]),
        ("+x.password=[hunter 4711", "+x.password=***", ["hunter 4711"]),
        ("+x.password=aaaa1,bbbb2", "+x.password=***", ["aaaa1", "bbbb2"]),
        ("+x.password=${oc.env:A,hunter}", "+x.password=***", ["${oc.env:A,hunter}"]),
        ("+x.password='${oc.env:A}'", "+x.password='${oc.env:A}'", []),
        ("x.uri=http://u:corr@horse@h", "x.uri=http://***@h", ["corr@horse"]),
        ("x.uri=http://h?token=hunter&b=1", "x.uri=http://h?token=***&b=1", ["hunter"]),
        ("prompt=a: b = c, {d}", "prompt=a: b = c, {d}", []),
    ],
)
def test_the_parser_knows_where_a_value_ends(word, said, values, monkeypatch):
    monkeypatch.setattr(secret, "_registered", set())
    monkeypatch.setattr(secret, "_shown_as", {})
    assert typed.masked_override(word) == said
    typed.register_secrets([word])
    assert secret.redacted([word]) == [said]
    for value in values:
        quoted = [value, json.dumps(value), repr(value), value.replace("'", "''")]
        assert secret.without_registered("|".join(quoted)).replace('"', "'").count("***") == len(
            quoted
        )


def test_a_tree_is_written_without_them_and_read_with_them(tmp_path, monkeypatch):
    tree = {
        "a": {"token": VALUE, "n": 1, "uri": f"http://me:{VALUE}@h"},
        "password": 4711,
        "b": None,
        "secret": 12345678.5,
    }
    without = {"a": {"token": "***", "n": 1, "uri": "http://***@h"}, "password": "***", "b": None}
    without["secret"] = "***"
    assert secret.masked_tree(tree) == without
    (tmp_path / "config.yaml").write_text(json.dumps(without), encoding="utf-8")
    monkeypatch.setenv(secret.SECRETS, json.dumps(secret.secrets_in(tree)))
    assert worker.configuration(tmp_path / "config.yaml") == tree
    monkeypatch.setattr("os.environ", {})
    assert worker.configuration(tmp_path / "config.yaml") == without


@pytest.mark.parametrize(
    "word",
    [
        f"+trainer.api_key={VALUE}",
        f"+logger.csv.api_key={VALUE}",
        f"+logger.csv.token=[{VALUE}",
        f"++teacher.path=http://me:{VALUE}@host/x",
    ],
)
def test_an_error_is_said_without_them(word, command):
    code, out, err = command("run", "debug=smoke", word)
    assert code == 1
    assert VALUE not in out + err
    assert err.startswith("distill: ")


@pytest.mark.parametrize("sweep", [[], pytest.param(["-m", "seed=0,1"], marks=pytest.mark.slow)])
def test_what_is_typed_is_not_written_by_hydra_either(
    sweep, command, pipelines, shards, tmp_path, monkeypatch
):
    """Of a sweep it writes multirun.yaml, and where one asks for it .hydra/ of every job."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "keyed_logger.py").write_text(LOGGER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("DISTILL_TRUST", "keyed_logger")
    monkeypatch.setenv("TOLD", "")
    node = f"+logger.mine={{_target_: keyed_logger.Keyed, _partial_: true, api_key: '{VALUE}'}}"
    words = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "data.batch_size=2"]
    words += ["debug=smoke", "~metrics", "~callbacks.samples", "hydra.output_subdir=.hydra", node]
    words += [f"+logger.mine.address=http://me:{VALUE}@h/x", "hydra.run.dir=kept"]
    code, out, err = command("run", *sweep, *words, "hydra.sweep.dir=kept")
    assert code == 0, err
    assert os.environ["TOLD"] == f"{VALUE} http://me:{VALUE}@h/x"
    assert VALUE not in out + err
    kept = [path.name for path in below(tmp_path / "kept")]
    assert ("multirun.yaml" in kept, "overrides.yaml" in kept) == (bool(sweep), True)
    assert [path for path in below(tmp_path) if VALUE.encode() in path.read_bytes()] == []
    for run in (tmp_path / "runs").iterdir():
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        assert "+logger.mine.address=http://***@h/x" in facts["overrides"]
        assert "+logger.mine.address=***" in facts["command"]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        (f"+a.token={VALUE}", {"a": {"token": VALUE}}),
        ("+a.token='it=s [a] {b}, c'", {"a": {"token": "it=s [a] {b}, c"}}),
        ("+a.password=4711", {"a": {"password": 4711}}),
        ("+a.secrets=[one,two,3]", {"a": {"secrets": ["one", "two", 3]}}),
        ("+a={token: four, b: {key: five, c: six}}",
         {"a": {"token": "four", "b": {"key": "five", "c": "six"}}}),
        ("++run=['+logger.c.token=seven','seed=1']", {"run": ["+logger.c.token=seven", "seed=1"]}),
        ("name='a ${seed} b'", {"name": "a 1 b"}),
    ],
)  # fmt: skip
def test_a_secret_is_a_variable_to_hydra_and_means_the_same(word, values):
    (said,) = private.with_variables([word])
    typed = ("4711", "one", "two", "four", "five", "seven", VALUE, "[a]")
    assert not any(value in said for value in typed)
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        found = compose("config", [said, "seed=1"])
    for key, value in values.items():
        assert OmegaConf.to_container(found, resolve=True)[key] == value


def test_what_is_typed_is_used_and_written_nowhere(
    command, pipelines, shards, tmp_path, monkeypatch
):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "keyed_logger.py").write_text(LOGGER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("DISTILL_TRUST", "keyed_logger")
    monkeypatch.setenv("CANARY", VALUE)
    monkeypatch.setenv("TOLD", "")
    node = "+logger.mine={_target_: keyed_logger.Keyed, _partial_: true}"
    ways = ["+logger.mine.api_key=${oc.env:CANARY}", f"+logger.mine.address=http://me:{VALUE}@h/x"]
    run = tmp_path / "run"
    fixed = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "data.batch_size=2"]
    words = ["debug=smoke", *fixed, "~metrics", "~callbacks.samples", node, *ways]
    code, out, err = command("run", *words, f"run_dir={run}")
    assert code == 0, err
    assert os.environ["TOLD"] == f"{VALUE} http://me:{VALUE}@h/x"
    assert VALUE not in out + err
    assert [path for path in below(run) if VALUE.encode() in path.read_bytes()] == []
    kept = OmegaConf.load(run / "config.yaml").logger.mine
    assert (kept.api_key, kept.address) == ("***", "http://***@h/x")
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert "+logger.mine.api_key=${oc.env:CANARY}" in facts["command"]
    assert f"{ways[1].partition('me:')[0]}***@h/x" in facts["overrides"]
    # what was left out is given again, or the run does not go on
    monkeypatch.setenv("DISTILL_TRUST_RUN", str(run))
    again = [f"resume={run}", "trainer.max_steps=3"]
    code, _, err = command("run", *again)
    assert code == 1
    assert f"{run / 'config.yaml'}: logger.mine.api_key=***: is a secret, which is not saved" in err
    monkeypatch.setenv("TOLD", "")
    code, out, err = command("run", *again, *(f"+{way}" for way in ways))
    assert code == 0, err
    assert os.environ["TOLD"].startswith(VALUE)
    assert [path for path in below(run) if VALUE.encode() in path.read_bytes()] == []


def test_a_search_keeps_them_out_of_its_study(tmp_path):
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        run = f"run=['+logger.c.api_key={VALUE}']"
        cfg = compose("search", ["space=['seed=int(0,3)']", run, f"out={tmp_path}"])
    asked = search.study_in(tmp_path, cfg).user_attrs["asked"]
    assert asked["run"] == ["+logger.c.api_key=***"]
    assert VALUE.encode() not in (tmp_path / "study.db").read_bytes()
    assert search.study_in(tmp_path, cfg).user_attrs["asked"] == asked  # and goes on
