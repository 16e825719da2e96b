"""Shards that stay open between the samples of a process."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
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


def broken(kept: KeptOpen, path: Path) -> None:
    """Break the open handle of a file: reads of it fail, as with ESTALE."""
    folder = os.open(path.parent, os.O_RDONLY)
    os.dup2(folder, kept._opened(str(path)).handle.number)
    os.close(folder)


def test_a_file_whose_handle_breaks_is_opened_again(tmp_path):
    path, kept = tmp_path / "a.tar", KeptOpen()
    path.write_bytes(b"0123456789")
    assert kept.read(str(path), 2, 3) == b"234"
    broken(kept, path)
    assert kept.read(str(path), 2, 3) == b"234"
    number = kept._opened(str(path)).handle.number
    os.close(number)  # by somebody else
    assert kept.read(str(path), 4, 2) == b"45"
    assert kept.read(str(path), 4, 2) == b"45"


def test_another_file_in_its_place_is_not_read_at_its_positions(tmp_path):
    path, kept = tmp_path / "a.tar", KeptOpen()
    path.write_bytes(b"0123456789")
    kept.read(str(path), 2, 3)
    (tmp_path / "new").write_bytes(b"abcdefghij")
    os.utime(tmp_path / "new", (0, 0))
    os.replace(tmp_path / "new", path)
    assert kept.read(str(path), 2, 3) == b"234"  # of the file that is still open
    broken(kept, path)
    with pytest.raises(ValueError, match=r"a\.tar' has been replaced by another since"):
        kept.read(str(path), 2, 3)
    path.unlink()
    broken(kept, path)
    with pytest.raises(FileNotFoundError, match=r"a\.tar"):
        kept.read(str(path), 2, 3)


LOW = """
import resource, sys
from distill.data.kept_open import KeptOpen
kept, paths = KeptOpen(), sys.argv[1:]
for path in paths[:40]:
    assert kept.read(path, 4, 3) == b"456"
open(paths[0]).close()
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))  # as if others had taken the rest
for path in paths:
    assert kept.read(path, 4, 3) == b"456"
"""


@pytest.mark.parametrize("limit", ["48", "1024"])
def test_a_low_limit_of_open_files_leaves_some_for_others(tmp_path, limit):
    pytest.importorskip("resource")
    paths = [tmp_path / f"{i}.tar" for i in range(60)]
    for path in paths:
        path.write_bytes(b"0123456789")
    words = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-c", LOW]
    subprocess.run([*words, *map(str, paths)], check=True)


def test_pictures_in_a_folder_do_not_stay_open(tmp_path):
    """Each is a file of its own, of which there may be millions."""
    tiny.write_pictures(tmp_path / "pictures", 4)
    samples = Shards(str(tmp_path / "pictures"))
    count = len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0
    assert all(samples.read(i) for i in range(len(samples)))
    assert count == (len(os.listdir(DESCRIPTORS)) if DESCRIPTORS.is_dir() else 0)
