"""Data: shards written and read back, the one deterministic order, and what happens when files are
bad or hostile.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import datasets, decode, first
from distill.data.bad import BadSample, reasons_of
from distill.data.datasets import ImageShards, LatentShards, Samples
from distill.data.named import expand
from distill.data.raw import caption
from distill.data.shards import Shards
from distill.data.source import Loader, Order, Source, permutation, prompts
from distill.data.write import write_images, write_latents
from distill.machine.hardware import cores
from tiny import put_tar


def latent_of(i: int) -> np.ndarray:
    return np.full((2, 3, 4), i, dtype=np.float16)


def put_latents(folder, n: int, per_shard: int = 4) -> str:
    write_latents(
        f"{folder}/x-%03d.tar",
        ((f"{i:04d}", latent_of(i), f"caption {i}") for i in range(n)),
        per_shard,
    )
    return str(folder)


def png(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def put_images(path, n: int, broken: frozenset[int] = frozenset()) -> str:
    """n grey 8x8 images named by number; those in `broken` are cut in half."""
    files = {}
    for i in range(n):
        data = png(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        files[f"{i:03d}.png"] = data[: len(data) // 2] if i in broken else data
        files[f"{i:03d}.txt"] = f"caption {i}".encode()
    return put_tar(path, files)


def loader(data: Samples, *, batch_size: int, num_workers: int = 0, **options) -> Loader:
    return Source(data, batch_size, num_workers).loader(**options)


def keys(batches, steps: int) -> list[list[str]]:
    return [batch["key"] for batch in itertools.islice(batches, steps)]


def complaint(batches) -> str:
    """What stops the reading.

    Only text is kept: a traceback keeps workers alive, and their late end takes seconds.
    """
    try:
        keys(batches, 30)
    except ValueError as error:
        return str(error)
    return "nothing"


def raw(**files: bytes) -> dict:
    return {"__key__": "7", "__url__": "a.tar"} | {
        name.replace("_", "."): data for name, data in files.items()
    }


# --- round trips ----------------------------------------------------------------------------------


def test_latents_come_back_as_written(tmp_path):
    rng = np.random.default_rng(0)
    written = {f"k{i}": rng.normal(size=(4, 8, 6)).astype(np.float16) for i in range(5)}
    shards = write_latents(
        f"{tmp_path}/a/x-%02d.tar", ((k, v, f"ein Bär, {k}") for k, v in written.items()), 2
    )
    assert shards == [f"{tmp_path}/a/x-0{i}.tar" for i in range(3)]
    data = LatentShards(f"{tmp_path}/a")
    assert data.shape == (4, 8, 6)
    assert [data[i]["key"] for i in range(len(data))] == list(written)
    for i, (key, latent) in enumerate(written.items()):
        assert data[i]["x0"].dtype == torch.float32
        assert torch.equal(data[i]["x0"], torch.from_numpy(latent.astype(np.float32)))
        assert data[i]["caption"] == f"ein Bär, {key}"
    assert data.bad == {}


def test_images_come_back_as_written(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    write_images(f"{tmp_path}/x-%d.tar", [("s", pixels, " a dog\n", {"b": 1, "a": "ä"})], 10)
    item = ImageShards(f"{tmp_path}/x-0.tar", size=8)[0]
    assert item["caption"] == "a dog"
    assert torch.equal(
        item["pixels"], torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    )
    assert item["pixels"].is_contiguous()
    record = Shards(str(tmp_path)).read(0)
    assert record["json"] == '{"a": "ä", "b": 1}'.encode()
    assert record["__url__"] == f"{tmp_path}/x-0.tar"


def test_webdataset_itself_reads_our_shards(tmp_path):
    import webdataset

    put_latents(tmp_path, 3)
    samples = list(
        webdataset.WebDataset(f"{tmp_path}/x-000.tar", shardshuffle=False, empty_check=False)
    )
    assert [s["__key__"] for s in samples] == ["0000", "0001", "0002"]
    assert [s["txt"] for s in samples] == [b"caption 0", b"caption 1", b"caption 2"]


def test_equal_samples_give_equal_bytes(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    for name in "ab":
        put_latents(tmp_path / name, 3)
        record = {"x": 1, "y": 2} if name == "a" else {"y": 2, "x": 1}
        write_images(f"{tmp_path}/{name}/i-%d.tar", [("k", pixels, "c", record)], 1)
    for shard in ("x-000.tar", "i-0.tar"):
        assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_folder_of_images(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(["a.PNG", "b.c.png", "sub/d.png", "x.png", "y.png"]):
        (tmp_path / name).write_bytes(png(np.full((6, 6, 3), 50 * i, np.uint8)))
    (tmp_path / "x.TXT").write_text("capitals", encoding="utf-8")
    (tmp_path / "y.JSON").write_text('{"caption": "more of them"}', encoding="utf-8")
    (tmp_path / "b.c.txt").write_text("two dots", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not an image", encoding="utf-8")
    data = ImageShards(str(tmp_path), size=6)
    assert [(data[i]["key"], data[i]["caption"]) for i in range(5)] == [
        ("a.PNG", ""),
        ("b.c.png", "two dots"),
        ("sub/d.png", ""),
        ("x.png", "capitals"),
        ("y.png", "more of them"),
    ]
    assert torch.allclose(data[2]["pixels"], torch.full((3, 6, 6), 100 / 127.5 - 1))
    what = f"2 of 5 pictures in {tmp_path}, a.PNG for one, have no caption"
    assert [record.message.partition(", and")[0] for record in caplog.records] == [what]
    for name in ("a.txt", "sub/d.txt"):
        (tmp_path / name).write_text("all have one", encoding="utf-8")
    caplog.clear()
    ImageShards(str(tmp_path), size=6)
    assert not caplog.records


def test_batches_stack_tensors_and_list_the_rest(tmp_path):
    data = LatentShards(put_latents(tmp_path, 2))
    batch = next(iter(loader(data, batch_size=2, seed=0)))
    assert set(batch) == {"x0", "caption", "key"}
    assert batch["x0"].shape == (2, 2, 3, 4)
    order = permutation(2, 0, 0).tolist()
    assert batch["x0"][:, 0, 0, 0].tolist() == order
    assert batch["caption"] == [f"caption {i}" for i in order]


def test_limit(tmp_path):
    path = put_latents(tmp_path, 6)
    data = LatentShards(path, limit=3)
    assert [item["key"] for item in (data[i] for i in range(len(data)))] == ["0000", "0001", "0002"]
    assert len(LatentShards(path, limit=100)) == 6
    with pytest.raises(IndexError, match=r"\[0, 3\), got 3"):
        data[3]
    with pytest.raises(ValueError, match="data.limit=0: must be at least 1"):
        LatentShards(path, limit=0)


# --- writing: what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize("key", ["a.b", "", "../x", "/x", "a//b", "a/"])
def test_keys_that_would_not_come_back_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="must be a relative path"):
        write_latents(f"{tmp_path}/x-%d.tar", [(key, latent_of(0), "c")], 1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_only_complete_shards(tmp_path):
    samples = [
        ("a", latent_of(0), "c"),
        ("b", latent_of(1), "c"),
        ("c", latent_of(2), "c"),
        ("c", latent_of(3), "c"),
    ]
    with pytest.raises(ValueError, match="'c' occurs twice"):
        write_latents(f"{tmp_path}/x-%d.tar", samples, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["x-0.tar"]
    assert len(Shards(str(tmp_path))) == 2


def test_write_refuses_bad_values(tmp_path):
    pattern = f"{tmp_path}/x-%d.tar"
    with pytest.raises(ValueError, match="'big'.*finite in fp16"):
        write_latents(pattern, [("big", np.full((1, 2, 2), 1e6), "c")], 1)
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\], got float64 \[2, 2, 3\]"):
        write_images(pattern, [("k", np.zeros((2, 2, 3)), "c", {})], 1)
    with pytest.raises(ValueError, match="no sample to write"):
        write_latents(pattern, [], 1)
    with pytest.raises(ValueError, match="per_shard=0: must be"):
        write_latents(pattern, [("k", latent_of(0), "c")], 0)
    for wrong in (
        f"{tmp_path}/x.tar",
        f"{tmp_path}/x-%d",
        f"{tmp_path}/%d/x.tar",
        f"{tmp_path}/%s-%d.tar",
    ):
        with pytest.raises(ValueError, match="must be like 'out/shards-%06d.tar'"):
            write_latents(wrong, [("k", latent_of(0), "c")], 1)
    assert list(tmp_path.iterdir()) == []


def test_shards_left_from_a_longer_run_are_pointed_out(tmp_path, caplog):
    put_latents(tmp_path, 8)
    assert caplog.messages == []
    put_latents(tmp_path, 4)
    assert [message.split(" is left")[0] for message in caplog.messages] == [
        f"{tmp_path}/x-001.tar"
    ]


# --- the order ------------------------------------------------------------------------------------


def order(n: int, steps: int, **options) -> list[list[int]]:
    return list(itertools.islice(Order(n, **options), steps))


@pytest.mark.parametrize(("n", "steps"), [(12, 6), (10, 15), (3, 9), (1, 3)])
def test_every_sample_once_per_epoch(n, steps):
    seen = list(itertools.chain(*order(n, steps, seed=5, batch_size=4)))
    epochs = [seen[i : i + n] for i in range(0, len(seen) - n + 1, n)]
    assert len(epochs) >= 2
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 10:
        assert epochs[0] != epochs[1]


def test_the_order_is_pinned():
    """A changed order would silently break the exact resume of old runs, so it is written down."""
    assert permutation(8, 0, 0).tolist() == [3, 0, 1, 2, 7, 4, 5, 6]
    assert permutation(8, 0, 1).tolist() != permutation(8, 1, 0).tolist()


@pytest.mark.parametrize("n", [3, 10, 64])
def test_one_process_and_two_see_the_same_global_order(n):
    whole = order(n, 7, seed=3, batch_size=4)
    halves = [order(n, 7, seed=3, batch_size=2, rank=rank, world=2) for rank in range(2)]
    assert whole == [first + second for first, second in zip(*halves, strict=True)]


def test_another_seed_is_another_order():
    assert order(64, 4, seed=0, batch_size=8) != order(64, 4, seed=1, batch_size=8)


def test_start_step_resumes_exactly():
    whole = order(10, 20, seed=1, batch_size=3, rank=1, world=2)
    assert order(10, 13, seed=1, batch_size=3, rank=1, world=2, start=7) == whole[7:]


def test_order_refuses_nonsense():
    good = {"length": 5, "seed": 0, "batch_size": 2}
    for wrong in (
        {"length": 0},
        {"batch_size": 0},
        {"rank": 2, "world": 2},
        {"rank": -1},
        {"start": -1},
    ):
        with pytest.raises(
            ValueError,
            match=rf"{next(iter(wrong.items()))[0]}=.*must be 1 or more, start 0 or more",
        ):
            Order(**good | wrong)


def test_batches_do_not_depend_on_workers_and_resume_exactly(tmp_path):
    data = LatentShards(put_latents(tmp_path, 11, per_shard=5))  # shards of 5, 5 and 1
    whole = list(itertools.islice(loader(data, batch_size=4, seed=2), 9))
    with_workers = loader(data, batch_size=4, seed=2, num_workers=2)
    for _ in range(2):  # the second time with workers that persist
        assert keys(with_workers, 9) == [b["key"] for b in whole]
    for workers in (0, 2):
        resumed = list(
            itertools.islice(loader(data, batch_size=4, seed=2, start=4, num_workers=workers), 5)
        )
        assert [b["key"] for b in resumed] == [b["key"] for b in whole[4:]]
        assert all(torch.equal(a["x0"], b["x0"]) for a, b in zip(resumed, whole[4:], strict=True))


def test_two_ranks_read_what_one_process_reads(tmp_path):
    data = LatentShards(put_latents(tmp_path, 7, per_shard=3))
    whole = keys(loader(data, batch_size=4, seed=0), 6)
    halves = [keys(loader(data, batch_size=2, seed=0, rank=rank, world=2), 6) for rank in range(2)]
    assert whole == [first + second for first, second in zip(*halves, strict=True)]


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_leaves_the_global_generator_alone(tmp_path, workers):
    data = LatentShards(put_latents(tmp_path, 4))
    before = torch.get_rng_state()
    keys(loader(data, batch_size=2, seed=0, num_workers=workers), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_dataset_in_use_can_be_pickled(tmp_path):
    data = LatentShards(put_latents(tmp_path, 6, per_shard=2))
    assert [data[i]["key"][-1] for i in (0, 5, 1, 4, 0)] == list("05140")
    copy = pickle.loads(pickle.dumps(data))
    assert [copy[i]["key"][-1] for i in (5, 0)] == list("50")


# --- where shards are -----------------------------------------------------------------------------


def test_expand(tmp_path):
    names = [str(tmp_path / f"x-{i:03d}.tar") for i in range(4)]
    for name in reversed(names):
        put_tar(name, {"a.txt": b"a"})
    (tmp_path / "other.txt").write_text("x", encoding="utf-8")
    assert expand(str(tmp_path)) == names
    assert expand(names[2]) == [names[2]]
    assert expand(f"{tmp_path}/x-{{001..003}}.tar") == names[1:]
    assert expand(f"{tmp_path}/x-{{003,001}}.tar") == [names[1], names[3]]
    assert expand(f"{tmp_path}/*-00[12].tar") == names[1:3]
    assert expand(f"{tmp_path}/{{x,y}}-*.tar") == names


def test_expand_says_what_is_missing(tmp_path):
    put_tar(tmp_path / "x-0.tar", {"a.txt": b"a"})
    (tmp_path / "empty").mkdir()
    for path, message in [
        (f"{tmp_path}/empty", r"data.path=.*empty: is a folder without"),
        (f"{tmp_path}/y-*.tar", r"data.path=.*y-\*.tar: no file matches"),
        (f"{tmp_path}/x-{{0..1}}.tar", r"data.path=.*: there is no .*x-1.tar; "),
        (f"{tmp_path}/gone.tar", r"data.path=.*gone.tar: no such file or folder; check"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            expand(path)
    for path, message in [
        ("", "data.path='': must be a folder"),
        ("x-{0..1.tar", "do not pair"),
        ("pipe:rm -rf x", "must be a folder"),
        ("ftp://host/x.tar", "is no address that is read"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand(path)
    with pytest.raises(FileNotFoundError, match="neither .tar shards nor images"):
        ImageShards(f"{tmp_path}/empty", size=4)


def test_samples_are_grouped_by_webdataset_s_convention(tmp_path):
    files = {
        "d.1/a.PNG": b"1",
        "b.seg.png": b"2",
        "d.1/a.txt": b"3",
        "b.txt": b"4",
        ".hidden": b"5",
        "bare": b"6",
        "./c.txt": b"7",
        "b.__url__": b"8",
    }
    shards = Shards(put_tar(tmp_path / "x.tar", files))
    url = str(tmp_path / "x.tar")
    assert [shards.read(i) for i in range(len(shards))] == [
        {"__key__": "d.1/a", "__url__": url, "png": b"1", "txt": b"3"},
        {"__key__": "b", "__url__": url, "seg.png": b"2", "txt": b"4"},
        {"__key__": "./c", "__url__": url, "txt": b"7"},
    ]


# --- shards that are damaged or hostile -----------------------------------------------------------


def test_a_truncated_shard_is_named_wherever_it_is_cut(tmp_path):
    path = tmp_path / "cut.tar"
    put_tar(
        path, {f"{i}.txt": bytes([65 + i]) * 600 for i in range(3)}
    )  # a header and two blocks each
    whole = path.read_bytes()
    assert len(Shards(str(path))) == 3
    # in a header, after a header, in data, between two samples, in the padding and before the end
    # mark
    for length in (100, 512, 700, 1536, 1536 + 300, 3072 + 512 + 600, 3 * 1536):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar' is cut short or"):
            Shards(str(path))


def test_a_damaged_header_does_not_hide_the_rest(tmp_path):
    path = tmp_path / "hurt.tar"
    put_tar(path, {"a.txt": b"a", "b.txt": b"b", "c.txt": b"c"})
    data = bytearray(path.read_bytes())
    data[1024:1034] = b"\xff" * 10
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"hurt\.tar' is cut short or damaged.*no header at byte 1024"
    ):
        Shards(str(path))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"hello\n" * 500])
def test_a_text_file_called_tar(tmp_path, content):
    (tmp_path / "text.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"text\.tar' is cut short or damaged, or no plain tar"):
        Shards(str(tmp_path))


def test_a_compressed_tar_and_an_empty_one(tmp_path):
    with tarfile.open(tmp_path / "z.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"z\.tar' is compressed by gzip, .*; gunzip it first"):
        Shards(f"{tmp_path}/z.tar")
    put_tar(tmp_path / "e.tar", {})
    with pytest.raises(ValueError, match=r"e\.tar: its shards hold no samples"):
        Shards(f"{tmp_path}/e.tar")


def test_a_file_twice_in_one_shard(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ValueError, match=r"x\.tar' holds a\.txt twice"):
        Shards(str(tmp_path))


def test_a_shard_that_shrinks_under_us(tmp_path):
    data = Shards(put_latents(tmp_path, 2))
    with open(tmp_path / "x-000.tar", "r+b") as file:
        file.truncate(700)
    with pytest.raises(ValueError, match=r"x-000\.tar' has shrunk.*'0001'"):
        data.read(1)


def test_a_hostile_tar_writes_nothing_and_follows_nothing(tmp_path):
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    inside = tmp_path / "data"
    inside.mkdir()
    with tarfile.open(inside / "x.tar", "w") as tar:
        for name, kind in [
            ("s.txt", tarfile.SYMTYPE),
            ("h.txt", tarfile.LNKTYPE),
            ("f.txt", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(info)
        for name, kind in [("d.txt", tarfile.DIRTYPE), ("c.txt", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        for name in ("../../up.txt", "/tmp/absolute.txt", "b\udcff.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    before = sorted(tmp_path.rglob("*"))
    shards = Shards(str(inside))
    samples = [shards.read(i) for i in range(len(shards))]
    assert [(s["__key__"], s["txt"]) for s in samples] == [
        ("../../up", b"evil"),
        ("/tmp/absolute", b"evil"),
        ("b\\xff", b"evil"),  # printable, whatever the name was
    ]
    assert sorted(tmp_path.rglob("*")) == before


# --- bad samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_replaced_counted_and_named(tmp_path, workers, caplog):
    path = put_images(tmp_path / "x.tar", 30, broken=frozenset({7, 29}))
    data = ImageShards(path, size=8)
    seen = list(itertools.chain(*keys(loader(data, batch_size=6, seed=4, num_workers=workers), 10)))
    expected = permutation(30, 4, 0).tolist() + permutation(30, 4, 1).tolist()
    assert seen == [f"{ {7: 26, 29: 18}.get(i, i):03d}" for i in expected]  # 19 on, cyclically
    assert set(data.bad) == {f"{path}:007", f"{path}:029"}
    assert all("its .png does not decode" in reason for reason in data.bad.values())
    assert (data.failed, data.tried) == (4, 64)  # each met twice
    assert len(caplog.messages) == 2  # but named once
    assert f"{path}:007" in caplog.text


def test_bad_samples_that_lie_together_count_no_more_than_others(tmp_path):
    """A folder of thumbnails, say: each was replaced by its neighbour, and one draw counted them
    all.
    """
    path = put_images(tmp_path / "x.tar", 600, broken=frozenset(range(100, 140)))
    data = ImageShards(path, size=8)
    assert len(keys(loader(data, batch_size=4, seed=0), 300)) == 300
    assert data.failed / data.tried == pytest.approx(40 / 600, rel=0.3)
    places = {(100 + k * first.stride(600)) % 600 for k in range(600)}
    assert len(places) == 600


def test_a_few_more_bad_ones_than_expected_are_chance(tmp_path):
    """Of twenty draws at eight in a hundred three are bad half the time; what is read once is
    counted whole.
    """
    data = ImageShards(put_images(tmp_path / "x.tar", 50), size=8, max_bad_share=0.1)
    data.account(17, [("x", "bad")] * 3)
    with pytest.raises(
        ValueError, match="12 of 29 samples tried are bad, more than data.max_bad_share=0.1"
    ):
        data.account(0, [("x", "bad")] * 9, needed=False)
    with pytest.raises(ValueError, match=r"data\.max_bad_share=2: must be a share, from 0 to 1"):
        ImageShards(str(tmp_path / "x.tar"), size=8, max_bad_share=2)
    with pytest.raises(ValueError, match="more than data.max_bad_share=0; "):
        ImageShards(str(tmp_path / "x.tar"), size=8, max_bad_share=0).account(30, [("x", "bad")])


@pytest.mark.parametrize("size", [[64, 32], 0, 64.5])
def test_a_size_that_is_none_is_refused(size, tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.size=.*: must be pixels a side; other shapes are data\.buckets="
    ):
        ImageShards(put_images(tmp_path / "x.tar", 3), size=size)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(tmp_path, workers):
    path = put_images(tmp_path / "x.tar", 40, broken=frozenset(range(0, 40, 4)))
    data = ImageShards(path, size=8)
    message = rf"data.path={path}: \d+ of \d+ samples tried are bad, "
    message += "more than data.max_bad_share=0.1; "
    message += rf".*The first: {path}:\d+: its .png does.*"
    assert re.fullmatch(message, complaint(loader(data, batch_size=4, seed=0, num_workers=workers)))
    assert data.tried >= datasets.MIN_TRIED
    tolerant = ImageShards(path, size=8, max_bad_share=0.5)
    assert len(keys(loader(tolerant, batch_size=4, seed=0, num_workers=workers), 30)) == 30


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples(tmp_path, workers):
    path = put_images(tmp_path / "x.tar", 6, broken=frozenset(range(6)))
    data = ImageShards(path, size=8, max_bad_share=1.0)
    message = rf"data.path={path}: \d+ of \d+ samples tried are bad, the last \d+ in a row; "
    message += r"repair the data\. The first: .*"
    assert re.fullmatch(message, complaint(loader(data, batch_size=2, seed=0, num_workers=workers)))


def test_latents_where_there_are_images(tmp_path):
    path = put_images(tmp_path / "x.tar", 3)
    with pytest.raises(
        ValueError,
        match=(
            r"data.path=.*x.tar: none of its first 3 samples.*x.tar:000.*it has no latents.*only"
            r" png, txt"
        ),
    ):
        LatentShards(path)


def test_latents_of_another_shape_are_bad(tmp_path):
    arrays = [latent_of(0), np.zeros((2, 3, 5), np.float16), latent_of(2)]
    data = LatentShards(put_tar_of_latents(tmp_path / "x.tar", [npy(a) for a in arrays]))
    assert data[1]["key"] == "0"
    assert list(data.bad.values()) == ["its latents are [2, 3, 5], the first sample's [2, 3, 4]"]


def put_tar_of_latents(path, blobs: list[bytes]) -> str:
    files = {}
    for i, blob in enumerate(blobs):
        files |= {f"{i}.latent.npy": blob, f"{i}.txt": b"c"}
    return put_tar(path, files)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_in_npy_is_never_opened(tmp_path):
    bomb = npy(np.array([Bomb()], dtype=object), allow_pickle=True)
    data = LatentShards(
        put_tar_of_latents(tmp_path / "x.tar", [npy(latent_of(0)), bomb, pickle.dumps(Bomb())])
    )
    assert data[2]["key"] == "0"  # past 2 and 1
    assert sorted(data.bad) == [f"{tmp_path}/x.tar:1", f"{tmp_path}/x.tar:2"]
    assert "allow_pickle=False" in data.bad[f"{tmp_path}/x.tar:1"]


def test_latents_that_are_refused():
    huge = npy(np.zeros((1, 2, 2), np.float16)).replace(b"(1, 2, 2)", b"(9**9,2,2"[:9])
    claims = npy(np.zeros((1, 2, 2), np.float16)).replace(b"(1, 2, 2), ", b"(99999,9,9)")
    for blob, message in [
        (npy(np.zeros((2, 2), np.float32)), r"is float32 \[2, 2\], not floats"),
        (npy(np.zeros((1, 2, 2), np.int64)), r"is int64 \[1, 2, 2\], not floats"),
        (npy(np.full((1, 2, 2), np.nan)), "nan or inf"),
        (npy(np.full((1, 2, 2), 1e300)), "nan or inf"),
        (npy(latent_of(0))[:-3], "does not decode"),
        (b"", "does not decode"),
        (huge, "does not decode"),
        (claims, "does not decode"),
    ]:
        with pytest.raises(BadSample, match=rf"^a\.tar:7: its \.latent\.npy .*{message}|{message}"):
            decode.latent(raw(latent_npy=blob))


def test_latents_in_other_layouts():
    array = np.arange(24, dtype=">f8").reshape(2, 3, 4)
    for blob in (npy(array), npy(np.asfortranarray(array))):
        assert torch.equal(decode.latent(raw(npy=blob)), torch.arange(24.0).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"txt": "Bär".encode("latin-1")}, r"its \.txt is not UTF-8"),
        ({"json": b'{"caption": 3}'}, r"its \.json has no text under 'caption' or 'text'"),
        ({"json": b"[1]"}, "no text under 'caption' or 'text'"),
        ({"json": b"{"}, r"its \.json does not decode"),
        ({"json": b'{"caption": "\\ud800"}'}, "is not UTF-8"),
        ({"json": b"[" * 100_000}, "does not decode"),
        ({"json": b"1" * 10_000}, "does not decode"),
        ({"png": b""}, r"it has no caption \(txt, caption, json\), only png"),
    ],
)
def test_captions_that_are_refused(files, message):
    with pytest.raises(BadSample, match=message) as caught:
        caption(raw(**files))
    assert caught.value.name == "a.tar:7"


def test_captions():
    assert caption(raw(txt="\ufeffein Bär \n".encode())) == "ein Bär"
    assert caption(raw(json=json.dumps({"caption": "c", "text": "t"}).encode())) == "c"
    assert caption(raw(json=json.dumps({"text": "t"}).encode())) == "t"
    assert caption(raw(txt=b"x", json=b"{")) == "x"


# --- pixels ---------------------------------------------------------------------------------------


def test_crop_is_central_and_keeps_the_shape_of_things():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255  # the central square is white, all else black
    for pixels in (picture, picture.transpose(1, 0, 2)):
        assert torch.equal(decode.image(raw(png=png(pixels)), 20), torch.ones(3, 20, 20))
        small = decode.image(raw(png=png(pixels)), 10)
        assert small.shape == (3, 10, 10)
        assert (
            small[:, 1:-1, 1:-1].min() > 0.99
        )  # the outermost pixels see their neighbours beyond the crop


def test_resize_antialiases():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = decode.image(raw(png=png(stripes)), 16)[:, 2:-2, 2:-2]
    assert small.abs().max() < 0.05  # grey, not one of the stripes


def test_modes_become_rgb():
    grey16 = np.full((4, 4), 32768, np.uint16)
    assert decode.image(raw(png=png(grey16)), 4).unique().tolist() == pytest.approx(
        [128 / 127.5 - 1], abs=1e-6
    )
    clear = np.zeros((4, 4, 4), np.uint8)  # fully transparent black
    assert decode.image(raw(png=png(clear)), 4).unique().tolist() == [1.0]
    red = Image.new("P", (4, 4), 0)
    red.putpalette([255, 0, 0])
    file = io.BytesIO()
    red.save(file, "PNG")
    assert decode.image(raw(png=file.getvalue()), 4)[:, 0, 0].tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize(("name", "kind"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_lossy_formats(name, kind):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, kind)
    pixels = decode.image(raw(**{name: file.getvalue()}), 8)
    assert torch.allclose(
        pixels.mean((1, 2)), torch.tensor([200.0, 100.0, 50.0]) / 127.5 - 1, atol=0.05
    )


def test_camera_rotation_is_applied():
    picture = Image.new("RGB", (8, 8))
    picture.paste("white", (0, 0, 8, 4))  # white above, black below
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    pixels = decode.image(raw(jpg=file.getvalue()), 8)
    assert pixels[:, :, 5:].min() > 0.9  # white on the right
    assert pixels[:, :, :3].max() < -0.9


def test_images_that_are_refused():
    eps = io.BytesIO()
    Image.new("RGB", (4, 4)).save(eps, "EPS")
    for files, message in [
        (
            {"png": eps.getvalue()},
            r"its \.png does not decode",
        ),  # only the formats named, whatever the extension
        ({"jpg": b""}, r"its \.jpg does not decode"),
        ({"txt": b"x"}, r"it has no image \(jpg, jpeg, png, webp, .*\), only txt"),
    ]:
        with pytest.raises(BadSample, match=rf"^a\.tar:7: {message}"):
            decode.image(raw(**files), 4)


def test_a_thin_strip_stays_small_and_a_bomb_is_refused(monkeypatch):
    assert decode.image(raw(png=png(np.zeros((1, 60_000, 3), np.uint8))), 2).shape == (3, 2, 2)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="decompression bomb"):
        decode.image(raw(png=png(np.zeros((20, 20, 3), np.uint8))), 20)


def test_a_key_may_be_the_seed_of_the_noise(tmp_path):
    """The very noise that a sampler draws for a picture of this seed; another key is no seed."""
    from distill.sampling import draw_noise, seeded

    x = np.ones((2, 3, 3))
    write_latents(
        str(tmp_path / "%06d.tar"), [("000004", x, "a"), ("17", x, "b"), ("x", x, "c")], per_shard=3
    )
    data = LatentShards(str(tmp_path), seeded=True, limit=2, max_bad_share=1.0)
    for i, seed in enumerate((4, 17)):
        assert torch.equal(data[i]["noise"], draw_noise((2, 3, 3), seeded([seed]))[0])
    assert "noise" not in LatentShards(str(tmp_path))[0]
    whole = LatentShards(str(tmp_path), seeded=True, max_bad_share=1.0)
    assert whole[2]["key"] == "17"
    assert "no seed" in next(iter(whole.bad.values()))


def test_no_more_workers_read_than_there_are_cores(tmp_path, recwarn):
    """torch warns of more, for every loader."""
    path = tmp_path / "lines.txt"
    path.write_text("a star\na disc\n", encoding="utf-8")
    source = prompts(str(path), batch_size=2, num_workers=1000)
    assert source.workers == cores()
    loaders = source.loader(seed=0), source.once([[0, 1]])
    assert loaders[0].num_workers == cores()
    assert not [w for w in recwarn if "worker" in str(w.message)]


def test_few_workers_are_as_asked(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("a star\n", encoding="utf-8")
    assert prompts(str(path), batch_size=1, num_workers=0).workers == 0


def test_equal_reasons_are_said_once():
    bad = {"x:1": "too small", "x:2": "too small", "x:3": "empty"}
    assert reasons_of(bad) == "The first: x:1: too small; x:3: empty"
