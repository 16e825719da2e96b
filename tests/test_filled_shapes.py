"""Evaluations of filled and of edited `shapes`: the measures, the baseline, the errors."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from distill.core.types import FILL, Cond
from distill.evaluation.shapes import Shapes, masked
from distill.evaluation.shapes_edit import EditedShapes
from distill.evaluation.shapes_fill import Blended, FilledShapes, fill_scores, pasted_back
from distill.worlds.shapes.edit_judge import judging_edits
from distill.worlds.shapes.judge import Judge, judging_prompts


@pytest.fixture(scope="module")
def given():
    found = masked(judging_prompts(6, seed=0), range(6))
    return found["pixels"], found[FILL]


@pytest.fixture(scope="module")
def judge():
    return Judge.load()


def test_what_was_masked_itself_has_no_error(judge, given):
    pixels, fill = given
    scores, outcomes = fill_scores(judge, pixels, pixels, fill)
    assert scores == {"known_error": 0, "fill_distance": 0}
    assert all(len(values) == 6 for values in outcomes.values())


def test_errors_outside_the_mask_and_inside_are_kept_apart(judge, given):
    pixels, fill = given
    outside = torch.where(fill >= 0.5, pixels, -pixels)
    inside = torch.where(fill >= 0.5, -pixels, pixels)
    of_outside = fill_scores(judge, outside, pixels, fill)[0]
    of_inside = fill_scores(judge, inside, pixels, fill)[0]
    known = (fill < 0.5).expand_as(pixels)
    by_hand = [
        pixels[i][known[i]].abs().double().mean().item()  # |x - -x| / 2 in [0, 1]
        for i in range(len(pixels))
    ]
    assert of_outside["known_error"] == pytest.approx(sum(by_hand) / 6, rel=1e-2)
    assert of_outside["fill_distance"] == 0
    assert of_inside["known_error"] == 0
    assert of_inside["fill_distance"] > 0.1


def test_the_distance_is_that_of_unit_vectors_under_the_mask(judge, given):
    """LPIPS without learned weights, by loops over the places of a map."""
    pixels, fill = given
    made = pixels.flip(0)
    found = fill_scores(judge, made, pixels, fill)[1]["fill_distance"]
    pasted = pasted_back(made, pixels, fill)
    total, i = 0.0, 2
    for a, b in zip(judge.reader.maps(pasted), judge.reader.maps(pixels), strict=True):
        area = F.interpolate(fill, size=a.shape[-2:], mode="area")[i, 0]
        units = (a[i] / a[i].norm(dim=0), b[i] / b[i].norm(dim=0))
        summed = sum(
            area[y, x] * (units[0][:, y, x] - units[1][:, y, x]).square().sum()
            for y in range(a.shape[-2])
            for x in range(a.shape[-1])
        )
        total += float(summed / area.sum())
    assert [m.shape[1:] for m in judge.reader.maps(pixels[:1])] == [
        (32, 32, 32),
        (64, 16, 16),
        (128, 8, 8),
    ]
    assert found[i].item() == pytest.approx(total, rel=1e-3)


def test_a_blended_sample_is_the_picture_outside_the_mask():
    model = SimpleNamespace(x0=lambda x_t, t, cond: x_t + 1, prediction="eps")
    fill = torch.zeros(2, 1, 4, 4)
    fill[..., 2:] = 1
    known, x_t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    cond = Cond(torch.zeros(2, 1, 1), image=torch.cat([fill, known], 1))
    x0 = Blended(model).x0(x_t, torch.ones(2), cond)
    torch.testing.assert_close(x0[..., :2], known[..., :2])
    torch.testing.assert_close(x0[..., 2:], x_t[..., 2:] + 1)
    assert Blended(model).prediction == "eps"


@pytest.mark.parametrize(
    ("protocol", "image", "says"),
    [
        (FilledShapes(), None, "metrics=shapes_fill: this teacher is no inpainting model"),
        (FilledShapes(), "source", "metrics=shapes_fill: this teacher is no inpainting model"),
        (FilledShapes(blend=True), "mask", "metrics.blend=true: an ordinary model"),
        (EditedShapes(), None, "metrics=shapes_edit: this teacher does not edit"),
        (EditedShapes(), "mask", "metrics=shapes_edit: this teacher does not edit"),
        (Shapes(), "mask", "metrics=shapes: .* fills masked .*; use metrics=shapes_fill"),
        (Shapes(), "source", "metrics=shapes: .* edits pictures; use metrics=shapes_edit"),
    ],
)
def test_a_model_of_another_kind_is_refused(protocol, image, says):
    channels = 4 if image else 0
    teacher = SimpleNamespace(
        latent_shape=(4, 16, 16), unit=8, patch=2, image=image, image_channels=channels
    )
    with pytest.raises(ValueError, match=says):
        protocol.fits(teacher)


def evaluated(protocol, name, folder, **options):
    """The first row and the evaluation of a shipped teacher as student, by a sampler."""
    from distill.config.models import student_of

    model = student_of(name)
    protocol(model, model, folder, options.get("sampler"))
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_blending_with_an_ordinary_model_keeps_the_known_part(tmp_path):
    """At one step it is the picture's own latents, decoded."""
    protocol = FilledShapes(prompts=8, student_steps=[1], teacher_steps=[2], blend=True)
    found = evaluated(protocol, "shapes:unet", tmp_path)
    assert "blended" not in found["protocol"]  # the baseline is compared with the others
    for row in found["rows"]:
        assert row["known_error"] < 0.04  # the autoencoder's, and at the mask's edge
        assert {"prompt_accuracy", "frechet", "fill_distance", "diversity"} <= row.keys()


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["target", "source"])
def test_perfect_edits_and_untouched_sources_are_told_apart(answer, tmp_path):
    """The scores of a model that knows the target, and of one that changes nothing."""
    from distill.config.models import student_of
    from distill.core.process import level_like
    from distill.worlds.shapes.edit_judge import judging_edits, rendered

    model, n = student_of("shapes:unet_edit"), 36
    scenes = [getattr(edit, answer) for edit in judging_edits(n, seed=0)]
    known = iter(model.encode(rendered(scenes)).split(32))

    class Oracle:
        prediction, process = "eps", model.process

        def x0(self, x_t, t, cond):
            found = next(known, None)  # answers beyond the edits are for diversity
            return level_like(x_t, 0.0).view(-1, 1, 1, 1) * x_t if found is None else found

    protocol = EditedShapes(prompts=n, student_steps=[1], teacher_steps=[])
    (row,) = protocol(Oracle(), model, tmp_path)
    if answer == "target":
        assert row["edited"] > 0.85
        assert row["change"] == pytest.approx(1, abs=0.25)
        assert row["stuck"] < 0.1
    else:
        assert row["followed"] < 0.15
        assert row["change"] < 0.5  # the error of the autoencoder, over small changes too
        assert row["stuck"] > 0.85
    assert row["kept"] > 0.85
    assert row["kept_error"] < 0.03


@pytest.mark.slow
def test_the_shipped_model_fills_what_prompts_say(tmp_path):
    """Guided, in a few steps; and its known pixels are those of the picture."""
    protocol = FilledShapes(prompts=40, student_steps=[], teacher_steps=[8], guidance=2.0)
    (row,) = evaluated(protocol, "shapes:unet_inpaint", tmp_path)["rows"]
    assert row["prompt_accuracy"] > 0.6
    assert row["known_error"] < 0.05


@pytest.mark.slow
def test_the_shipped_model_edits(tmp_path):
    protocol = EditedShapes(prompts=36, student_steps=[], teacher_steps=[8])
    (row,) = evaluated(protocol, "shapes:unet_edit", tmp_path)["rows"]
    assert row["followed"] > 0.3
    assert row["kept_error"] < 0.06


def test_a_row_of_edits_says_how_many_pictures_it_draws():
    """Few prompts have few instructions that add an object, of which several answers are drawn."""
    assert Shapes(prompts=8).count() == 8 + 8 * 8
    assert EditedShapes(prompts=400).count() == 400 + 8 * 8
    edits = judging_edits(8, seed=0)
    assert EditedShapes(prompts=8).count() == 8 + 8 * sum(edit.task == "add" for edit in edits)
    assert 0 < sum(edit.task == "add" for edit in edits) < 8
