"""A key that nothing reads is left out by what the sentence says, whoever has set it."""

from __future__ import annotations

import pytest

from distill.api.settings import compose
from distill.config import leaving_out
from distill.config.leaving_out import leave_out

EDITS, PREFERS = "experiment=edit_shapes", "experiment=dpo_lora_shapes"
SHIFTED = "experiment=nitrofusion_shift_shapes"
PAIRS = ("data=renders", "data.pairs=true")


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ((EDITS, "method=dmd2"), "method.distill"),
        ((EDITS, "method=consistency"), "method.distill"),
        ((EDITS, "method=regression", "data.seeded=true"), "method.distill"),
        ((EDITS, "method=dmd2", "method.distill.guidance=2"), "method.distill"),
        ((EDITS, "method=dmd2", "method.distill=3"), "method.distill"),
        ((PREFERS, *PAIRS, "student=full"), "student.rank"),
        ((SHIFTED, "discriminator=teacher_features"), "discriminator.heads.levels"),
    ],
)
def test_a_key_that_a_file_sets_is_left_out_by_name(words, key):
    with pytest.raises(ValueError, match=rf"^{key}: .* takes no such key; ") as caught:
        compose(*words)
    assert str(caught.value).endswith(f"takes no such key; leave it out by ~{key}")
    compose(*words, f"~{key}")


def test_a_node_of_which_a_file_sets_a_key_alone_is_left_out_by_name():
    words = ["experiment=add_ablations/a_features", "discriminator=none"]
    with pytest.raises(ValueError, match=r"must be a node with a _target_; give one") as caught:
        compose(*words)
    assert str(caught.value).endswith("or leave it out by ~discriminator.features")
    with pytest.raises(ValueError, match="method needs a discriminator of pixels, and this one"):
        compose(*words, "~discriminator.features")


def test_a_part_of_an_optimizer_that_a_file_sets_is_left_out_by_name():
    words = ["experiment=sdxl_dmd2", "teacher=shapes_unet", "data=renders", "method=ladd"]
    said = (
        r"^optimizer\.fake_score: nothing reads this key; leave it out by ~optimizer\.fake_score$"
    )
    with pytest.raises(ValueError, match=said):
        compose(*words)
    with pytest.raises(ValueError, match=r"^discriminator\.features\.checkpointing: "):
        compose(*words, "~optimizer.fake_score")


@pytest.mark.parametrize(
    ("word", "key"),
    [("+method.pace=3", "method.pace"), ("+method.pace.slow=3", "method.pace")],
)
def test_a_key_that_was_typed_is_left_out_as_it_came(word, key):
    with pytest.raises(ValueError, match=rf"^{key}: .* takes no such key; leave it out$"):
        compose(EDITS, word)


def test_a_key_of_a_resumed_run_is_in_its_folder(monkeypatch):
    monkeypatch.setattr(leaving_out, "_composes_run", lambda: True)
    said = "take it out of the config.yaml of runs/a"
    assert leave_out("loop.pace", ["resume=runs/a", "trainer.max_steps=9"]) == said
    assert leave_out("loop.pace", ["resume=runs/a", "+loop.pace=9"]) == "leave it out"


def test_outside_of_a_run_no_argument_is_named():
    """A key of Python's, or of the configuration in a run folder."""
    assert leave_out("method.pace", ["run=runs/a"]) == "leave it out"


def test_every_job_of_a_sweep_names_the_key_that_its_file_sets(command):
    words = ["-m", EDITS, "method=dmd2,consistency"]
    code, _, err = command("run", *words)
    assert code == 1
    assert err.count("takes no such key; leave it out by ~method.distill") == 2 * 2  # and the list
