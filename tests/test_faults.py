"""What the machine does to a command: a full disk or memory, a reader that leaves, a tracker."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

import tiny
from distill import search
from distill.machine import faults
from distill.storage import checkpoint_files
from distill.training import guarded_loggers as guarded
from distill.training import launch
from distill.training.csv_logger import CsvLog

AGAIN = "give the command again"
ONCE_MORE = "give the same command again, which goes on where it stopped"
ANEW = "give the same command again, which begins anew: no shard is whole yet"


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, of a megabyte; `fill` leaves so many bytes of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes of a disk free."""
    with contextlib.suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    size = (disk / "filling").stat().st_size
    os.truncate(disk / "filling", max(0, size - left))


@pytest.fixture(scope="module")
def run(pipelines, shards, tmp_path_factory):
    """A finished run that no test may change."""
    import importlib

    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        patch.setattr(sys, "argv", ["distill.run", *words, f"run_dir={folder}"])
        importlib.import_module("distill.run").main()
    rows = [{"who": "student", "steps": 1, "prompt_accuracy": 0.5}]
    said = json.dumps({"protocol": {"prompts": 8}, "rows": rows})
    (folder / "evaluation.json").write_text(said, encoding="utf-8")
    return folder


@pytest.fixture
def given(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.CAPTIONS[:5]) + "\n", encoding="utf-8")
    tiny.write_pictures(tmp_path / "pictures", 5)
    return tmp_path


COMMANDS = {
    "sample": (["run={run}", "prompt=x", "out={disk}/samples"], 0, AGAIN),
    "export": (["run={run}", "to=diffusers", "out={disk}/student"], 100_000, AGAIN),
    "compare": (["runs=[{run}]", "out={disk}/compare"], 0, AGAIN),
    "synthesize": (
        ["teacher.path={teacher}", "prompts=prompts.txt", "out={disk}/made", "steps=1"],
        20_000,
        ANEW,
    ),
    "cache": (
        ["teacher.path={teacher}", "data.path=pictures", "data.size=64", "out={disk}/made"]
        + ["data.num_workers=0"],
        20_000,
        ANEW,
    ),
    "evaluate": (
        ["run={run}", "metrics.prompts=4", "metrics.teacher_steps=[1]", "out={disk}/judged"]
        + ["steps=1"],
        8_192,
        ONCE_MORE,
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence_with_the_file_and_the_way_on(
    name, command, disk, given, run, pipelines
):
    words, left, way = COMMANDS[name]
    places = {"run": run, "disk": disk, "teacher": pipelines("mmdit")}
    fill(disk, left)
    code, _, said = command(name, *(word.format(**places) for word in words))
    assert code == 1
    assert said.splitlines()[-1].startswith(f"distill: {disk}/")
    assert said.endswith(f": No space left on device; make room, then {way}\n")
    assert "Traceback" not in said
    assert ".part" not in said
    (disk / "filling").unlink()


def test_a_run_on_a_full_disk_names_the_file_and_how_to_go_on(
    command, disk, pipelines, shards, tmp_path
):
    """Its folder has room for a checkpoint and no more: whatever is written next says so."""
    folder = disk / "run"
    words = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics"]
    code, _, said = command("run", *words, "callbacks.checkpoint.every=1", f"run_dir={folder}")
    assert code == 1
    assert "the disk cannot be written" in said or "No space left on device" in said
    assert "make room" in said
    assert str(disk) in said
    assert "Traceback" not in said


def test_the_first_checkpoint_on_a_full_disk_says_that_there_is_none_before_it(disk):
    fill(disk, 8192)
    folder = disk / "run" / "checkpoints"
    with pytest.raises(OSError, match=rf"there is no earlier one: make room, remove {disk}/run "):
        checkpoint_files.write_checkpoint({"x": torch.zeros(200_000)}, folder / "step_000001.ckpt")
    (folder / "step_000001.ckpt").touch()
    with pytest.raises(OSError, match="earlier ones are unchanged: make room, then resume"):
        checkpoint_files.write_checkpoint({"x": torch.zeros(200_000)}, folder / "step_000002.ckpt")


def test_the_way_on_is_something_to_do(tmp_path):
    """It stands behind `make room, then` and the like."""
    ways = [launch.way_on(tmp_path, command) for command in ("run", "cache", "evaluate")]
    (tmp_path / "latents-000000.tar").touch()
    ways += [launch.way_on(tmp_path, "synthesize")]
    assert ways == [
        f"remove {tmp_path}, which has no checkpoint yet, and give the command again",
        ANEW,
        ONCE_MORE,
        f"{ONCE_MORE} (whole: 1 shard)",
    ]


SEARCH = ['space=["seed=choice(0,1)"]', 'run=["debug=smoke"]', "trials=1"]


@pytest.mark.parametrize("left", [24_000, 4096])
def test_a_search_on_a_full_disk_names_its_study(left, command, disk):
    (disk / "s").mkdir()
    fill(disk, left)
    code, _, said = command("search", *SEARCH, f"out={disk / 's'}")
    assert code == 1
    last = said.splitlines()[-1]
    assert last.startswith(f"distill: {disk}/s/study.db: ")
    assert last.endswith(f"; make room, then {ONCE_MORE}")
    assert "Traceback" not in said


def test_a_study_that_is_no_database_is_named(command, tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    (out / "study.db").write_text("a text" * 1000, encoding="utf-8")
    code, _, said = command("search", *SEARCH, f"out={out}")
    assert code == 1
    assert said.endswith(
        f"distill: {out / 'study.db'}: is no study that can be read (file is not a database); "
        "move it away, or choose another out=\n"
    )
    assert "Traceback" not in said


STUDY = OmegaConf.create(
    {"space": ["seed=int(0,9)"], "run": [], "metric": "fid", "steps": 1, "seed": 0}
    | {"direction": "maximize"}
)
DAMAGED = [
    "update alembic_version set version_num='v99.0.0'",
    "update study_user_attributes set value_json='5'",
    "update study_user_attributes set value_json='{}'",
    "update study_user_attributes set value_json='{'",
    "update study_directions set direction='x'",
]


def test_a_study_of_another_version_or_with_damaged_values_is_named(tmp_path):
    search.study_in(tmp_path, STUDY)
    whole = (tmp_path / "study.db").read_bytes()
    for change in DAMAGED:
        (tmp_path / "study.db").write_bytes(whole)
        with contextlib.closing(sqlite3.connect(tmp_path / "study.db")) as database:
            database.execute(change)
            database.commit()
        with pytest.raises(ValueError, match=r"study\.db: is no study that can be read \("):
            search.study_in(tmp_path, STUDY)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no file of such a name")
@pytest.mark.parametrize("name", ["a?mode=memory", "a%41", "a#b"])
def test_a_study_lies_in_its_folder_whatever_its_name(name, tmp_path):
    (tmp_path / name).mkdir()
    search.study_in(tmp_path / name, STUDY)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "study.db").is_file()


def test_files_that_libraries_cannot_write_are_named(disk):
    """torch, safetensors, Pillow and an archive say it in exceptions of their own."""
    import tarfile

    fill(disk, 8192)
    big = torch.zeros(200_000)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256), np.uint8))

    def archive() -> None:
        with tarfile.open(disk / "a.tar", "w") as tar:
            tar.add(__file__, "a")
            tar.add(torch.__file__, "b")
            tar.add(np.__file__, "c")

    writers = {
        "a.pt": lambda: torch.save(big, disk / "a.pt"),
        "a.safetensors": lambda: save_file({"x": big}, disk / "a.safetensors"),
        "a.png": lambda: picture.save(disk / "a.png"),
        "a.tar": archive,
        "a.txt": lambda: (disk / "a.txt").write_text("x" * 100_000, encoding="utf-8"),
    }
    for name, write in writers.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011  # each its own
            write()
        said = faults.sentence(caught.value, caught.value)
        assert said is not None, (name, caught.value)
        assert said.startswith(f"{disk}/{name}: "), (name, said)
        (disk / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EDQUOT, "make room, then give the command again"),
        (errno.EROFS, "make it writable, then give the command again"),
        (errno.ENOENT, None),
    ],
)
def test_other_reasons_of_a_disk(number, said):
    error = OSError(number, os.strerror(number), "/x/metrics.csv")
    found = faults.sentence(error, error)
    assert found == (said and f"/x/metrics.csv: {os.strerror(number)}; {said}")


# -- shared memory ---------------------------------------------------------------------------------

NEWNS = 0x20000


def test_a_full_shared_memory_is_said_and_does_not_hang(pipelines, tmp_path):
    """In a process that sees a /dev/shm of its own, too small for a batch."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (512, 512)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a", encoding="utf-8")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writer, 1)
        with contextlib.suppress(BaseException):
            _read_with_little(pictures)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if said == "not permitted":
        pytest.skip("no file system can be mounted here")
    assert said.startswith(
        "True: /dev/shm has 1 MB and is too small for the batches of DataLoader workers"
    )
    assert "data.num_workers=0" in said


def _read_with_little(pictures: Path) -> None:
    from distill.config import errors
    from distill.data import source

    if ctypes.CDLL(None).unshare(NEWNS):
        os.write(1, b"not permitted")
        return
    mounts = ["mount --make-rprivate /", "mount -t tmpfs -o size=1m tmpfs /dev/shm"]
    if any(subprocess.run(m.split(), capture_output=True).returncode for m in mounts):
        os.write(1, b"not permitted")
        return
    made = source.images(str(pictures), size=512, batch_size=4, num_workers=1)
    try:
        next(iter(made.loader(seed=0)))
    except RuntimeError as error:
        os.write(1, f"{errors.is_mistake(error)}: {errors.sentence(error)}".encode())


# -- output that nobody takes ----------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="pipes")
@pytest.mark.parametrize("words", [["--help"], ["recipes"], ["run", "--help"]])
def test_a_reader_that_leaves_is_no_fault(words):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "distill", *words]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_what_is_printed_onto_a_full_disk_is_said(forks, tmp_path):
    run = "import runpy, sys; sys.argv[0] = 'distill'; runpy.run_module('distill', alter_sys=True,"
    words = ["check", "data=prompts", f"data.path={__file__}"]
    ended = forks.script(
        f"{run} run_name='__main__')", *words, out=Path("/dev/full"), err=tmp_path / "err.txt"
    )
    assert ended.wait(timeout=300) == 1
    said = ended.said().splitlines()[-1]
    assert said == f"distill: the output: No space left on device; make room, then {AGAIN}"


# -- trackers --------------------------------------------------------------------------------------


class Tracker(Logger):
    """One whose network is there or not."""

    name, version = "tracker", ""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.asked, self.rows = True, 0, 0

    def log_metrics(self, metrics, step=None):
        self.asked += 1
        if not self.there:
            raise RuntimeError("connection to tracker.example lost\nand more")
        self.rows += 1

    def log_hyperparams(self, *_, **__):
        pass


def test_a_tracker_that_fails_in_mid_run_ends_no_run(caplog):
    tracker = Tracker()
    guarded.guarded(tracker)
    tracker.log_metrics({"a": 1.0}, step=1)
    tracker.there = False
    tracker.log_metrics({"a": 1.0}, step=2)
    tracker.there = True  # for a moment: it counts in a row
    tracker.log_metrics({"a": 1.0}, step=3)
    tracker.there = False
    for step in range(4, 20):
        tracker.log_metrics({"a": 1.0}, step=step)
        tracker.save()
    assert (tracker.rows, tracker.asked) == (2, 3 + guarded.MAX_FAILURES)
    lines = [record.getMessage() for record in caplog.records]
    said = "Tracker cannot log (RuntimeError: connection to tracker.example lost)"
    assert lines == [
        f"{said}; the run continues, and metrics.csv has every row",
        f"{said}; the run continues, and metrics.csv has every row",
        f"{said}; it is no longer called, and metrics.csv has every row",
    ]


def test_a_tracker_that_never_worked_is_refused():
    tracker = Tracker()
    tracker.there = False
    guarded.guarded(tracker)
    with pytest.raises(
        OSError, match=r"Tracker cannot log .*; repair it, or leave it out as ~logg"
    ):
        tracker.log_metrics({"a": 1.0}, step=1)


def test_tensorboard_on_a_full_disk_ends_no_run(disk, caplog):
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = guarded.guarded(TensorBoardLogger(str(disk), name=None, version=""))
    logger.log_metrics({"a": 1.0}, step=1)
    logger.save()
    fill(disk, 0)
    for step in range(2, 2000):
        logger.log_metrics({f"a{i}": 1.0 for i in range(5)}, step=step)
        if step % 100 == 0:
            logger.save()
    logger.finalize("success")
    assert any("metrics.csv has every row" in r.getMessage() for r in caplog.records)
    (disk / "filling").unlink()


def test_the_table_of_a_run_is_never_lost_in_silence(disk):
    log = CsvLog(str(disk))
    log.log_metrics({"a": 1.0}, step=1)
    fill(disk, 0)

    def until_it_is_full() -> None:
        for step in range(2, 5000):
            log.log_metrics({"a": float(step)}, step=step)

    with pytest.raises(OSError) as caught:  # noqa: PT011
        until_it_is_full()
    assert faults.sentence(caught.value, caught.value).startswith(f"{disk}/metrics.csv: No space")
    rows = (disk / "metrics.csv").read_bytes()
    assert rows.endswith(b"\n")


def test_records_are_heard_again_when_the_last_of_two_threads_is_done():
    before = logging.root.manager.disable
    first, second = faults.quiet_logging(), faults.quiet_logging()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logging.root.manager.disable == logging.ERROR
    second.__exit__(None, None, None)
    assert logging.root.manager.disable == before
