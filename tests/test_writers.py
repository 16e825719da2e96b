"""One writer of a folder, files that are whole or absent, and names that are not ours."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from distill.config import typed
from distill.machine import alive
from distill.storage import atomic as aside
from distill.storage import locks
from distill.storage.checkpoint_names import checkpoints_at, steps_in
from distill.storage.locks import check_free, holder_of, one_writer, one_writer_of
from distill.teachers.loading import weights

STRANGE = ("step_000002_good.ckpt", "step_000002 (copy).ckpt", "._step_000003.ckpt", ".DS_Store")
posix = pytest.mark.skipif(os.name != "posix", reason="signals")


def arguments(pipelines, shards, folder, steps):
    options = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", steps]
    options += ["data.num_workers=0", "callbacks.checkpoint.every=1", "~metrics"]
    return [*options, "loop.head_start=0", f"run_dir={folder}"]


def other(text: str, *arguments: object) -> subprocess.Popen:
    """Another process, which says a line when it is ready."""
    code = textwrap.dedent(text)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


HOLD = """
    import sys, time
    from pathlib import Path
    from distill.storage.locks import one_writer, one_writer_of
    lock = {"folder": one_writer, "file": one_writer_of}[sys.argv[2]]
    with lock(Path(sys.argv[1]), "out"):
        print("ready", flush=True)
        time.sleep(600)
"""
LAUNCH = """
    import os, subprocess, sys, time
    from pathlib import Path
    from distill.storage.locks import one_writer, share_locks
    with one_writer(Path(sys.argv[1]), "out"):
        environment = dict(os.environ)
        code = "from distill.storage.locks import adopt; adopt(); import time; time.sleep(3)"
        subprocess.Popen([sys.executable, "-c", code], env=environment, **share_locks(environment))
        print("ready", flush=True)
        time.sleep(600)
"""


@posix
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_second_writer_is_refused_in_words_and_a_killed_one_holds_nothing(kind, tmp_path, capsys):
    target, lock = tmp_path / "made", {"folder": one_writer, "file": one_writer_of}[kind]
    first = other(HOLD, target, kind)
    try:
        who = holder_of(target)
        assert (who.pid, who.host) == (first.pid, alive.host())
        words = rf"out={target}: process {first.pid} on {alive.host()} since 20.* writes there"
        with pytest.raises(BlockingIOError, match=words), lock(target, "out"):
            pass
        with pytest.raises(BlockingIOError, match=words):
            check_free(target, "out")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(timeout=60)
    assert holder_of(target) is None
    check_free(target, "out")
    with lock(target, "out"):
        assert holder_of(target).pid == os.getpid()
        said = capsys.readouterr().out
        assert f"process {first.pid} on {alive.host()} since 20" in said
        assert "was killed; taking its place" in said
    assert [p.name for p in tmp_path.rglob("*")] == ["made"] * (kind == "folder")  # no lock stays


@posix
def test_a_lock_lasts_as_long_as_what_its_holder_has_started(tmp_path):
    launcher = other(LAUNCH, tmp_path / "run")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait(timeout=60)
    assert holder_of(tmp_path / "run") is not None  # the worker lives, and may be saving
    began = time.monotonic()
    with one_writer(tmp_path / "run", "resume"):  # waits for it
        assert time.monotonic() - began > 0.5


def words(folder: Path, **more: object) -> Path:
    said = {"host": "node7", "pid": 4711, "started": "12", "since": "2026-01-31 12:00:00+00:00"}
    said |= {"command": "python -m distill.run", "job": None, **more}
    folder.mkdir(exist_ok=True)
    (folder / locks.NAME).write_text(json.dumps(said), encoding="utf-8")
    return folder


def test_a_lock_of_another_machine_is_refused_with_what_to_remove(tmp_path):
    folder = words(tmp_path / "run")
    assert holder_of(folder).host == "node7"
    said = "process 4711 on node7 since 2026-01-31 12:00:00\\+00:00"
    for refused in (
        lambda: one_writer(folder, "resume").__enter__(),
        lambda: check_free(folder, "resume"),
    ):
        with pytest.raises(BlockingIOError, match=said) as error:
            refused()
        assert f"if it has ended, remove {folder / locks.NAME}" in str(error.value)
    (folder / locks.NAME).unlink()
    with one_writer(folder, "resume"):
        pass


def test_slurm_goes_on_with_a_job_on_another_machine(tmp_path, monkeypatch):
    folder = words(tmp_path / "run", job="17")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(BlockingIOError), one_writer(folder, "resume"):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    check_free(folder, "resume")
    with one_writer(folder, "resume"):
        pass


def test_a_number_that_was_given_again_is_another_process(tmp_path):
    me = os.getpid()
    assert alive.alive(me)
    assert alive.alive(me, alive.start_time(me))
    if alive.start_time(me) is not None:
        assert not alive.alive(me, "0")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    assert not alive.alive(ended.pid)


@pytest.fixture
def no_locks(monkeypatch):
    """A file system whose files cannot be locked."""
    monkeypatch.setattr(locks, "_try_lock", lambda *_, **__: None)


@posix
def test_where_files_cannot_be_locked_the_words_decide(no_locks, tmp_path):
    me, here = os.getpid(), alive.host()
    folder = words(tmp_path / "run", host=here, pid=me, started=alive.start_time(me))
    assert holder_of(folder).pid == me
    with pytest.raises(BlockingIOError, match=f"process {me} on {here}"), one_writer(folder, "out"):
        pass
    words(folder, host=here, pid=me, started="0")  # the number was given again
    assert holder_of(folder) is None
    with one_writer(folder, "out"):
        assert holder_of(folder).pid == me
    assert not (folder / locks.NAME).exists()


def test_one_process_may_ask_twice_and_those_of_a_launcher_pass(tmp_path, monkeypatch):
    with one_writer(tmp_path / "run", "run_dir"), one_writer(tmp_path / "run", "run_dir"):
        check_free(tmp_path / "run", "run_dir")
        monkeypatch.setenv("RANK", "1")
        with one_writer(tmp_path / "run", "run_dir"):
            pass
        monkeypatch.delenv("RANK")
        assert (tmp_path / "run" / locks.NAME).exists()
    assert not (tmp_path / "run").exists()


@posix
def test_a_forked_process_holds_nothing(tmp_path):
    with one_writer(tmp_path / "run", "run_dir"):
        child = os.fork()
        if not child:  # a worker of a loader, which outlives the run for some seconds
            time.sleep(3)
            os._exit(0)
        (tmp_path / "run" / "config.yaml").touch()
    with one_writer(tmp_path / "run", "resume"):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.waitpid(child, 0)


# -- whole files -----------------------------------------------------------------------------------


def part(name: str, pid: int, machine: str | None = None) -> str:
    return f"{name}.{machine or alive.host_hash()}-{pid}-0123abcd.part"


def test_only_what_killed_writers_left_is_swept(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    (tmp_path / part("student", ended.pid)).mkdir()
    (tmp_path / part("student", ended.pid) / "model_index.json").touch()
    (tmp_path / "samples").mkdir()
    left = [
        part("run.json", ended.pid),
        "step_000002.ckpt.part",
        f"samples/{part('a.png', ended.pid)}",
    ]
    stay = [
        part("run.json", os.getpid()),  # being written
        part("run.json", 1, machine="0000"),  # by another machine, and new
        "film.part",
        "notes.txt.part",
        "run.json.12345678.part",
        "step_000002 (copy).ckpt",
    ]
    for name in (*left, *stay):
        (tmp_path / name).write_bytes(b"x")
    os.utime(tmp_path / part("run.json", 1, machine="0000"))
    assert aside.remove_leftovers(tmp_path, deep=True) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*stay, "samples"])
    assert list((tmp_path / "samples").iterdir()) == []
    old = tmp_path / part("run.json", 1, machine="0000")
    os.utime(old, (0, 0))
    assert aside.remove_leftovers(tmp_path, of="config.yaml") == 0
    assert aside.remove_leftovers(tmp_path, of="run.json") == 1
    assert not old.exists()


def fails_half_way(folder):
    (folder / "b").mkdir(parents=True)
    folder.mkdir()


def test_a_folder_takes_the_place_of_another_only_when_whole(tmp_path):
    folder = tmp_path / "student"
    with aside.atomic_folder(folder) as new:
        new.mkdir()
        (new / "a").write_bytes(b"1")
    with pytest.raises(FileExistsError), aside.atomic_folder(folder) as new:
        fails_half_way(new)
    assert [p.name for p in folder.iterdir()] == ["a"]
    with aside.atomic_folder(folder) as new:
        new.mkdir()
        (new / "b").write_bytes(b"2")
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_two_writers_of_one_file_do_not_share_a_part_and_names_fit(tmp_path):
    assert aside.temporary_path(tmp_path / "a") != aside.temporary_path(tmp_path / "a")
    long = tmp_path / ("\N{GRINNING FACE}" * 60 + ".png")  # 244 bytes of the 255 that there are
    aside.write_atomic(long, b"x")
    assert [p.name for p in tmp_path.iterdir()] == [long.name]


# -- names that are not ours -----------------------------------------------------------------------


def test_files_of_other_names_are_no_checkpoints(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (
        *STRANGE,
        "step_000002.ckpt",
        "step_999999.ckpt",
        "step_1000000.ckpt",
        "step_7.ckpt",
    ):
        (folder / name).touch()
    steps = [2, 999_999, 1_000_000]
    assert list(steps_in(folder, ".ckpt")) == steps
    assert [p.name for p in checkpoints_at(tmp_path)] == [f"step_{n:06d}.ckpt" for n in steps[::-1]]
    named = checkpoints_at(folder / "step_000002_good.ckpt")
    assert [p.name for p in named] == ["step_000002_good.ckpt"]


@pytest.mark.slow
def test_a_run_saves_on_beside_files_of_other_names(command, pipelines, shards, tmp_path):
    """Copies of a checkpoint and what systems leave end no run, are not counted, and stay."""
    folder, steps = tmp_path / "run", "callbacks.samples.every=1"
    options = arguments(pipelines, shards, folder, steps="trainer.max_steps=2")
    assert command("run", *options, steps)[0] == 0
    for name in STRANGE:
        (folder / "checkpoints" / name).write_bytes(b"mine")
        (folder / "samples" / name.replace(".ckpt", ".png")).write_bytes(b"mine")
    (folder / "checkpoints" / "step_000009_best.ckpt").write_bytes(b"mine")
    code, out, err = command("run", f"resume={folder}", "trainer.max_steps=4", steps)
    assert (code, err) == (0, "")
    names = {p.name for p in (folder / "checkpoints").iterdir()}
    assert names == {*STRANGE, "step_000009_best.ckpt", "step_000003.ckpt", "step_000004.ckpt"}
    assert "abandoned" not in out
    assert not list(folder.rglob("*.part"))
    assert not list(folder.rglob(f"*{locks.NAME}"))


@pytest.mark.slow
@posix
def test_commands_refuse_a_folder_that_another_process_writes(command, pipelines, shards, tmp_path):
    """In one sentence, before weights are read; and nothing of the other's is touched."""
    folder = tmp_path / "run"
    assert (
        command("run", *arguments(pipelines, shards, folder, steps="trainer.max_steps=1"))[0] == 0
    )
    (tmp_path / "prompts.txt").write_text("a star\n", encoding="utf-8")
    prompts, teacher = "prompts=prompts.txt", f"teacher.path={pipelines('mmdit')}"
    tries = {
        "resume": ("run", f"resume={folder}", "trainer.max_steps=2"),
        "run": ("evaluate", f"run={folder}", "metrics.prompts=4"),
        "out": ("sample", f"run={folder}", prompts, f"out={folder}"),
    }
    made = ("synthesize", teacher, prompts, f"out={folder}")
    card = ("export", f"run={folder}", "to=diffusers")
    writer = other(HOLD, folder, "folder")
    (folder / part("metrics.csv", writer.pid)).write_bytes(b"x")
    before = sorted(folder.rglob("*"))
    try:
        asked = [
            *tries.items(),
            ("out", made),
            ("run", card),
            ("out", ("pretrain", f"out={folder}")),
        ]
        for key, words in [*asked, ("out", ("search", 'space=["seed=int(0,1)"]', f"out={folder}"))]:
            code, _, err = command(*words)
            said = f"distill: {key}={folder}: process {writer.pid} on {alive.host()} since 20"
            assert (code, err.startswith(said), len(err.splitlines())) == (1, True, 1), (words, err)
        assert sorted(folder.rglob("*")) == before
        elsewhere = ("export", f"run={folder}", "to=diffusers", f"out={tmp_path / 'student'}")
        assert command(*elsewhere)[0] == 0  # which only reads there
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=60)
    assert [p for p in (tmp_path / "student").rglob("*") if locks.NAME in p.name] == []
    assert command(*tries["resume"])[0] == 0
    assert not list(folder.rglob("*.part"))


def test_what_a_command_makes_counts_its_own_shards_alone(command, pipelines, tmp_path):
    from distill.data.shards import Shards

    (tmp_path / "prompts.txt").write_text("a star\na ring\n", encoding="utf-8")
    options = (f"teacher.path={pipelines('mmdit')}", "prompts=prompts.txt", "out=made", "steps=1")
    assert command("synthesize", *options, "count=4", "per_shard=2")[0] == 0
    made = tmp_path / "made"
    first = (made / "latents-000000.tar").read_bytes()
    for name in ("latents-000000 (copy).tar", "._latents-000000.tar", "latents-000001.old.tar"):
        (made / name).write_bytes(first)
    (made / ".DS_Store").touch()
    found = Shards(str(made))
    assert len(found) == 4
    assert any(
        "shards of other names than distill gives are not read (2, " in s for s in found.said
    )
    (made / "manifest.json").unlink()
    (made / "latents-000001.tar").unlink()
    code, out, err = command("synthesize", *options, "count=4", "per_shard=2")
    assert (code, "made: 4 samples in 2 shards" in out) == (0, True), err
    assert len(list(made.iterdir())) == 10  # two shards, four of its own beside, four that stay


def test_a_sheet_of_samples_is_no_picture_and_anyones_own_is(tmp_path):
    from distill.evaluation.references import pictures_in

    for name in ("grid.png", "castle.png", ".hidden.png"):
        (tmp_path / name).touch()
    assert [p.name for p in pictures_in(tmp_path)] == ["castle.png", "grid.png"]
    (tmp_path / "a_star_1step_seed0_12ab.png").touch()
    names = ["a_star_1step_seed0_12ab.png", "castle.png"]
    assert [p.name for p in pictures_in(tmp_path)] == names


def test_a_line_of_times_that_a_kill_has_cut_is_left_out(tmp_path):
    from distill.evaluation.prompted import _seconds

    (tmp_path / "seconds-0.txt").write_text("2.0 4\n1.0", encoding="utf-8")
    (tmp_path / "seconds-1.txt").write_text("6.0 4\n3.5 ", encoding="utf-8")
    (tmp_path / "seconds-1 (copy).txt").write_text("6.0 4\n", encoding="utf-8")
    assert _seconds(tmp_path) == {"seconds_per_image": 1.0}


@pytest.mark.slow
def test_a_run_whose_facts_are_damaged_goes_on(command, pipelines, shards, tmp_path):
    folder = tmp_path / "run"
    assert (
        command("run", *arguments(pipelines, shards, folder, steps="trainer.max_steps=1"))[0] == 0
    )
    (folder / "run.json").write_text('{"name": "lad', encoding="utf-8")
    assert command("run", f"resume={folder}", "trainer.max_steps=2")[0] == 0
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.parametrize("said", ["{}", "[1]", '{"pid": ' + "[" * 20_000])
def test_a_lock_that_says_nothing_that_can_be_read_holds_nothing(said, tmp_path):
    (tmp_path / locks.NAME).write_text(said, encoding="utf-8")
    check_free(tmp_path, "out")
    with one_writer(tmp_path, "out"):
        assert holder_of(tmp_path) is not None


def test_a_library_may_write_beside_the_file(tmp_path, monkeypatch):
    """safetensors does, under a name of its own: whatever a kill leaves is one part that the next
    writer removes.
    """
    seen, save = [], weights.save_file

    def littering(state, file, said):
        (file.parent / ".tmpx4711").write_bytes(b"x")
        seen.extend(path.name for path in tmp_path.iterdir())
        save(state, file, said)

    monkeypatch.setattr(weights, "save_file", littering)
    written = weights.write_weights({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert len(seen) == 1
    assert aside.PART.fullmatch(seen[0])
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_others_may_read_what_they_may_read_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    with aside.atomic_folder(tmp_path / "student") as part:
        (part / "unet").mkdir(parents=True)
        weights.save_file({"a": torch.ones(2)}, part / "unet" / "a.safetensors")
    written = weights.write_weights({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    for file in (written, tmp_path / "student" / "unet" / "a.safetensors"):
        assert file.stat().st_mode == usual


# -- a folder that a stranger has made -------------------------------------------------------------


@posix
@pytest.mark.parametrize("name", [".distill.lock", ".run.distill.lock"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_what_it_points_to_stays(kind, name, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine", encoding="utf-8")
    folder = tmp_path / "run"
    folder.mkdir()
    lock = folder / name if name == locks.NAME else tmp_path / name
    make = {"link": lambda: lock.symlink_to(victim), "pipe": lambda: os.mkfifo(lock)}
    make["hard link"] = lambda: lock.hardlink_to(victim)
    make.get(kind, lock.mkdir)()
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"out={folder}: {lock} is .*remove it"):
        check_free(folder, "out")
    writer = one_writer if name == locks.NAME else one_writer_of
    with pytest.raises(ValueError, match=rf"out={folder}: {lock} is "), writer(folder, "out"):
        pass
    assert victim.read_text(encoding="utf-8") == "mine"
    assert holder_of(folder) is None
    assert time.monotonic() - began < 2


ODD = [
    *("run.log", "metrics.csv", "alarms.jsonl", "hparams.yaml", "checkpoints", "samples"),
    *("evaluation", "inspect", "student", "processes", "checkpoints/abandoned"),
    *("evaluation/student-1-00000000", "evaluation/x/seconds-0.txt"),
]


@posix
@pytest.mark.parametrize("name", ODD)
def test_no_name_that_is_written_may_lead_out_of_the_folder(name, tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = folder / name
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    for asked in (lambda: check_free(folder, "run"), lambda: one_writer(folder, "run").__enter__()):
        with pytest.raises(ValueError, match=rf"run={folder}: {link} is a link out of the folder"):
            asked()
    monkeypatch.setenv("DISTILL_TRUST_RUN", str(folder))
    with one_writer(folder, "run"):
        pass
    link.unlink()
    os.mkfifo(link)  # nobody's word makes that a file
    with pytest.raises(ValueError, match="is no regular file"):
        check_free(folder, "run")


IN_PLACE = [
    *("run.log", "metrics.csv", "alarms.jsonl", "hparams.yaml", "study.db"),
    *("processes/7.log", "evaluation/student-1-00000000/seconds-0.txt"),
]


@posix
def test_what_is_appended_does_not_reach_a_hard_link_of_the_file(tmp_path):
    """Such as another file of this user, or the backup that `cp -al` makes."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    others = [elsewhere / str(i) for i in range(len(IN_PLACE))]
    for name, other in zip(IN_PLACE, others, strict=True):
        other.write_text("mine", encoding="utf-8")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).hardlink_to(other)
    with one_writer(folder, "run"):
        for name in IN_PLACE:
            with (folder / name).open("a", encoding="utf-8") as file:
                file.write(" and more")
    assert {other.read_text(encoding="utf-8") for other in others} == {"mine"}
    assert {(folder / name).read_text(encoding="utf-8") for name in IN_PLACE} == {"mine and more"}


@posix
def test_links_that_nothing_is_written_through_stay(tmp_path):
    disk, folder = tmp_path / "disk", tmp_path / "run"
    (disk / "checkpoints").mkdir(parents=True)
    folder.symlink_to(disk)  # a run on a larger disk
    (disk / "data").symlink_to(tmp_path)
    (disk / "samples").symlink_to(disk / "checkpoints")
    (disk / "checkpoints" / "best.ckpt").symlink_to("step_000001.ckpt")
    check_free(folder, "run")
    with one_writer(folder, "run", deep=True):
        assert (folder / "data").is_dir()


SHARE = """
    import fcntl, os, sys, time
    file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    print("ready", flush=True)
    time.sleep(600)
"""


@posix
def test_a_lock_that_states_no_holder_is_answered_at_once(tmp_path):
    process = other(SHARE, tmp_path / locks.NAME)
    try:
        began = time.monotonic()
        with (
            pytest.raises(BlockingIOError, match="another process writes there"),
            one_writer(tmp_path, "out"),
        ):
            pass
        assert time.monotonic() - began < 2
    finally:
        process.kill()
        process.wait(timeout=60)


def test_a_lock_holds_no_secrets(tmp_path, monkeypatch):
    words = ["+logger.c.password=correct horse battery", "x.uri=http://me:4711@host/x"]
    typed.register_secrets(words)
    monkeypatch.setattr(sys, "argv", ["distill.run", *words, "seed=1"])
    with one_writer(tmp_path, "out"):
        said = (tmp_path / locks.NAME).read_text(encoding="utf-8")
    assert "seed=1" in said
    assert "+logger.c.password=***" in said
    assert "http://***@host/x" in said
    assert "horse" not in said
    assert "4711" not in said.replace(f'"pid": {os.getpid()}', "")
