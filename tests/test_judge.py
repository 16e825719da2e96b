"""The judge of `shapes`, with an oracle in place of the trained reader: what is scored, and what is
left alone.
"""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.worlds.shapes.frames import framed
from distill.worlds.shapes.judge import (
    Judge,
    as_saved,
    fresh_renders,
    judging_prompts,
    stripe_sharpness,
)
from distill.worlds.shapes.reader import CHOICES, Reader, targets
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import HELD_OUT, Prompt, Scene, Thing, draw_scene, sample

SAID = Prompt(
    (Thing("circle", "red", "striped", "small"), Thing("star", "green", "solid", "large")),
    "horizontal",
    "white",
    "",
)
SILENT = Prompt((Thing("circle", "red"), Thing("star", "green")), "horizontal", None, "")
OTHER = {
    "kind": "cross",
    "colour": "blue",
    "fill": "dotted",
    "size": "large",
    "axis": "vertical",
    "background": "pink",
}
PROMPTS = judging_prompts(64, seed=0)


def facts(scene: Scene) -> Prompt:
    things = tuple(Thing(t.kind, t.colour, t.fill, t.size) for t in scene.things)
    return Prompt(things, scene.axis, scene.background, "")


class Oracle:
    """A reader that knows the scenes of some pictures, and recognises those pictures by a 4 x 8
    thumbnail.
    """

    def __init__(self, scenes: list[Scene]):
        self.truth = targets([facts(scene) for scene in scenes])
        self.known = self.features(
            torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
        )

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(pixels, (4, 8)).flatten(1)  # [B, 96]

    def answer(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        index = torch.cdist(features, self.known).argmin(1)
        return {
            q: F.one_hot(self.truth[q][index].clamp(min=0), len(CHOICES[q])).float()
            for q in CHOICES
        }


def scenes_of(prompts: list[Prompt], seed: int) -> list[Scene]:
    """The scenes behind `fresh_renders`."""
    return [
        draw_scene(np.random.default_rng([9_000_000 + seed, i, 2]), prompt)
        for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(Oracle(scenes_of(PROMPTS, 0) + scenes_of(PROMPTS, 1)))


def changed(prompt: Prompt, attribute: str) -> Prompt:
    """The prompt with another word for one attribute: of the scene, or of the first thing."""
    if attribute == "count":
        return replace(prompt, things=(*prompt.things, Thing("cross", "blue")))
    if attribute in ("axis", "background"):
        return replace(prompt, **{attribute: OTHER[attribute]})
    first, *rest = prompt.things
    return replace(prompt, things=(replace(first, **{attribute: OTHER[attribute]}), *rest))


def test_renders_of_the_prompts_are_right_in_every_respect(judge):
    features, answers = judge.read(fresh_renders(PROMPTS, seed=1))
    scores = judge.accuracy(answers, PROMPTS)
    assert scores == dict.fromkeys(
        ("prompt_accuracy", "kind", "colour", "fill", "size", "axis", "background", "count"), 1.0
    )
    assert features.shape == (64, Reader.FEATURES)


def test_rows_of_an_evaluation_share_one_reading_of_the_reference():
    class Counts(Oracle):
        read = 0

        def features(self, pixels):
            self.read += len(pixels)
            return super().features(pixels)

    reader = Counts(scenes_of(PROMPTS, 0))
    judge, pictures, before = Judge(reader), fresh_renders(PROMPTS, seed=0), reader.read
    rows = [judge(pictures, PROMPTS) for _ in range(3)]
    assert rows == 3 * rows[:1]
    assert reader.read - before == 4 * len(PROMPTS)
    assert judge(pictures, PROMPTS, reference_seed=1)["frechet"] > rows[0]["frechet"]
    assert judge(pictures[:9], PROMPTS[:9])["frechet"] < 1e-6


@pytest.mark.parametrize("attribute", [*OTHER, "count"])
def test_one_wrong_word_fails_the_prompt_and_counts_once(attribute):
    """Four pictures of the same eleven facts; what is seen in one of them differs in one word."""
    seen = [SAID, SAID, changed(SAID, attribute), SAID]
    scores = Judge.accuracy({q: t.clamp(min=0) for q, t in targets(seen).items()}, [SAID] * 4)
    times_said = (
        4 if attribute in ("axis", "background", "count") else 8
    )  # scene by scene, or thing by thing
    expected = dict.fromkeys(scores, 1.0) | {"prompt_accuracy": 0.75, attribute: 1 - 1 / times_said}
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize("attribute", ["fill", "size", "background"])
def test_what_the_prompt_leaves_out_cannot_be_wrong(attribute):
    seen = [SAID, changed(SAID, attribute)]
    scores = Judge.accuracy(targets(seen), [SILENT] * 2)
    assert scores["prompt_accuracy"] == 1
    assert all(math.isnan(scores[name]) for name in ("fill", "size", "background"))
    assert [scores[name] for name in ("kind", "colour", "axis", "count")] == [1, 1, 1, 1]


def test_things_in_the_wrong_order_are_wrong():
    swapped = replace(SAID, things=SAID.things[::-1])
    scores = Judge.accuracy({q: t.clamp(min=0) for q, t in targets([swapped]).items()}, [SAID])
    assert [scores[name] for name in ("prompt_accuracy", "kind", "colour", "count")] == [0, 0, 0, 1]


def test_prompts_of_other_pictures_are_mostly_wrong(judge):
    _, answers = judge.read(fresh_renders(PROMPTS, seed=1))
    scores = judge.accuracy(answers, PROMPTS[1:] + PROMPTS[:1])
    assert scores["prompt_accuracy"] < 0.05
    assert scores["colour"] < 0.4


def test_the_reference_itself_has_perfect_scores(judge):
    pixels = fresh_renders(PROMPTS, seed=0)
    scores = judge(pixels, PROMPTS)
    assert scores.pop("frechet") == pytest.approx(0, abs=1e-4)
    assert scores == pytest.approx(
        dict.fromkeys(
            ("prompt_accuracy", "kind", "colour", "fill", "size", "axis", "background", "count")
            + ("precision", "recall", "stripe_sharpness"),
            1.0,
        )
    )


def test_other_renders_are_closer_to_the_reference_than_noise_or_one_picture(judge):
    renders = fresh_renders(PROMPTS, seed=1)
    blocks = torch.randint(2, (64, 3, 4, 8), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    noise = F.interpolate(blocks, size=64)
    good, noisy, collapsed = (
        judge(x, PROMPTS) for x in (renders, noise, renders[:1].expand_as(renders))
    )
    assert good["frechet"] < 0.25 * min(noisy["frechet"], collapsed["frechet"])
    assert min(good["precision"], good["recall"]) > 0.6
    assert noisy["precision"] == 0
    assert collapsed["recall"] == 0


def test_another_reference_seed_is_another_reference(judge):
    pixels = fresh_renders(PROMPTS, seed=1)
    assert judge(pixels, PROMPTS, reference_seed=1)["frechet"] == pytest.approx(0, abs=1e-4)
    assert judge(pixels, PROMPTS, reference_seed=0)["frechet"] > 0.1


def test_diversity_of_renders_is_that_of_the_data(judge):
    prompts = PROMPTS[:24]
    many = fresh_renders([p for p in prompts for _ in range(4)], seed=5).unflatten(0, (24, 4))
    pairs = (
        many[:, :1] + torch.tensor([0.0, 0.0, 0.0, 0.05])[:, None, None, None]
    )  # nearly the same picture four times
    assert judge.diversity(many, prompts) == pytest.approx(1, abs=0.12)
    assert 0 < judge.diversity(pairs, prompts) < 0.2
    assert (
        judge.diversity(torch.zeros(4, 2, 3, 64, 64), PROMPTS[:4]) == 0
    )  # one picture, whatever the noise


def test_sharpness_falls_with_blur_and_rises_with_noise():
    reference, pixels = fresh_renders(PROMPTS, seed=0), fresh_renders(PROMPTS, seed=1)
    blurred = F.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    assert stripe_sharpness(pixels, reference, PROMPTS) == pytest.approx(1, abs=0.1)
    assert 0.1 < stripe_sharpness(blurred, reference, PROMPTS) < 0.6
    assert stripe_sharpness(noisy, reference, PROMPTS) > 1.3
    assert stripe_sharpness(torch.zeros_like(pixels), reference, PROMPTS) == 0


def test_sharpness_looks_only_at_pictures_that_should_have_patterns():
    prompts = [SAID, SILENT]
    pixels = fresh_renders(prompts, seed=0)
    ruined = pixels.clone()
    ruined[1] = 0
    assert stripe_sharpness(ruined, pixels, prompts) == 1
    assert math.isnan(stripe_sharpness(pixels[1:], pixels[1:], prompts[1:]))


def test_pixels_are_judged_as_a_file_would_hold_them():
    pixels = torch.tensor([-3.0, -1, 0.001, 1, 7]).expand(1, 3, 1, 5)
    saved = as_saved(pixels)[0, 0, 0]
    assert ((saved + 1) * 127.5).tolist() == pytest.approx([0, 0, 128, 255, 255], abs=1e-4)
    renders = fresh_renders(PROMPTS[:4], seed=0)
    assert torch.equal(as_saved(renders), renders)
    assert torch.equal(
        as_saved(renders.double() + 0.003), renders.clamp(max=1)
    )  # less than half a step
    assert as_saved(renders.bfloat16()).dtype == torch.float32


def test_broken_pictures_are_counted_and_refused(judge):
    pixels = fresh_renders(PROMPTS[:5], seed=0)
    pixels[1, 0, 3, 3] = math.nan
    pixels[4] = math.inf
    with pytest.raises(ValueError, match="2 of 5 pictures"):
        judge(pixels, PROMPTS[:5])


def test_pictures_and_prompts_must_pair_up(judge):
    pixels = fresh_renders(PROMPTS[:5], seed=0)
    with pytest.raises(ValueError, match="got 4 for 5 pictures"):
        judge(pixels, PROMPTS[:4])


def test_judging_prompts_are_stable_and_apart_from_training():
    assert judging_prompts(10, seed=0) == PROMPTS[:10]
    assert judging_prompts(10, seed=1) != PROMPTS[:10]
    known = [{(t.kind, t.colour) for t in p.things} & HELD_OUT for p in PROMPTS]
    unseen = [
        {(t.kind, t.colour) for t in p.things} & HELD_OUT
        for p in judging_prompts(64, seed=0, held_out=True)
    ]
    assert not any(known)
    assert all(unseen)
    trained = {sample(0, i)[1] for i in range(200)}
    assert not trained & set(scenes_of(PROMPTS, 0))


def test_fresh_renders_are_pictures_of_their_prompts():
    renders = fresh_renders(PROMPTS[:6] + PROMPTS[:1], seed=3)
    assert (renders.shape, renders.dtype) == ((7, 3, 64, 64), torch.float32)
    assert -1 <= renders.min() < -0.5
    assert 0.5 < renders.max() <= 1
    assert torch.equal(renders[:6], fresh_renders(PROMPTS[:6], seed=3))
    assert (renders[0] - renders[6]).abs().mean() > 0.01  # the same prompt, another scene
    assert (renders - fresh_renders(PROMPTS[:6] + PROMPTS[:1], seed=4)).abs().mean() > 0.05


def test_a_real_reader_is_loaded_frozen_and_reads_in_batches(tmp_path):
    torch.manual_seed(0)
    Reader().save(tmp_path)
    judge = Judge.load(tmp_path)
    assert not judge.reader.training
    pixels = fresh_renders(PROMPTS[:7], seed=0).requires_grad_()
    features, answers = judge.read(pixels)
    assert (features.shape, features.requires_grad) == ((7, Reader.FEATURES), False)
    assert set(answers) == set(CHOICES)
    assert all(answers[q].min() >= 0 and answers[q].max() < len(CHOICES[q]) for q in CHOICES)
    pieces, same_answers = judge.read(pixels, batch=3)
    torch.testing.assert_close(pieces, features)
    assert all(torch.equal(same_answers[q], answers[q]) for q in CHOICES)
    assert 0 <= judge(pixels, PROMPTS[:7])["count"] <= 1


def test_the_outcomes_of_single_prompts_have_the_scores_as_their_means():
    """And the prompts that are right are those whose own picture the reader finds right."""
    judge, pixels = Judge.load(), fresh_renders(PROMPTS, seed=3)
    pixels = torch.cat([pixels[:48], pixels[:16]])  # the last 16 show other prompts
    scores, outcomes = judge.scores_and_outcomes(pixels, PROMPTS)
    assert judge(pixels, PROMPTS) == scores
    assert set(outcomes) == {"prompt_accuracy", "frechet"}
    for name, numbers in outcomes.items():
        assert numbers.shape == (64,)
        assert float(numbers.mean()) == pytest.approx(scores[name])
    right = outcomes["prompt_accuracy"]
    assert set(right.tolist()) == {0.0, 1.0}
    assert right[:48].mean() > 0.9
    assert right[48:].mean() < 0.1
    for i in (0, 50):
        _, answers = judge.read(pixels[i : i + 1])
        assert judge.accuracy(answers, PROMPTS[i : i + 1])["prompt_accuracy"] == right[i]


# -- other sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 48), (48, 96)])
def test_renders_of_other_sizes_are_read_as_well(size):
    """By the shipped reader, which was trained on 64x64 alone."""
    judge, prompts = Judge.load(), judging_prompts(50, seed=0, size=size)
    pixels = fresh_renders(prompts, seed=0, size=size)
    assert pixels.shape == (50, 3, size[1], size[0])
    assert judge.render_accuracy(prompts, seed=0, size=size) >= 0.98
    generator = torch.Generator().manual_seed(0)
    noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=generator)
    scores = judge(noisy, prompts)
    assert scores["prompt_accuracy"] >= 0.96
    assert scores["render_accuracy"] >= 0.98
    assert judge(pixels.roll(1, 0), prompts)["prompt_accuracy"] <= 0.05  # of other prompts


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 40)])
def test_scenes_of_any_size_have_their_objects_whole_and_apart(size):
    prompts = judging_prompts(60, seed=3, size=size)
    assert {len(prompt.things) for prompt in prompts} == ({1} if size == (40, 40) else {1, 2, 3})
    for i, prompt in enumerate(prompts):
        things = draw_scene(np.random.default_rng(i), prompt, size).things
        for thing in things:
            for place, side in zip((thing.x, thing.y), size, strict=True):
                assert thing.radius + 1 <= place <= side - thing.radius - 1
        for a, b in pairwise(things):
            assert np.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + 2 - 1e-9


def test_only_background_is_cut_away():
    picture = torch.zeros(1, 3, 64, 100)
    picture[..., 10:30], picture[..., 60:90] = 1.0, torch.linspace(0.5, 1, 30)
    (seen,) = framed(picture)
    assert seen.shape == (3, 64, 64)
    columns = [x.item() for x in seen[0, 0] if x > 0]
    assert columns == pytest.approx([1.0] * 20 + torch.linspace(0.5, 1, 30).tolist())
    assert seen[0, 0, 0] == 0  # a margin is left
    assert framed(seen[None]).equal(seen[None])
