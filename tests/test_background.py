"""What a thread writes while training goes on: checkpoints from a copy, and sample pictures."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torchvision.utils import save_image

import kills
from distill.machine.hardware import memory, memory_available
from distill.storage.checkpoint_files import write_checkpoint
from distill.storage.pictures import write_grid
from distill.storage.staging import SHARE, Staging
from distill.training.beside import MOST_WAITING, BackgroundWriter
from distill.training.callbacks import Samples
from distill.training.checkpoints import AtomicIO, Checkpoints


def state() -> dict:
    """A state with all that a checkpoint may hold."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    whole = torch.randn(6, 5)
    return {
        "state_dict": model.state_dict(),  # ordered, with the versions of its modules
        "tied": [whole, whole.t(), whole[1:3]],
        "kinds": (torch.randn(7).bfloat16(), torch.tensor(3.0), torch.zeros(0), torch.arange(3)),
        "counts": {"seen": [[1.0, 2.0]], "last": None, 3: "x"},
    }


def grow(tree: dict) -> None:
    """Change a state in place, as training does."""
    for x in (*tree["state_dict"].values(), tree["tied"][0], *tree["kinds"]):
        x.add_(1)
    tree["counts"]["seen"].append([5.0])


def test_the_copy_gives_the_file_of_the_state(tmp_path):
    """Tied tensors stay tied, names keep their order, and later changes do not reach it."""
    staging = Staging()
    for name in ("first", "second"):  # the second one uses the memory of the first
        before = state()
        write_checkpoint(before, tmp_path / name / "step_000001.ckpt")
        copied = staging.copy(before)
        grow(before)
        write_checkpoint(copied, tmp_path / f"{name} copied" / "step_000001.ckpt")
        files = [tmp_path / f / "step_000001.ckpt" for f in (name, f"{name} copied")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert isinstance(copied["state_dict"], OrderedDict)
        assert copied["state_dict"]._metadata == before["state_dict"]._metadata


def test_copies_take_their_memory_once():
    staging, first = Staging(), state()
    places = [x.data_ptr() for x in staging.copy(first)["state_dict"].values()]
    grow(first)
    again = staging.copy(first)["state_dict"]
    assert [x.data_ptr() for x in again.values()] == places
    assert torch.equal(again["0.weight"], first["state_dict"]["0.weight"])
    more = staging.copy({**first, "more": torch.ones(9)})  # as the first step of an optimiser adds
    assert torch.equal(more["more"], torch.ones(9))


def test_what_does_not_fit_into_the_free_memory_is_not_copied():
    """The memory of the large tensor is never touched."""
    assert 0 < memory_available() <= memory()
    staging = Staging()
    assert staging.copy({"x": torch.ones(4)}) is not None
    large = int(1.1 * SHARE * memory_available())
    assert staging.copy({"x": torch.empty(large, dtype=torch.uint8)}) is None
    assert staging.refused == large


def test_a_save_waits_for_the_copy_and_not_for_the_disk(tmp_path):
    writer, path = BackgroundWriter(), tmp_path / "step_000001.ckpt"
    large = torch.zeros(2**24)
    writer.save({"x": large}, path)
    assert not path.exists()
    large += 1  # training goes on
    writer.finish()
    assert torch.load(path, weights_only=True)["x"].count_nonzero() == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_one_checkpoint_is_in_flight(tmp_path):
    """The next one takes its memory: it waits until the one before is complete."""
    writer, value = BackgroundWriter(), torch.zeros(2**22)
    for step in range(3):
        if step:
            writer.save({"x": value}, tmp_path / f"step_{step:06d}.ckpt")
            assert all((tmp_path / f"step_{n:06d}.ckpt").exists() for n in range(1, step))
        value += 1
    writer.finish()
    for step in (1, 2):
        kept = torch.load(tmp_path / f"step_{step:06d}.ckpt", weights_only=True)["x"]
        assert (kept == step).all()


def test_what_cannot_be_copied_is_written_at_once(tmp_path):
    class Own(torch.nn.Parameter):
        """As a sharded tensor, one of a class of its own."""

    writer, path = BackgroundWriter(), tmp_path / "step_000001.ckpt"
    writer.save({"x": Own(torch.ones(3)).data.as_subclass(Own)}, path)
    assert path.exists()


def test_jobs_run_in_order_and_few_wait():
    writer, ran, may_go = BackgroundWriter(), [], threading.Event()

    def job(number: int) -> None:
        may_go.wait()
        ran.append(number)

    threading.Timer(0.2, may_go.set).start()
    for number in range(MOST_WAITING + 1):
        writer.submit(job, number)
    assert ran == []
    writer.submit(job, MOST_WAITING + 1)  # waits until the first has run
    assert ran
    writer.finish()
    assert ran == list(range(MOST_WAITING + 2))


def test_after_a_failed_write_nothing_is_removed_and_the_run_ends(tmp_path):
    """A retention that ran would remove the last checkpoints that can be resumed."""
    checkpoints = Checkpoints(every=1, keep=1)
    checkpoints.folder = tmp_path / "checkpoints"
    files = AtomicIO()
    trainer = SimpleNamespace(
        world_size=1, should_stop=False, max_steps=9, callback_metrics={}, loggers=[],
        is_global_zero=True, strategy=SimpleNamespace(checkpoint_io=files),
        save_checkpoint=lambda path: files.save_checkpoint({"x": torch.ones(3)}, path),
    )  # fmt: skip
    settled = {"last_logged": {}, "settle": lambda: None}
    loop = SimpleNamespace(updated=True, due=lambda *_: True, **settled)
    for step in (1, 2):
        checkpoints.on_train_batch_end(trainer, SimpleNamespace(step=step, loop=loop))
    checkpoints.writer.join()
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step_000002.ckpt"]
    (checkpoints.folder / "step_000003.ckpt").mkdir()  # what cannot be replaced by a file
    checkpoints.on_train_batch_end(trainer, SimpleNamespace(step=3, loop=loop))
    later = SimpleNamespace(
        step=4, loop=SimpleNamespace(updated=False, due=lambda *_: False, **settled)
    )

    def go_on() -> None:
        for _ in range(10_000):
            checkpoints.on_train_batch_end(trainer, later)
            time.sleep(0.001)

    with pytest.raises(OSError, match=r"cannot write the checkpoint .*step_000003.ckpt"):
        go_on()  # at the end of one of the next iterations
    assert (checkpoints.folder / "step_000002.ckpt").is_file()
    checkpoints.on_exception(trainer, None, KeyboardInterrupt())
    assert not [t for t in threading.enumerate() if t.name.startswith("distill-writer")]


@pytest.mark.slow
def test_a_run_writes_the_same_files_beside_training(command, pipelines, shards, tmp_path):
    """Checkpoints, the best of them, rows and pictures; the thread has ended with training."""
    words = [
        "debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics",
        "trainer.max_steps=5", "callbacks.checkpoint.every=1", "callbacks.checkpoint.archive=2",
        "callbacks.checkpoint.best=g/grad_norm", "callbacks.samples.every=2",
    ]  # fmt: skip
    found = {}
    for background in ("true", "false"):
        folder = tmp_path / background
        key = f"callbacks.checkpoint.background={background}"
        assert command("run", *words, key, f"run_dir={folder}")[0] == 0
        found[background] = {
            name: said
            for name, said in kills.snapshot(folder).items()
            if name.startswith(("checkpoints/", "samples/", "metrics.csv"))
        }
    assert found["true"] == found["false"]
    assert len([name for name in found["true"] if name.endswith((".ckpt", ".png"))]) == 8
    assert not [t for t in threading.enumerate() if t.name.startswith("distill-writer")]


def test_pictures_are_those_of_torchvision(tmp_path):
    pictures = torch.rand(5, 3, 6, 7)
    write_grid(pictures, tmp_path / "ours.png", nrow=3)
    save_image(pictures, tmp_path / "theirs.png", nrow=3)
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()


@pytest.mark.slow
def test_pictures_on_the_way_wait_for_the_thread(command, pipelines, shards, tmp_path):
    """The thread of the checkpoints writes them, so that a step's pictures come before its
    checkpoint.
    """
    from distill.config import build
    from distill.run import compose

    words = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}"]
    assert command("run", *words, "~metrics", "run_dir=run", "trainer.max_steps=1")[0] == 0
    cfg = compose.read_unchecked(tmp_path / "run")
    for background in (True, False):
        cfg.callbacks.checkpoint.background = background
        made = build.trainer(cfg, tmp_path / "other", {}).callbacks
        samples = next(c for c in made if isinstance(c, Samples))
        checkpoints = next(c for c in made if isinstance(c, Checkpoints))
        assert samples.writer is checkpoints.writer
        assert (samples.writer is not None) == background
