"""Trackers: `logger=...` and lists of it, before a run, during it, and where it goes on.

The packages are the real ones. Nothing asks a server of the internet.
"""

from __future__ import annotations

import base64
import csv
import http.server
import importlib.util
import socket
import sqlite3
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from distill.training.trackers import checks, logged

SECRET = "canary-of-a-key-73"


@pytest.fixture
def words(pipelines, shards):
    given = [f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "run_dir=run", "~metrics"]
    return ["debug=smoke", *given, "trainer.max_steps=2", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    """Trackio's store, in a folder that it reads from the environment when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        pytest.importorskip("trackio")
        from trackio.sqlite_storage import SQLiteStorage

        yield SQLiteStorage


@pytest.fixture(autouse=True)
def _no_logins(monkeypatch, tmp_path):
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "MLFLOW_TRACKING_URI",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def last(err):
    return [line for line in err.splitlines() if line.startswith("distill: ")][-1]


def rows(folder):
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("iteration")]


@contextmanager
def server(status: int, *, stalls: bool = False, logins: list[str] | None = None):
    """A server that answers everything by this status, or takes connections and says nothing.

    `logins` gets the login of every request.
    """
    if stalls:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield f"http://127.0.0.1:{silent.getsockname()[1]}"
        return

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            if logins is not None:
                logins.append(self.headers["Authorization"])
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


# -- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("logger=none", {"csv"}),
        ("logger=csv", {"csv"}),
        ("logger=tensorboard", {"csv", "tensorboard"}),
        ("logger=wandb", {"csv", "wandb"}),
        ("logger=[csv,trackio]", {"csv", "trackio"}),
        ("logger=[tensorboard,wandb,mlflow]", {"csv", "tensorboard", "wandb", "mlflow"}),
        ("~logger", None),
        ("logger=null", None),
    ],
)
def test_an_option_or_a_list_of_them(typed, found, command, words):
    code, out, err = command("run", *words, typed, "--cfg", "job")
    assert code == 0, err
    node = OmegaConf.create(out).get("logger")
    assert (node if node is None else set(node)) == found


@pytest.mark.slow
def test_without_a_tracker_there_is_the_table_that_reports_read(command, words, tmp_path):
    assert command("run", *words, "logger=none")[0] == 0
    assert len(rows(tmp_path / "run")) == 2
    assert not list((tmp_path / "run").glob("events*"))
    assert (tmp_path / "run" / "report.html").is_file()


# -- refused before there is a folder --------------------------------------------------------------


def refused(command, tmp_path, *typed):
    code, _, err = command("run", *typed)
    assert code == 1
    assert not (tmp_path / "run").exists()
    return last(err)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_without_its_package(name, command, words, tmp_path, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == name else own(n, *a)
    )
    said = refused(command, tmp_path, *words, f"logger={name}")
    assert said == (
        f"distill: logger.{name}: the package {name} is not installed; pip install"
        f" 'distill[{name}]', or leave it out by ~logger.{name}"
    )


def test_wandb_without_a_login(command, words, tmp_path):
    pytest.importorskip("wandb")
    said = refused(command, tmp_path, *words, "logger=wandb")
    assert said == (
        "distill: logger.wandb: there is no login for https://api.wandb.ai; run `wandb login`, or"
        " logger.wandb.offline=true logs into the run folder, for `wandb sync` later"
    )


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            {"status": 401},
            "refuses the login (401); log in anew, or logger.wandb.offline=true logs",
        ),
        ({"status": 200, "stalls": True}, "did not answer within 1 s; logger.wandb.offline=true"),
    ],
)
def test_wandb_that_refuses_or_stalls(answers, said, command, words, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(checks, "SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with server(**answers) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        found = refused(command, tmp_path, *words, "logger=wandb")
    assert said in found
    assert SECRET not in found


def test_a_server_that_is_not_there(command, words, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    said = refused(command, tmp_path, *words, "logger=wandb")
    assert f"logger.wandb: http://127.0.0.1:{port} cannot be reached (" in said


def test_the_login_of_a_file_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(
        f"machine 127.0.0.1 login user password {SECRET}\n", encoding="utf-8"
    )
    logins: list[str] = []
    with server(200, logins=logins) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setattr(checks, "need", lambda *_: None)
        checks.check({"wandb": {"_target_": "distill.training.trackers.kinds.Wandb"}})
    assert logins == [f"Basic {base64.b64encode(f'api:{SECRET}'.encode()).decode()}"]


def test_an_mlflow_server_that_refuses(monkeypatch):
    monkeypatch.setattr(checks, "need", lambda *_: None)
    with server(403) as url, pytest.raises(ValueError, match="refuses the login") as error:
        checks.check(
            {"m": {"_target_": "x.Mlflow", "tracking_uri": f"http://me:{SECRET}@{url[7:]}"}}
        )
    assert SECRET not in str(error.value)


def test_a_space_without_a_login(monkeypatch):
    monkeypatch.setattr(checks, "need", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no login at Hugging Face.*space_id=null"):
        checks.check({"t": {"_target_": "x.Trackio", "space_id": "me/x"}})


# -- one of one's own ------------------------------------------------------------------------------

OWN = '''
from lightning.pytorch.loggers.logger import Logger

SEEN = []


class Diary(Logger):
    """One that fails from its second row on, if it is told so."""

    name, version = "diary", ""

    def __init__(self, save_dir: str, fails: bool = False, api_key: str = ""):
        super().__init__()
        self.fails, self.rows = fails, 0

    def log_hyperparams(self, params, *_, **__):
        SEEN.append(("config", params))

    def log_metrics(self, metrics, step=None):
        self.rows += 1
        if self.fails and self.rows > 1:
            raise RuntimeError("the line is dead")
        SEEN.append(("row", dict(metrics)))

    def log_picture(self, name, picture, step):
        SEEN.append(("picture", (name, picture.shape, str(picture.dtype), step)))

    def log_report(self, path):
        SEEN.append(("report", path.name))

    def close(self):
        SEEN.append(("close", None))
'''


@pytest.fixture
def diary(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "my_diary.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("DISTILL_TRUST", "my_diary")
    import my_diary

    my_diary.SEEN.clear()
    return my_diary.SEEN


MINE = "{_target_: my_diary.Diary, _partial_: true, api_key: " + SECRET


# -- a whole run -----------------------------------------------------------------------------------


def offline_files(folder):
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def about_wandb(run: Path) -> None:
    (first,) = offline_files(run)
    content = first.read_bytes()  # records of protobuf, with texts as they are
    for text in (b"g/adv", b"trainer/global_step", b"samples", b"distill.methods.ladd.LADD"):
        assert text in content, text
    assert b"report-" in content
    assert list(first.parent.glob("files/media/images/samples*.png"))
    kept = [path for path in (run / "wandb").rglob("*") if path.is_file()]
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]


def about_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run))
    read.Reload()
    assert "samples" in read.Tags()["images"]
    (event,) = read.Tensors("config/text_summary")
    assert b"distill.methods.ladd.LADD" in event.tensor_proto.string_val[0]


def about_own(seen: list) -> None:
    kinds = [kind for kind, _ in seen]
    assert kinds[0] == "config"
    assert kinds[-2:] == ["report", "close"]
    assert seen[0][1]["logger"]["mine"]["api_key"] == "***"
    (name, shape, dtype, step), *_ = [what for kind, what in seen if kind == "picture"]
    assert (name, shape[2], dtype, step) == ("samples", 3, "uint8", 0)


@pytest.mark.slow
def test_all_have_rows_pictures_settings_and_the_report_and_go_on(
    command, words, tmp_path, monkeypatch, diary, trackio
):
    """With a run that is resumed: each tracker continues the run that it had."""
    has_wandb = importlib.util.find_spec("wandb") is not None
    monkeypatch.setenv("DISTILL_TRUST_RUN", "run")  # for the class of one's own
    names = ["tensorboard", "trackio", *(["wandb"] if has_wandb else [])]
    mine = [f"logger=[{','.join(names)}]", f"+logger.mine={MINE}}}", "logger.trackio.project=p"]
    code, _, err = command("run", *words, *mine, *["logger.wandb.offline=true"] * has_wandb)
    assert code == 0, err
    run = tmp_path / "run"
    if has_wandb:
        about_wandb(run)
    about_tensorboard(run)
    about_own(diary)
    assert trackio.get_runs("p") == ["run"]
    before = trackio.get_logs("p", "run")
    assert {"g/adv", "samples"} <= {key for row in before for key in row}
    assert len(rows(run)) == 2
    more = [f"+logger.mine.api_key={SECRET}"]
    code, _, err = command("run", f"resume={run}", "trainer.max_steps=3", *more)
    assert code == 0, err
    assert trackio.get_runs("p") == ["run"]
    assert len(trackio.get_logs("p", "run")) > len(before)
    if has_wandb:  # the same run, in the files of two parts
        assert len(offline_files(run)) == 2
        assert len({path.stem for path in offline_files(run)}) == 1


@pytest.mark.slow
def test_mlflow_has_rows_pictures_settings_and_report_and_goes_on(
    command, words, tmp_path, monkeypatch
):
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    secret = f"+logger.csv.token={SECRET}"
    code, _, err = command("run", *words, "logger=mlflow", "logger.mlflow.tags={a: b}")
    assert code == 0, (err, secret)
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        ((run_id, name, status),) = base.execute(
            "select run_uuid, name, status from runs"
        ).fetchall()
        keys = {key for (key,) in base.execute("select key from metrics")}
        params = dict(base.execute("select key, value from params"))
    assert (name, status) == ("run", "FINISHED")
    assert "g/adv" in keys
    assert params["seed"] == "0"
    files = {p.name for p in (tmp_path / "mlartifacts").rglob("*") if p.is_file()}
    assert {"report.html", "config.yaml", "step_000000.png"} <= files
    code, _, err = command("run", "resume=run", "trainer.max_steps=3")
    assert code == 0, err
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        assert base.execute("select run_uuid, status from runs").fetchall() == [
            (run_id, "FINISHED")
        ]
        assert base.execute("select max(step) from metrics").fetchone() == (3,)


@pytest.mark.slow
def test_a_tracker_that_fails_ends_no_run(command, words, diary, tmp_path):
    code, out, err = command("run", *words, f"+logger.mine={MINE}, fails: true}}")
    assert code == 0, err
    assert "Diary cannot log (RuntimeError: the line is dead); the run continues" in out + err
    assert len(rows(tmp_path / "run")) == 2


def test_a_failing_picture_is_a_warning(caplog, tmp_path):
    class Bad:
        def log_picture(self, *_):
            raise RuntimeError(f"api_key={SECRET}")

    logged.picture([Bad()], "samples", np.zeros((4, 4, 3), np.uint8), 0)
    logged.report([Bad()], Path(tmp_path / "none.html"))
    assert "***" in caplog.text
    assert SECRET not in caplog.text
