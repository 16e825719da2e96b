"""Shards in stores: the same samples in the same order as on this disk, and stores that fail."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from distill.data import source, stores
from distill.data.cache import Cache
from served import serve

pytestmark = pytest.mark.usefixtures("own_store_cache")
CACHED, ONE_BY_ONE = 1.0, 0.0  # data.cache_gb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of eight latents each, with their manifest's like beside them."""
    import numpy as np

    from distill.data.write import write_latents

    made = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(5)
    latents = ((f"{i:04d}", random.standard_normal((4, 8, 8)), f"caption {i}") for i in range(24))
    write_latents(str(made / "x-%03d.tar"), latents, per_shard=8)
    return made


@pytest.fixture
def memory(folder):
    """The same shards in memory://."""
    fs = fsspec.filesystem("memory")
    for file in folder.glob("*.tar"):
        fs.pipe_file(f"/bucket/deep/{file.name}", file.read_bytes())
    yield "memory://bucket/deep"
    fs.rm("/bucket", recursive=True)


def batches(path, count=7, workers=0, **options):
    keys = {"seed": 3, "rank": 0, "world": 1, "start": 0}
    order = {key: options.pop(key, value) for key, value in keys.items()}
    data = source.latents(str(path), batch_size=4, num_workers=workers, **options)
    return list(itertools.islice(data.loader(**order), count)), data


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a["key"] == b["key"]
        assert a["caption"] == b["caption"]
        assert torch.equal(a["x0"], b["x0"])


def files_of(folder: Path):
    return sorted(p.name for p in folder.glob("*.tar"))


# -- the same as on this disk ----------------------------------------------------------------------


@pytest.mark.parametrize("gb", [CACHED, ONE_BY_ONE])
@pytest.mark.parametrize(
    "order", [{}, {"start": 5}, {"rank": 1, "world": 2}], ids=["fresh", "resumed", "second rank"]
)
def test_the_same_samples_in_the_same_order(gb, order, folder, memory, tmp_path):
    found, data = batches(memory, cache_gb=gb, **order)
    expected, local = batches(folder, **order)
    same(found, expected)
    assert data.dataset.shards.digest() == local.dataset.shards.digest()
    assert len(files_of(tmp_path / "cache" / "distill" / "shards")) == (3 if gb else 0)


@pytest.mark.parametrize(
    "pattern", ["/", "/x-{000..002}.tar", "/x-*.tar", "/x-{000,002}.tar", "/x-001.tar", "/.."]
)
def test_patterns(pattern, folder, memory):
    ends = pattern if pattern != "/.." else "/"
    path = memory if pattern != "/.." else "memory://bucket"  # below a folder without shards
    found, _ = batches(f"{path}{ends}")
    expected, _ = batches(f"{folder}{ends}")
    same(found, expected)


@pytest.mark.parametrize("gb", [CACHED, ONE_BY_ONE])
def test_a_server_and_its_workers(gb, folder):
    """Two workers read what one process reads, and no shard is fetched twice."""
    with serve(folder) as served:
        path = f"{served.url}/x-{{000..002}}.tar"
        found, _ = batches(path, workers=2, cache_gb=gb)
        same(found, batches(folder)[0])
        if gb:
            assert [served.fetched(f"x-00{i}.tar") for i in range(3)] == [1, 1, 1]
            before = len(served.asked)
            same(batches(path, cache_gb=gb)[0], found)  # another run: from the disk
            asked = served.asked[before:]
            assert not [path for method, path in asked if method == "GET" and "x-00" in path]


def test_a_full_cache_makes_room_for_this_run_alone(folder, memory, tmp_path):
    place = tmp_path / "c"
    gb = 2.5 * (folder / "x-000.tar").stat().st_size / 1e9
    batches(f"{memory}/x-000.tar", cache_dir=str(place), cache_gb=gb)
    (mine := place / "notes.txt").write_text("no shard of ours", encoding="utf-8")
    (first,) = files_of(place)
    found, _ = batches(f"{memory}/x-{{001..002}}.tar", cache_dir=str(place), cache_gb=gb)
    assert first not in files_of(place)
    assert len(files_of(place)) == 2
    assert mine.exists()
    same(found, batches(f"{folder}/x-{{001..002}}.tar")[0])
    found, _ = batches(memory, cache_dir=str(place), cache_gb=gb)  # two of three fit
    assert len(files_of(place)) == 2
    same(found, batches(folder)[0])
    assert not list(place.glob("*.part"))


def test_a_copy_that_another_run_removes_is_fetched_by_samples(folder, memory, tmp_path):
    data = source.latents(memory, batch_size=4, cache_dir=str(tmp_path / "c"))
    shutil.rmtree(tmp_path / "c")
    found = list(itertools.islice(data.loader(seed=3), 7))
    same(found, batches(folder)[0])


def test_another_version_of_a_shard_is_another_copy(folder, memory, tmp_path):
    batches(f"{memory}/x-000.tar")
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/deep/x-000.tar", (folder / "x-001.tar").read_bytes())
    stores.listed.cache_clear()
    found, _ = batches(f"{memory}/x-000.tar")
    same(found, batches(f"{folder}/x-001.tar")[0])


def test_what_is_beside_the_shards_comes_along(folder, memory):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/deep/making.yaml", b"a: 1\n")
    with pytest.raises(ValueError, match="its shard job is not finished"):
        batches(memory)


# -- stores that fail ------------------------------------------------------------------------------


@pytest.fixture
def words(pipelines):
    given = [f"teacher.path={pipelines('mmdit')}", "run_dir=run", "~metrics", "~logger"]
    return ["debug=smoke", "data=latents", *given, "trainer.max_steps=2"]


def refused(command, tmp_path, *typed):
    code, _, err = command("run", *typed)
    assert code == 1
    assert not (tmp_path / "run").exists()
    return [line for line in err.splitlines() if line.startswith("distill: ")][-1]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("ftp://h/x.tar", "is no address that is read; there are s3://, "),
        ("memory://a::file:///etc/x.tar", "is no address that is read"),
        ("memory://nowhere/x.tar", "there is nothing at this address; check it"),
        (
            "memory://nowhere/*.tar",
            "holds no .tar or .parquet file; check the address and the pattern",
        ),
    ],
)
def test_an_address_that_is_wrong(path, said, command, words, tmp_path):
    assert said in refused(command, tmp_path, *words, f"data.path={path}")


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_scheme_without_its_package(scheme, extra, command, words, tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(f"Install {name}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    said = refused(command, tmp_path, *words, f"data.path={scheme}://b/x.tar")
    assert said.endswith(
        f"data.path={scheme}://b/x.tar: the package that reads {scheme}:// is not installed;"
        f" pip install 'distill[{extra}]'"
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 403}, "the store refuses to show it; log in there, or check the address"),
        ({"status": 404}, "there is nothing at this address"),
        ({"stalls": True}, "cannot be read from its store, 2 tries in "),
    ],
)
def test_a_store_that_refuses_or_stalls(fault, said, command, words, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "SECONDS", 0.5)
    with serve(folder) as served:
        for key, value in fault.items():
            setattr(served, key, value)
        found = refused(command, tmp_path, *words, f"data.path={served.url}/x-000.tar")
    assert said in found
    assert f"{served.url}/x-000.tar" in found


def test_a_store_that_fails_for_a_while_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr(stores, "WAITS", (0.01, 0.01, 0.01))
    with serve(folder) as served:
        data = source.latents(f"{served.url}/x-000.tar", batch_size=4, cache_gb=ONE_BY_ONE)
        served.failing = 2
        found = list(itertools.islice(data.loader(seed=3), 2))
    same(found, list(itertools.islice(batches(f"{folder}/x-000.tar", 2)[0], 2)))


def test_a_store_that_is_gone_during_a_run_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(stores, "WAITS", (0.01, 0.01))
    with serve(folder) as served:
        data = source.latents(f"{served.url}/x-000.tar", batch_size=4, cache_gb=ONE_BY_ONE)
        loader = iter(data.loader(seed=3))
        next(loader)
        served.status = 500
        with pytest.raises(OSError, match=r"x-000\.tar: cannot be read from its store, 3 tries in"):
            next(loader)


def test_a_shard_that_is_no_tar_is_called_by_its_address():
    fsspec.filesystem("memory").pipe_file("/odd/x.tar", b"PAR1" + bytes(600))
    with pytest.raises(ValueError, match=r"the shard 'memory://+odd/x\.tar' is"):
        batches("memory://odd/x.tar")


def test_a_cut_download_is_no_shard(memory, tmp_path, monkeypatch):
    """What is fetched is as large as the store says, or is not kept."""
    own = stores.ask

    def cut(*args):
        found = own(*args)
        return found[:-1] if isinstance(found, bytes) else found

    monkeypatch.setattr(stores, "ask", cut)
    with pytest.raises(OSError, match="and sent 30719"):
        batches(f"{memory}/x-000.tar")
    assert not files_of(tmp_path / "cache" / "distill" / "shards")


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("x-000.tar", 700, "its store says that it has 700 bytes; if it has more, copy it to a "),
        ("x-000.tar", 10**6, r"sent \d+ at byte 0 instead of 1000000; try again, or copy it to a "),
        ("manifest.json", 4, "its manifest.json is no JSON (.*); repair it there, or if its store"),
    ],
)
def test_a_server_that_says_a_wrong_size_is_named(name, size, said, folder, tmp_path):
    """By its address, and not by the copy on this disk."""
    mine = shutil.copytree(folder, tmp_path / "served")
    (mine / "manifest.json").write_text('{"what": "latents"}', encoding="utf-8")
    with serve(mine) as served:
        served.says = {name: size}
        with pytest.raises((ValueError, OSError), match=said) as caught:
            batches(f"{served.url}/x-000.tar")
        assert str(caught.value).startswith("data.path")
        assert str(caught.value).count("data.path") == 1
        assert f"{served.url}/x-000.tar" in str(caught.value)
    assert "shards/" not in str(caught.value)


def test_a_folder_for_copies_that_cannot_be_made(memory, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*cannot be made"):
        batches(memory, cache_dir=str(tmp_path / "file" / "c"))
    with pytest.raises(ValueError, match=r"data\.cache_gb=-1: must be"):
        Cache.of(None, -1)


@pytest.mark.slow
def test_a_run_from_a_store_is_that_from_the_disk_and_goes_on(
    command, words, folder, memory, tmp_path, monkeypatch
):
    from safetensors.torch import load_file

    def student(run):
        (file,) = (tmp_path / run / "student" / "transformer").glob("*.safetensors")
        return load_file(file)

    more = ["trainer.max_steps=3", "callbacks.checkpoint.every=2", "data.batch_size=2"]
    mine = [word for word in words if not word.startswith("run_dir")]
    assert command("run", *mine, *more, f"data.path={folder}", "run_dir=disk")[0] == 0
    assert command("run", *mine, *more, f"data.path={memory}", "run_dir=store")[0] == 0
    expected = student("disk")
    assert all(torch.equal(x, expected[k]) for k, x in student("store").items())
    shutil.rmtree(tmp_path / "store" / "student")
    max((tmp_path / "store" / "checkpoints").glob("*.ckpt")).unlink()
    code, _, err = command("run", "resume=store")  # a stranger's run may name no address
    assert code == 1
    assert "is neither a path on this machine nor a hub id" in err
    code, _, err = command("run", "resume=store", f"data.path={memory}")
    assert code == 0, err
    assert all(torch.equal(x, expected[k]) for k, x in student("store").items())
