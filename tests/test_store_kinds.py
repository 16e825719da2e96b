"""Data at s3://, gs:// and hf://: by the packages that read them, from servers of this machine.

The same samples in the same order as from a folder, also of Parquet, in workers and resumed.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

import served
from distill.data import source, stores

pytestmark = pytest.mark.usefixtures("own_store_cache")
KINDS = {"s3": "s3://bucket", "gcs": "gs://bucket", "hub": "hf://datasets/user/set"}
PACKAGES = {"s3": "s3fs", "gcs": "gcsfs", "hub": "huggingface_hub"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """deep/: three shards of eight latents each. tables/: two Parquet files of pictures, if there
    is pyarrow.
    """
    import numpy as np

    from distill.data.write import write_latents

    made = tmp_path_factory.mktemp("made")
    (made / "deep").mkdir()
    (made / "tables").mkdir()
    random = np.random.default_rng(5)
    latents = ((f"{i:04d}", random.standard_normal((4, 8, 8)), f"caption {i}") for i in range(24))
    write_latents(str(made / "deep" / "x-%03d.tar"), latents, per_shard=8)
    return made


@pytest.fixture(params=KINDS)
def store(request, folder, tmp_path, monkeypatch):
    """The folder at `store.path`, served as each kind; `store.server` is its server."""
    kind = request.param
    pytest.importorskip(PACKAGES[kind])
    # A handler of logs whose stream an earlier test captured and closed says so with a traceback.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    place = tmp_path / "served" / KINDS[kind].partition("://")[2].removeprefix("datasets/")
    shutil.copytree(folder, place)
    with served.serve(tmp_path / "served", kind) as server:
        reach(kind, server.url, monkeypatch)
        server.path = KINDS[kind]
        yield server


def reach(kind: str, url: str, monkeypatch) -> None:
    """What a user sets for a store of one's own; Hugging Face's is read when it is imported."""
    import fsspec

    variables = {
        "s3": {
            "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
        "gcs": {"STORAGE_EMULATOR_HOST": url},
        "hub": {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"},
    }  # fmt: skip
    for key, value in variables[kind].items():
        monkeypatch.setenv(key, value)
    if kind == "hub":
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        content = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", content)
    fsspec.get_filesystem_class({"gcs": "gs", "hub": "hf"}.get(kind, kind)).clear_instance_cache()


def batches(path, count=7, workers=0, start=0, rank=0, world=1, **options):
    data = source.latents(str(path), batch_size=4, num_workers=workers, **options)
    loader = data.loader(seed=3, rank=rank, world=world, start=start)
    return list(itertools.islice(loader, count))


def same(found, expected, key="x0"):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a["caption"] == b["caption"]
        assert torch.equal(a[key], b[key])


def test_the_same_samples_in_the_same_order(store, folder):
    expected = batches(folder / "deep")
    for ends in ("deep", "deep/x-{000..002}.tar", "*/*.tar", ""):
        same(batches(f"{store.path}/{ends}".rstrip("/")), expected)
    assert [store.fetched(f"x-00{i}.tar") for i in range(3)] == [1, 1, 1]
    one_by_one = {"start": 5, "rank": 1, "world": 2, "cache_gb": 0.0}
    same(batches(f"{store.path}/deep", **one_by_one), batches(folder / "deep", **one_by_one))


def test_workers_read_one_by_one(store, folder):
    same(batches(f"{store.path}/deep", workers=2, cache_gb=0.0), batches(folder / "deep"))


def test_pictures_of_tables(store, folder, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    from test_tables import ROWS

    def found(path, start=0, workers=0):
        data = source.images(str(path), size=16, batch_size=4, num_workers=workers)
        return list(itertools.islice(data.loader(seed=3, start=start), 5))

    inside = next((tmp_path / "served").rglob("tables"))
    for i in range(2):
        rows = arrow.Table.from_pylist(ROWS[i * 10 : i * 10 + 10])
        pyarrow.parquet.write_table(rows, inside / f"t-{i}.parquet", row_group_size=3)
    for options in ({}, {"start": 4}, {"workers": 2}):
        same(found(f"{store.path}/tables", **options), found(inside, **options), key="pixels")
    assert [store.fetched(f"t-{i}.parquet") for i in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the store refuses to show it; log in there, or check the address"),
        (403, "the store refuses to show it; log in there, or check the address"),
        (404, "there is nothing at this address; check it"),
    ],
)
def test_a_refusal_is_one_sentence_at_once(status, said, store, capfd, caplog):
    """Also of a file that the store has listed."""
    path = f"{store.path}/deep"
    (first, *_) = stores.found_at(path, (".tar",))
    store.status = status
    with pytest.raises(stores.Refused, match=said):
        stores.read(first.url, 0, 512)
    with pytest.raises(ValueError, match=said):
        batches(f"{store.path}/other/x-000.tar")
    assert "Traceback" not in capfd.readouterr().err
    assert "trying again" not in caplog.text
    assert "Compute Engine" not in caplog.text


def test_a_library_that_logs_every_read_is_silent(store, folder, capfd):
    batches(f"{store.path}/deep", cache_gb=0.0)
    assert "Could not determine bucket type" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_run_is_that_from_the_disk_and_goes_on(store, command, pipelines, folder, tmp_path: Path):
    from safetensors.torch import load_file

    def student(run):
        (file,) = (tmp_path / run / "student" / "transformer").glob("*.safetensors")
        return load_file(file)

    words = ["debug=smoke", "data=latents", f"teacher.path={pipelines('mmdit')}", "~metrics"]
    words += ["~logger", "trainer.max_steps=3", "callbacks.checkpoint.every=2", "data.batch_size=2"]
    path = f"data.path={store.path}/deep"
    assert command("run", *words, f"data.path={folder}/deep", "run_dir=disk")[0] == 0
    code, _, err = command("run", *words, path, "run_dir=store", "data.cache_gb=0")
    assert code == 0, err
    expected = student("disk")
    assert all(torch.equal(x, expected[k]) for k, x in student("store").items())
    shutil.rmtree(tmp_path / "store" / "student")
    max((tmp_path / "store" / "checkpoints").glob("*.ckpt")).unlink()
    code, _, err = command("run", "resume=store", path)
    assert code == 0, err
    assert all(torch.equal(x, expected[k]) for k, x in student("store").items())


# -- two ranks -------------------------------------------------------------------------------------


def rank_of_two(rank, path, place, results):
    found = batches(path, rank=rank, world=2, cache_dir=str(place))
    results.put((rank, [batch["caption"] for batch in found]))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_two_ranks_of_one_store_that_are_killed_and_begin_again(folder, tmp_path):
    """No shard is fetched twice, no copy is torn, and the order is that from a folder."""
    processes, place = multiprocessing.get_context("fork"), tmp_path / "copies"

    def begun(server):
        results = processes.SimpleQueue()
        given = (f"{server.url}/deep/x-{{000..002}}.tar", place, results)
        ranks = [processes.Process(target=rank_of_two, args=(r, *given)) for r in range(2)]
        for rank in ranks:
            rank.start()
        return ranks, results

    with served.serve(folder) as server:
        server.slow = 5.0
        ranks, _ = begun(server)
        while not list(place.glob("*.part")):
            assert all(rank.is_alive() for rank in ranks)
            time.sleep(0.02)
        for rank in ranks:
            rank.kill()
            rank.join()
        assert list(place.glob("*.part"))
        assert not list(place.glob("*.tar"))
        server.slow = 0.3
        server.asked.clear()
        ranks, results = begun(server)
        found = dict(results.get() for _ in ranks)
        for rank in ranks:
            rank.join()
        assert [server.fetched(f"x-00{i}.tar") for i in range(3)] == [1, 1, 1]
    assert not list(place.glob("*.part"))
    copies = {copy.name[-9:]: copy.read_bytes() for copy in place.glob("*.tar")}
    assert copies == {file.name: file.read_bytes() for file in (folder / "deep").glob("*.tar")}
    for rank, captions in found.items():
        expected = batches(folder / "deep", rank=rank, world=2)
        assert captions == [batch["caption"] for batch in expected]
