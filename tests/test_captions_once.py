"""Captions that are embedded before training, and not in every step."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import kills
from distill.data.source import latents
from distill.training.captions import embedded


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers("mmdit")


def test_items_bring_the_embedding_of_their_caption(teacher, shards):
    """Of every caption once, in batches of one size, which arithmetic may depend on."""
    data = latents(str(shards), batch_size=5, embed_once=True)
    captions, asked = data.dataset.captions(), []

    class Asked:
        def embed(self, batch):
            asked.append(len(batch))
            return teacher.embed(batch)

    assert len(captions) == len(set(captions)) > 6
    rows = embedded(Asked(), captions, 5)
    assert set(asked) == {5}
    assert len(asked) == -(-len(captions) // 5)
    data.dataset.add_embeddings(captions, rows)
    data.dataset.embedder = lambda *_: None  # refers to networks, and is left out of a worker
    assert pickle.loads(pickle.dumps(data.dataset)).embedder is None
    batch = next(iter(data.loader(seed=0)))
    expected = teacher.embed(batch["caption"]).tensors()
    assert expected.keys() == rows.keys()
    for name, x in expected.items():
        torch.testing.assert_close(batch[name], x)


def test_the_last_batch_is_filled_where_captions_are_few(teacher):
    """One caption in a batch of four gives what four copies of it give."""
    rows = embedded(teacher, ["a red star"], 4)
    four = teacher.embed(["a red star"] * 4).tensors()
    assert all(torch.equal(rows[name], x[:1]) for name, x in four.items())


def test_embedded_captions_leave_a_run_as_it_is(command, pipelines, shards, tmp_path, monkeypatch):
    """A run that reads its captions twice embeds them before its first step."""
    from distill.teachers.sd3 import SD3

    asked: list[int] = []
    encode = SD3._encode

    def counted(self, captions):
        asked.append(len(captions))
        return encode(self, captions)

    monkeypatch.setattr(SD3, "_encode", counted)
    words = [
        "debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics",
        "data.batch_size=4", "trainer.max_steps=12", "callbacks.samples=null", "~logger",
        "loop.schedule=constant",
    ]  # fmt: skip
    found = {}
    for once in ("true", "false"):
        asked.clear()
        key = f"data.embed_once={once}"
        assert command("run", *words, key, f"run_dir={tmp_path / once}")[0] == 0
        found[once] = kills.content(tmp_path / once / "checkpoints" / "step_000012.ckpt")
        captions = latents(str(shards), batch_size=4).dataset.captions()
        assert len(captions) > 12
        assert asked.count(4) == (math.ceil(len(captions) / 4) if once == "true" else 12)
    assert found["true"] == found["false"]
    # Half of it reads few captions twice: it embeds them in its steps, and the rest before them.
    half = tmp_path / "half"
    assert command("run", *words, "trainer.max_steps=6", f"run_dir={half}")[0] == 0
    assert command("run", f"resume={half}", "trainer.max_steps=12")[0] == 0
    assert kills.content(half / "checkpoints" / "step_000012.ckpt") == found["true"]


def test_a_run_that_reads_few_captions_twice_embeds_them_in_its_steps(
    command, pipelines, shards, tmp_path, monkeypatch
):
    from distill.data.datasets import LatentShards

    monkeypatch.setattr(LatentShards, "add_embeddings", None)  # would fail
    words = ["debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics"]
    assert command("run", *words, "data.embed_once=true", f"run_dir={tmp_path / 'run'}")[0] == 0


def test_the_empty_caption_is_not_encoded_again(teacher, monkeypatch):
    """Data with cached embeddings ask for it in every step."""
    null = teacher.embed([""]).null
    monkeypatch.setattr(type(teacher), "_encode", None)  # would fail
    again = teacher.embed([""])
    for found in (again, again.null):
        assert found.tensors().keys() == null.tensors().keys()
        assert all(torch.equal(x, null.tensors()[name]) for name, x in found.tensors().items())


def test_of_several_captions_the_first_that_is_too_long_is_named(teacher):
    """All of them are tokenised in one call."""
    long = "a red star and " * 60
    assert teacher.unread(["short", "a red star", long.strip(), long.replace("red", "blue")]) == (
        teacher.unread([long.strip()])
    )
    assert teacher.unread([long.strip()]) is not None
    assert teacher.unread(["a" * 3, ""]) is None
