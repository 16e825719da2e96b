"""Edit pairs of `shapes`: drawn, judged, written as shards and read; and what pairs are refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from distill.config.compose import shipped
from distill.data.edit_pairs import EditPairs
from distill.data.source import drawn, pairs
from distill.data.write import write_images, write_pairs, write_shard
from distill.worlds.shapes.edit_judge import EditJudge, changed, judging_edits, rendered, unchanged
from distill.worlds.shapes.edits import TASKS, name_of, redrawn, sample_edit
from distill.worlds.shapes.render import render
from distill.worlds.shapes.scenes import Edits
from distill.worlds.shapes.world import HELD_OUT

EDITS = [sample_edit(5, i, task) for i, task in enumerate(4 * list(TASKS))]


@pytest.fixture(scope="module")
def judge():
    return EditJudge.load()


def png(edit, side, key="a"):
    from distill.data.write import _png

    return _png(key, render([getattr(edit, side)])[0])


def test_an_edit_is_a_function_of_its_number():
    assert [sample_edit(5, i, task) for i, task in enumerate(4 * list(TASKS))] == EDITS
    assert sample_edit(5, 0) != sample_edit(6, 0) != sample_edit(6, 1)
    assert {sample_edit(1, i).task for i in range(60)} == set(TASKS)


def test_every_row_of_an_evaluation_has_the_true_targets_of_the_first(judge):
    """Their renders are read once: the second row reads its own pictures alone."""
    read, sizes = judge.judge.reader.features, []

    def counted(pixels):
        sizes.append(len(pixels))
        return read(pixels)

    judge.judge._reference = None
    pictures = rendered([edit.source for edit in EDITS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge.judge.reader, "features", counted)
        first = judge(pictures, EDITS)
        of_first = sum(sizes)
        sizes.clear()
        assert judge(pictures, EDITS) == pytest.approx(first, nan_ok=True)
    assert of_first - sum(sizes) == len(EDITS)


def test_an_instruction_names_what_changes_and_nothing_else_changes():
    for edit in EDITS:
        before = [t for i, t in enumerate(edit.source.things) if i not in edit.of_source]
        after = [t for i, t in enumerate(edit.target.things) if i not in edit.of_target]
        assert before == after
        assert (edit.source.background == edit.target.background) == (edit.task != "background")
        assert edit.source.background_shade == edit.target.background_shade
        for scene in (edit.source, edit.target):
            names = [name_of(thing) for thing in scene.things]
            assert len(set(names)) == len(names)
            assert not {(thing.kind, thing.colour) for thing in scene.things} & HELD_OUT
        for i in edit.of_source:
            assert name_of(edit.source.things[i]) in edit.instruction
    counts = {e.task: len(e.target.things) - len(e.source.things) for e in EDITS}
    assert {task for task, n in counts.items() if n} == {"add", "remove"}


def test_instructions_fit_the_text_encoder():
    file = Path(shipped("shapes:mmdit_small")) / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    texts = [sample_edit(2, i).instruction for i in range(200)]
    assert max(len(each.ids) for each in tokenizer.encode_batch(texts)) <= 25


def test_pictures_differ_only_where_the_edit_is():
    for edit in EDITS:
        source, target = render([edit.source, edit.target]).astype(int)
        differs = np.abs(target - source).max(-1) > 1  # of rounding
        assert differs.any()
        assert not (differs & unchanged(edit)).any(), edit.instruction
        assert unchanged(edit).any()
        assert differs[changed(edit)].any()


def test_true_targets_are_right_and_sources_stick(judge):
    true = judge(rendered([edit.target for edit in EDITS]), EDITS)
    assert true["followed"] == true["change"] == 1
    assert true["edited"] > 0.9
    assert true["stuck"] == true["frechet"] == pytest.approx(0, abs=1e-6)
    same = judge(rendered([edit.source for edit in EDITS]), EDITS)
    assert same["followed"] == same["change"] == same["kept_error"] == 0
    assert same["stuck"] > 0.9
    assert same["kept"] > 0.9
    assert same["frechet"] > 10


def test_another_picture_of_the_target_does_not_keep_the_rest(judge):
    others = [e.target for e in judging_edits(len(EDITS), seed=1)]
    scores = judge(rendered(others), EDITS)
    assert scores["edited"] < 0.1
    assert scores["kept"] < 0.3
    assert scores["kept_error"] > 0.1


def test_what_an_added_object_leaves_free_is_the_diversity(judge):
    adds = [edit for edit in EDITS if edit.task == "add"]
    random = np.random.default_rng(0)
    free = [redrawn(random, edit) for edit in adds for _ in range(6)]
    groups = rendered([edit.target for edit in free]).unflatten(0, (len(adds), 6))
    assert judge(groups.flatten(0, 1), [e for e in adds for _ in range(6)])["followed"] > 0.9
    assert 0.6 < judge.diversity(groups, adds) < 1.6
    one = rendered([e.target for e in adds for _ in range(6)]).unflatten(0, (len(adds), 6))
    assert judge.diversity(one, adds) == pytest.approx(0, abs=1e-6)


def shards(folder, n=7, per_shard=4):
    edits = [sample_edit(0, i) for i in range(n)]

    def samples():
        for i, edit in enumerate(edits):
            source, target = render([edit.source, edit.target])
            yield f"{i:06d}", source, target, edit.instruction, {"task": edit.task}

    write_pairs(f"{folder}/edits-%06d.tar", samples(), per_shard)
    return str(folder)


def test_pairs_come_back_as_written_and_as_drawn(tmp_path, caplog):
    data = pairs(shards(tmp_path), size=64, batch_size=2).dataset
    rendering = drawn(Edits(7), batch_size=2).dataset
    assert len(data) == 7
    for i in range(7):
        read, made = data[i], rendering[i]
        assert read["caption"] == made["caption"] == sample_edit(0, i).instruction
        assert torch.equal(read["source"], made["source"])
        assert torch.equal(read["pixels"], made["pixels"])
        assert not torch.equal(read["source"], read["pixels"])
    assert not caplog.messages  # dotted names are meant here
    (tmp_path / "again").mkdir()
    shards(tmp_path / "again")
    for name in ("edits-000000.tar", "edits-000001.tar"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("start", [0, 3])
def test_pairs_keep_the_exact_order_over_ranks_and_resumption(tmp_path, start):
    source = pairs(shards(tmp_path), size=64, batch_size=2)

    def keys(**options):
        return [b["key"] for b in itertools.islice(source.loader(seed=3, **options), 6)]

    assert keys(start=start)[: 6 - start] == keys()[start:]
    both = [a + b for a, b in zip(keys(rank=0, world=2), keys(rank=1, world=2), strict=True)]
    wide = pairs(str(tmp_path), size=64, batch_size=4).loader(seed=3)
    assert both == [batch["key"] for batch in itertools.islice(wide, 6)]


def test_pairs_fall_into_buckets_by_their_target(tmp_path):
    wide = np.zeros((32, 64, 3), np.uint8)
    square = np.zeros((48, 48, 3), np.uint8)
    samples = [("a", wide, wide, "x", {}), ("b", square, square, "y", {})]
    write_pairs(f"{tmp_path}/x-%d.tar", samples, 5)
    data = EditPairs(str(tmp_path), size=48, buckets=[[64, 32], [48, 48]])
    assert data.groups == {0: [0], 1: [1]}
    assert data[0]["source"].shape == data[0]["pixels"].shape == (3, 32, 64)


def test_pairs_that_are_none_are_refused_in_one_sentence(tmp_path):
    edit = EDITS[0]
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        files = {f"{name}.png": png(edit, name), "txt": b"x"}
        write_shard(tmp_path / name / "x.tar", [("a", files)])
    (tmp_path / "plain").mkdir()
    pixels = render([edit.source])[0]
    write_images(f"{tmp_path}/plain/x-%d.tar", [("a", pixels, "c", {})], 5)
    for name, lacks in {"source": "target", "target": "source", "plain": "source"}.items():
        with pytest.raises(ValueError, match="an edit pair is") as error:
            pairs(str(tmp_path / name), size=64, batch_size=1)
        said = str(error.value)
        assert said == (
            f"data.path={tmp_path / name}: none of its 1 samples has a {lacks} picture; an edit"
            " pair is <key>.source.png, <key>.target.png and <key>.txt in a shard"
        )


def test_single_bad_pairs_are_named_and_replaced(tmp_path):
    good = {f"{s}.png": png(EDITS[0], s) for s in ("source", "target")} | {"txt": b"x"}
    lacking = {name: data for name, data in good.items() if name != "target.png"}
    small = {**good, "target.png": tiny_png(32)}
    write_shard(tmp_path / "x.tar", [("a", good), ("b", lacking), ("c", small)])
    data = pairs(str(tmp_path), size=64, batch_size=1, max_bad_share=1).dataset
    assert [data[i]["key"] for i in range(3)] == ["a"] * 3
    reasons = [data.bad[f"{tmp_path}/x.tar:{key}"] for key in "bc"]
    assert reasons[0] == "it has no target picture (target.jpg, ...), only source.png, txt"
    assert reasons[1] == "its source is 64 x 64, its target 32 x 32; a pair must have one size"


def tiny_png(side):
    from distill.data.write import _png

    return _png("a", np.zeros((side, side, 3), np.uint8))


def test_a_folder_of_pictures_is_no_set_of_pairs(tmp_path):
    (tmp_path / "a.source.png").write_bytes(tiny_png(8))
    with pytest.raises((ValueError, OSError), match="shard"):
        pairs(str(tmp_path), size=8, batch_size=1)
