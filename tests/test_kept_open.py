"""Shards that stay open between the samples of a process."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

import tiny
from distill.data.kept_open import MOST_OPEN, POSITIONED, KeptOpen
from distill.data.shards import Shards
from distill.data.source import latents

DESCRIPTORS = Path("/proc/self/fd")
pytestmark = pytest.mark.skipif(not POSITIONED, reason="no pread")
opened: list[str] = []  # names of files that were opened while a test listens
listening = [False]


def hear(event: str, arguments: tuple) -> None:
    if listening[0] and event == "open":
        opened.append(str(arguments[0]))


@pytest.fixture
def opens():
    """The files that are opened from here on."""
    if not hasattr(hear, "added"):
        sys.addaudithook(hear)
        hear.added = True
    opened.clear()
    listening[0] = True
    yield opened
    listening[0] = False


def test_a_shard_is_opened_once_for_all_samples(shards, opens):
    """And not for every sample and extension."""
    samples = Shards(str(shards))
    opens.clear()  # of the headers
    first = [samples.read(i) for i in range(len(samples))]
    assert len(first) > 2
    assert [samples.read(i) for i in range(len(samples))] == first
    read = [name for name in opens if name.endswith(".tar")]
    assert sorted(read) == sorted({sample["__url__"] for sample in first})


def test_a_shard_that_is_removed_meanwhile_is_read_on(tmp_path):
    tiny.write_shards(tmp_path / "data")
    samples = Shards(str(tmp_path / "data"))
    before = samples.read(0)
    for path in (tmp_path / "data").glob("*.tar"):
        path.unlink()
    assert samples.read(0) == before


def test_copies_and_workers_open_their_own(shards):
    """A data set is pickled for a worker that is no fork."""
    samples = Shards(str(shards))
    expected = [samples.read(i) for i in range(3)]
    for other in (pickle.loads(pickle.dumps(samples)), copy.deepcopy(samples)):
        assert [other.read(i) for i in range(3)] == expected


def test_forks_read_from_the_open_files_of_this_process(shards):
    """All at once, which a common position in a file would spoil."""

    def read(workers: int) -> list[torch.Tensor]:
        data = latents(str(shards), batch_size=2, num_workers=workers)
        for i in range(len(data.dataset)):
            data.dataset.shards.read(i)
        batches = iter(data.loader(seed=0))
        return [next(batches)["x0"] for _ in range(6)]

    alone, together = read(0), read(2)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(not DESCRIPTORS.is_dir(), reason="does not list open files")
def test_few_files_stay_open(tmp_path):
    for i in range(MOST_OPEN + 20):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i % 256]) * 10)
    kept, before = KeptOpen(), len(os.listdir(DESCRIPTORS))
    for i in range(MOST_OPEN + 20):
        assert kept.read(str(tmp_path / f"{i}.tar"), 4, 3) == bytes([i % 256]) * 3
    assert len(os.listdir(DESCRIPTORS)) - before == MOST_OPEN
    assert kept.read(str(tmp_path / "3.tar"), 8, 100) == bytes([3]) * 2
    with pytest.raises(FileNotFoundError, match="none.tar"):
        kept.read(str(tmp_path / "none.tar"), 0, 1)
    del kept
    assert len(os.listdir(DESCRIPTORS)) == before


def test_pictures_in_a_folder_do_not_stay_open(tmp_path):
    """Each is a file of its own, of which there may be millions."""
    tiny.write_pictures(tmp_path / "pictures", 4)
    samples = Shards(str(tmp_path / "pictures"))
    count = len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0
    assert all(samples.read(i) for i in range(len(samples)))
    assert count == (len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0)
