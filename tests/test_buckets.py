"""Buckets: the order is pure, one bucket a batch, alike on all ranks; and pictures and latents of
several shapes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from distill.data import decode
from distill.data.bad import BadSample
from distill.data.buckets import nearest
from distill.data.datasets import ImageShards, LatentShards
from distill.data.source import BucketOrder, Source
from test_data import npy, png, put_tar

GROUPS = {0: [0, 3, 6, 9, 12], 2: [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 15], 5: [16, 17]}
BUCKETS = [[16, 8], [8, 8], [8, 16]]


def order(steps: int, groups=GROUPS, **options) -> list[list[int]]:
    return list(
        itertools.islice(BucketOrder(groups, **{"seed": 3, "batch_size": 4} | options), steps)
    )


def bucket_of(batch) -> int:
    (bucket,) = {k for k, group in GROUPS.items() for i in batch if i in group}
    return bucket


# -- the order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 30])
def test_every_batch_is_of_one_bucket_and_every_start_resumes(size):
    whole = order(60, batch_size=size)
    assert all(bucket_of(batch) in GROUPS for batch in whole)
    for start in (1, 7, 18, 41):
        assert order(60 - start, batch_size=size, start=start) == whole[start:]
    assert order(60, batch_size=size, seed=4) != whole


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 1), (2, 3)])
def test_ranks_read_together_what_one_process_reads(world, size):
    whole = order(40, batch_size=world * size)
    ranks = [order(40, batch_size=size, rank=rank, world=world) for rank in range(world)]
    assert whole == [sum(parts, []) for parts in zip(*ranks, strict=True)]


def test_each_bucket_gives_every_sample_once_an_epoch_of_its_own():
    seen: dict[int, list[int]] = {k: [] for k in GROUPS}
    for batch in order(200):
        seen[bucket_of(batch)] += batch
    for k, group in GROUPS.items():
        epochs = [
            seen[k][i : i + len(group)] for i in range(0, len(seen[k]) - len(group) + 1, len(group))
        ]
        assert len(epochs) > 20
        assert all(sorted(epoch) == group for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
    shares = Counter(bucket_of(batch) for batch in order(900))
    assert all(
        abs(shares[k] - 50 * len(group)) <= 3 for k, group in GROUPS.items()
    )  # 18 samples, 900 batches


def test_the_order_is_pinned():
    """A changed order would silently break the exact resume of old runs, so it is written down."""
    assert order(3) == [[9, 12, 3, 6], [7, 4, 14, 5], [2, 10, 11, 13]]


# -- shapes ----------------------------------------------------------------------------------------


def test_the_nearest_bucket_is_that_of_the_shape():
    buckets = [(640, 384), (512, 512), (384, 640), (1024, 1024)]
    sizes = {(1600, 900): 0, (100, 100): 1, (3000, 2900): 3, (300, 4000): 2, (600, 500): 1}
    assert {size: nearest(buckets, size) for size in sizes} == sizes


def put_pictures(path, n: int = 24) -> str:
    """Pictures of three shapes in turn, of noise; every seventh is cut in half."""
    files = {}
    for i in range(n):
        width, height = ((40, 20), (18, 18), (16, 30))[i % 3]
        data = png(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))
        files |= {
            f"{i:03d}.png": data[: len(data) // 2] if i % 7 == 6 else data,
            f"{i:03d}.txt": b"c",
        }
    return put_tar(path, files)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_pictures_has_one_shape_and_bad_ones_are_replaced_by_their_like(
    tmp_path, workers
):
    data = ImageShards(put_pictures(tmp_path / "x.tar"), size=8, buckets=BUCKETS, max_bad_share=0.5)
    assert data.groups == {k: list(range(k, 24, 3)) for k in range(3)}
    source = Source(data, 2, workers)
    whole = list(itertools.islice(source.loader(seed=1), 20))
    assert {tuple(batch["pixels"].shape[1:]) for batch in whole} == {(3, h, w) for w, h in BUCKETS}
    for batch in whole:
        _, _, height, width = batch["pixels"].shape
        assert {int(key) % 3 for key in batch["key"]} == {BUCKETS.index([width, height])}
    assert data.failed > 0
    resumed = list(itertools.islice(source.loader(seed=1, start=13), 7))
    assert [b["key"] for b in resumed] == [b["key"] for b in whole[13:]]
    halves = [
        itertools.islice(Source(data, 1).loader(seed=1, rank=r, world=2), 20) for r in range(2)
    ]
    assert [a["key"] + b["key"] for a, b in zip(*halves, strict=True)] == [b["key"] for b in whole]


def test_a_picture_is_cut_to_its_bucket_and_not_squeezed():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 10:50] = 255  # the central 2:1 is white
    sample = {"__key__": "0", "__url__": "a", "png": png(picture)}
    assert torch.equal(decode.image(sample, 40, 20), torch.ones(3, 20, 40))
    said = "its image is 60 x 20, under half of 90 x 45, the nearest of data.buckets; remove it, or"
    with pytest.raises(BadSample, match=said):
        decode.image(sample, 90, 45)


def test_the_size_is_read_from_the_first_bytes_and_turned_as_the_camera_says(tmp_path):
    import io

    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    files = {}
    for name, options in {"a.jpg": {"exif": exif}, "b.webp": {}, "c.png": {}}.items():
        picture.save(
            file := io.BytesIO(), {"j": "JPEG", "w": "WEBP", "p": "PNG"}[name[2]], **options
        )
        files |= {name: file.getvalue(), f"{name[0]}.txt": b"c"}
    data = ImageShards(put_tar(tmp_path / "x.tar", files), size=64)
    assert [data.measure(i) for i in range(3)] == [(300, 500), (500, 300), (500, 300)]


def test_latents_take_their_buckets_from_the_manifest(tmp_path):
    files = {}
    for i in range(9):
        width, height = ((4, 2), (3, 3), (5, 5))[i % 3]
        files |= {
            f"{i}.latent.npy": npy(np.full((2, height, width), i, np.float16)),
            f"{i}.txt": b"c",
        }
    path = put_tar(tmp_path / "x.tar", files)
    (tmp_path / "manifest.json").write_text(
        json.dumps({"buckets": [[4, 2], [3, 3]]}), encoding="utf-8"
    )
    data = LatentShards(path, max_bad_share=1.0)
    seen = set()
    for batch in itertools.islice(Source(data, 2).loader(seed=0), 12):
        seen |= {(int(key) % 3, tuple(batch["x0"].shape[1:])) for key in batch["key"]}
    assert seen == {(0, (2, 2, 4)), (1, (2, 3, 3))}
    assert "its latents are [2, 5, 5], its bucket's [2, 3, 3]" in data.bad[f"{path}:2"]


def test_buckets_in_pixels_are_none_of_latents(tmp_path):
    """Given once more to the run they would leave no sample that is good."""
    files = {"0.latent.npy": npy(np.zeros((2, 2, 4), np.float16)), "0.txt": b"c"}
    path = put_tar(tmp_path / "x.tar", files)
    (tmp_path / "manifest.json").write_text(json.dumps({"buckets": [[4, 2]]}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.buckets=\[\[32, 16\]\]: .*in latents.*leave it"):
        LatentShards(path, buckets=[[32, 16]])
    assert len(LatentShards(path, buckets=[[4, 2], [2, 4]])) == 1


@pytest.mark.parametrize("wrong", [[], [[8]], [[8, 0]], [[8, 8, 8]]])
def test_buckets_that_are_none(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"data.buckets=.* must be null or like \[\[640, 384\]"):
        ImageShards(put_pictures(tmp_path / "x.tar", 3), size=8, buckets=wrong)


@pytest.mark.parametrize(
    "method",
    ["ladd", *(pytest.param(m, marks=pytest.mark.slow) for m in ("add", "nitrofusion", "dmd2"))],
)
def test_a_run_on_buckets_goes_on_exactly(method, command, pipelines, tmp_path):
    import tiny
    from distill.storage import checkpoint_files

    data = [
        "data=images",
        f"data.path={put_pictures(tmp_path / 'x.tar')}",
        "data.buckets=[[32,16],[16,16],[16,32]]",
    ]
    eyes = [f"discriminator.features.path={tiny.vit()}"] if method == "add" else []
    eyes += (
        ["method.warm_start=0"] if method == "nitrofusion" else []
    )  # which learns from pairs, and pictures are none
    quiet = ["~metrics", "~callbacks.samples", "data.num_workers=0", "data.max_bad_share=0.5"]
    run = [
        "debug=smoke",
        f"method={method}",
        f"teacher.path={pipelines('mmdit')}",
        *data,
        *eyes,
        *quiet,
    ]
    run += [
        "callbacks.checkpoint.every=2",
        "callbacks.checkpoint.keep=0",
        "trainer.max_steps=4",
        "run_dir=run",
    ]
    assert command("run", *run)[0] == 0
    end = tmp_path / "run" / "checkpoints" / "step_000004.ckpt"
    whole = checkpoint_files.read_checkpoint(end)["state_dict"]
    whole = {name: x.clone() for name, x in whole.items()}
    end.unlink()
    assert command("run", "resume=run")[0] == 0
    assert tiny.same(checkpoint_files.read_checkpoint(end)["state_dict"], whole)
