"""Captions that are embedded before training, and not in every step."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import pickle
import weakref
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import distill
import families
import kills
import tiny
from distill.core.types import Cond
from distill.data.source import latents
from distill.training import captions as embedding
from distill.training.captions import embedded
from distill.training.loop_settings import LoopSettings


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


class Wide:
    """A teacher whose embeddings take a mebibyte each."""

    def embed(self, batch):
        return Cond(torch.ones(len(batch), 2**18))


def test_embeddings_exist_only_once_in_memory():
    """Also at their end: they are not put together from parts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        rows = embedded(Wide(), [str(i) for i in range(40)], 2)
    events = sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    peak = max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
    (total,) = (x.nbytes for x in rows.values())
    assert total == 40 * 2**20
    assert total <= peak < 1.2 * total


def test_ranks_of_one_machine_share_its_memory(monkeypatch, caplog):
    """Each of them holds all embeddings."""
    captions = [str(i) for i in range(4)]
    monkeypatch.setattr(
        embedding, "memory_available", lambda: 4 * 5 * 2**20
    )  # a quarter of it counts
    assert embedded(Wide(), captions, 2) is not None
    with caplog.at_level("WARNING"):
        assert embedded(Wide(), captions, 2, ranks=2) is None
    (said,) = caplog.messages
    assert said.endswith("those of the data would take 8 MiB of memory")

    method = SimpleNamespace(teacher=Wide(), loop=SimpleNamespace(settings=LoopSettings()))
    added: list[int] = []

    class Data:
        def __len__(self):
            return len(captions)

        def captions(self):
            return captions

        def add_embeddings(self, found, rows):
            added.append(len(found))

    for nodes in (2, 1):  # two ranks, on two machines or on one
        plugin = SimpleNamespace(train_step_context=contextlib.nullcontext)
        about = {"world_size": 2, "num_nodes": nodes, "max_steps": 9, "precision_plugin": plugin}
        method._trainer = method.trainer = SimpleNamespace(**about)
        embedding._embed(method, Data(), 2)
    assert added == [4]


def test_captions_are_read_without_latents(shards):
    data = latents(str(shards), batch_size=4).dataset
    expected = {data.caption(data.shards.read(i)) for i in range(len(data))}
    kept, read = data.shards._kept, []
    data.shards._kept = SimpleNamespace(
        read=lambda path, offset, size: read.append(size) or kept.read(path, offset, size)
    )
    assert set(data.captions()) == expected
    assert sum(read) <= sum(len(caption.encode()) + 1 for caption in expected) * 2


@pytest.mark.parametrize("max_steps", [20, -1])
def test_trainings_in_python_embed_once(max_steps, pipelines, shards, tmp_path, monkeypatch):
    """With `load_data`, also without an end, and with text encoders that are loaded when needed."""
    path = f"data.path={shards}"
    settings = distill.compose(
        "method=ladd", f"teacher.path={pipelines('mmdit')}", path, "data=latents",
        "data.embed_once=true", "data.batch_size=4",
    )  # fmt: skip
    teacher = families.teacher_at(pipelines("mmdit"), deferred=["text_encoder"])
    asked, encode = [], type(teacher)._encode
    monkeypatch.setattr(
        type(teacher),
        "_encode",
        lambda self, batch: asked.append(len(batch)) or encode(self, batch),
    )
    method, data = tiny.ladd(teacher), distill.load_data(settings, teacher)
    count = math.ceil(len(data.source.dataset.captions()) / 4)
    parts = [name for name in teacher.pipeline.components if name.startswith("text_encoder")]

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 2

    for _ in range(2):  # the second may be of another teacher or precision, and embeds anew
        asked.clear()
        tiny.trainer(tmp_path, max_steps, Stop()).fit(method, data)
        assert asked.count(4) == count
        assert [getattr(teacher.pipeline, name) for name in parts] == [None] * len(parts)


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_holds_text_encoders_whose_captions_are_embedded(
    command, pipelines, shards, tmp_path, monkeypatch
):
    """From the first step on; pictures of other prompts and the student's folder come after it."""
    from transformers import CLIPTextModelWithProjection

    from distill.training.loop import TwoPlayerLoop

    made: list[weakref.ref] = []
    init, step = CLIPTextModelWithProjection.__init__, TwoPlayerLoop.training_step
    alive: list[int] = []

    def counted(self, *args, **options):
        init(self, *args, **options)
        made.append(weakref.ref(self))

    def stepped(self, method, batch):
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        return step(self, method, batch)

    monkeypatch.setattr(CLIPTextModelWithProjection, "__init__", counted)
    monkeypatch.setattr(TwoPlayerLoop, "training_step", stepped)
    words = [
        "debug=smoke", f"teacher.path={pipelines('mmdit')}", f"data.path={shards}", "~metrics",
        "data.batch_size=4", "trainer.max_steps=12", "data.embed_once=true", "~logger",
        "callbacks.samples.prompts=[a black cat,a white dog]", "callbacks.samples.every=4",
    ]  # fmt: skip
    run = tmp_path / "run"
    assert command("run", *words, f"run_dir={run}")[0] == 0
    assert made
    assert alive == [0] * 12
    assert (run / "samples" / "step_000012.png").is_file()
    assert (run / "student" / "text_encoder" / "model.safetensors").is_file()
