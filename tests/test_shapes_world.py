"""The world of `shapes`: captions say what prompts fix, scenes obey them, pictures show them."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from distill.worlds.shapes import grammar
from distill.worlds.shapes.render import DISTANCE, _rotate, render
from distill.worlds.shapes.world import (
    AXES,
    BACKGROUNDS,
    COLOURS,
    FILLS,
    HELD_OUT,
    KINDS,
    SIDE,
    SIZES,
    Placed,
    Prompt,
    Scene,
    Thing,
    draw_prompt,
    draw_scene,
    sample,
)

PROMPTS = [draw_prompt(np.random.default_rng([11, i])) for i in range(5000)]
HELD = [draw_prompt(np.random.default_rng([12, i]), held_out=True) for i in range(500)]
SCENES = [sample(13, i) for i in range(300)]

NAME = re.compile(
    rf"a (?:({'|'.join(SIZES)}) )?(?:({'|'.join(FILLS)}) )?({'|'.join(COLOURS)})"
    rf" ({'|'.join(KINDS)})"
)
GROUND = re.compile(rf" on (?:a )?({'|'.join(BACKGROUNDS)})( background)?$")
# the words between, before or after the names -> axis, and whether they are listed in order
ORDERS = {
    "THING": (None, True),
    "THING to the left of THING": ("horizontal", True),
    "THING to the right of THING": ("horizontal", False),
    "THING above THING": ("vertical", True),
    "THING below THING": ("vertical", False),
    "THING, THING and THING from left to right": ("horizontal", True),
    "from left to right, THING, THING and THING": ("horizontal", True),
    "THING, THING and THING from top to bottom": ("vertical", True),
    "from top to bottom, THING, THING and THING": ("vertical", True),
}


def phrasing(caption: str) -> str:
    return NAME.sub("THING", GROUND.sub("", caption))


def parse(caption: str) -> tuple[tuple[Thing, ...], str | None, str | None]:
    """What a caption says, read without the grammar that wrote it."""
    ground = GROUND.search(caption)
    axis, in_order = ORDERS[phrasing(caption)]
    things = [
        Thing(kind, colour, fill or None, size or None)
        for size, fill, colour, kind in NAME.findall(caption)
    ]
    return tuple(things if in_order else things[::-1]), axis, ground[1] if ground else None


def pairs(prompt: Prompt) -> set[tuple[str, str]]:
    return {(thing.kind, thing.colour) for thing in prompt.things}


def covers(scene: Scene, *, margin: int = 0) -> list[np.ndarray]:
    """How much each thing covers each pixel of the frame, widened by `margin` pixels on every
    side.
    """
    ys, xs = np.mgrid[-margin : SIDE + margin, -margin : SIDE + margin].astype(np.float32) + 0.5
    return [
        np.clip(0.5 - DISTANCE[t.kind](*_rotate(xs - t.x, ys - t.y, t.angle), t.radius), 0, 1)
        for t in scene.things
    ]


def plain(**changes) -> Scene:
    """A solid red circle in the middle of white."""
    thing = Placed(
        "circle", "red", "solid", "large", 32.0, 32.0, 14.0, 0.0, 0.0, (0.0, 0.0), (0.0, 0.0, 0.0)
    )
    return Scene((replace(thing, **changes),), None, "white")


def test_captions_say_exactly_what_prompts_fix():
    for prompt in PROMPTS + HELD:
        assert parse(prompt.caption) == (
            prompt.things,
            prompt.axis,
            prompt.background,
        ), prompt.caption


def test_every_phrasing_and_every_word_occurs():
    assert {phrasing(prompt.caption) for prompt in PROMPTS} == set(ORDERS)
    words = set(" ".join(prompt.caption for prompt in PROMPTS).replace(",", " ").split())
    assert words >= {*KINDS, *COLOURS, *FILLS, *SIZES, *BACKGROUNDS}
    assert {p.caption.endswith("background") for p in PROMPTS if p.background} == {True, False}


def test_captions_are_short():
    lengths = [len(prompt.caption.replace(",", " ,").split()) for prompt in PROMPTS]
    assert min(lengths) == 3  # a red circle
    assert max(lengths) <= 23  # what the tokenizer of the embedded teachers has room for


def test_some_attributes_are_said_and_others_left_free():
    ones = [prompt.things[0] for prompt in PROMPTS if len(prompt.things) == 1]
    for name, expected in (("fill", 0.7), ("size", 0.6)):
        share = np.mean([getattr(thing, name) is not None for thing in ones])
        assert share == pytest.approx(expected, abs=0.06)
    assert np.mean([p.background is None for p in PROMPTS]) == pytest.approx(0.3, abs=0.04)
    assert all(thing.size is None for p in PROMPTS if len(p.things) == 3 for thing in p.things)


def test_held_out_pairs_are_kept_for_testing():
    assert {kind for kind, _ in HELD_OUT} == set(KINDS)
    assert not any(pairs(prompt) & HELD_OUT for prompt in PROMPTS)
    assert all(pairs(prompt) & HELD_OUT for prompt in HELD)
    assert set.union(*map(pairs, HELD)) >= HELD_OUT
    # Each kind and each colour is known from training, only not together; all other pairs occur.
    assert set.union(*map(pairs, PROMPTS)) == set(itertools.product(KINDS, COLOURS)) - HELD_OUT


def test_the_same_seed_gives_the_same_picture():
    again = [sample(13, i) for i in range(20)]
    assert again == SCENES[:20]
    assert np.array_equal(render([s for _, s in again]), render([s for _, s in SCENES[:20]]))
    assert sample(14, 0) != SCENES[0]
    assert sample(13, 0, held_out=True) != SCENES[0]


def test_scenes_obey_their_prompts():
    for prompt, scene in SCENES:
        assert (scene.axis, len(scene.things)) == (prompt.axis, len(prompt.things))
        assert scene.background == (prompt.background or scene.background)
        for said, placed in zip(prompt.things, scene.things, strict=True):
            assert (placed.kind, placed.colour) == (said.kind, said.colour)
            assert placed.fill == (said.fill or placed.fill)
            assert placed.size == (said.size or placed.size)


def test_large_is_larger_than_small():
    radii = {
        (count, size): [
            t.radius
            for p, s in SCENES
            if len(p.things) == count
            for t in s.things
            if t.size == size
        ]
        for count in (1, 2)
        for size in SIZES
    }
    for count in (1, 2):
        assert max(radii[count, "small"]) + 2 < min(radii[count, "large"])


def test_things_are_ordered_along_their_axis():
    seen = set()
    for prompt, scene in SCENES:
        for a, b in itertools.pairwise(scene.things):
            across, down = b.x - a.x, b.y - a.y
            along, aside = (across, down) if prompt.axis == "horizontal" else (down, across)
            assert along >= a.radius + b.radius + 2
            assert abs(aside) <= along / 2 + 1e-9
            seen.add(prompt.axis)
    assert seen == set(AXES)


def test_things_are_in_the_frame_and_apart():
    """Corners reach 1.2 radii, so a tip may be cut by the frame or touch a neighbour: by 2 % and 1
    % of its area.
    """
    for _, scene in SCENES:
        for whole, inside in zip(covers(scene, margin=8), covers(scene), strict=True):
            assert inside.sum() >= 0.98 * whole.sum()
        for a, b in itertools.combinations(covers(scene), 2):
            assert (a * b).sum() <= 0.01 * min(a.sum(), b.sum())
        for thing in scene.things:
            assert thing.radius + 0.999 <= min(thing.x, thing.y, SIDE - thing.x, SIDE - thing.y)


def test_a_prompt_leaves_freedom():
    prompt = Prompt(
        (Thing("star", "red", "striped", "large"),),
        None,
        "white",
        "a large striped red star on white",
    )
    a, b = (draw_scene(np.random.default_rng(seed), prompt) for seed in (0, 1))
    for name in ("x", "y", "radius", "angle", "pattern_angle", "phase", "shade"):
        assert getattr(a.things[0], name) != getattr(b.things[0], name)
    first, second = render([a, b]).astype(int)
    assert np.abs(first - second).mean() > 5


def test_pictures_are_bytes_and_independent_of_their_batch():
    scenes = [scene for _, scene in SCENES[:8]]
    pictures = render(scenes)
    assert (pictures.shape, pictures.dtype) == ((8, SIDE, SIDE, 3), np.uint8)
    assert np.array_equal(pictures[5], render(scenes[5:6])[0])


def test_a_solid_thing_is_its_colour_on_its_background():
    picture = render([plain()])[0]
    assert tuple(picture[32, 32]) == COLOURS["red"]
    assert tuple(picture[2, 2]) == BACKGROUNDS["white"]
    red = (picture == COLOURS["red"]).all(-1).sum()
    assert red == pytest.approx(
        np.pi * 13.5**2, rel=0.03
    )  # the pixels wholly inside a radius of 14


def test_edges_are_anti_aliased():
    picture = render([plain(x=32.3, y=31.6)])[0].astype(int)
    red, white = COLOURS["red"][1], BACKGROUNDS["white"][1]  # green tells them apart best
    between = (picture[..., 1] > red) & (picture[..., 1] < white)
    assert 60 < between.sum() < 200  # a ring of circumference 88 pixels, one to two pixels wide
    assert len(np.unique(picture[between][:, 1])) > 10
    area = ((white - picture[..., 1]) / (white - red)).sum()
    assert area == pytest.approx(
        np.pi * 14**2, rel=0.002
    )  # coverage adds up, as jagged edges would not


def test_a_move_of_a_quarter_pixel_changes_the_picture():
    still, moved = render([plain(), plain(x=32.25)]).astype(int)
    assert 0 < np.abs(still - moved).max() < 80


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", ["striped", "dotted"])
def test_patterns_darken_a_share_of_the_thing_only(kind, fill):
    """Of a pattern's period, stripes are half and dots pi 2.4^2 / 8^2 = 0.28."""
    smooth, patterned = render([plain(kind=kind), plain(kind=kind, fill=fill)]).astype(float)
    inside = (smooth == COLOURS["red"]).all(-1)
    dark = 1 - patterned[inside][:, 0].mean() / COLOURS["red"][0]  # 0.55 where the pattern is
    assert dark / 0.55 == pytest.approx({"striped": 0.5, "dotted": 0.28}[fill], abs=0.12)
    outside = (smooth == BACKGROUNDS["white"]).all(-1)
    assert np.array_equal(patterned[outside], smooth[outside])


def test_kinds_fills_and_colours_look_different():
    scenes = [
        plain(kind=kind, fill=fill, colour=colour)
        for kind, fill, colour in itertools.product(KINDS, FILLS, COLOURS)
    ]
    pictures = render(scenes).reshape(len(scenes), -1).astype(int)
    gaps = [np.abs(a - b).mean() for a, b in itertools.combinations(pictures, 2)]
    assert min(gaps) > 1


@pytest.mark.parametrize("held_out", [False, True])
def test_a_caption_is_read_back_as_what_it_says(held_out):
    for index in range(2000):
        prompt = draw_prompt(np.random.default_rng([5, index]), held_out=held_out)
        assert grammar.parse(prompt.caption) == prompt


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("A large red star on black.", [("star", "red", None, "large")]),
        ("an  orange cross", [("cross", "orange", None, None)]),
        (
            "a red star below a small dotted blue circle",
            [("circle", "blue", "dotted", "small"), ("star", "red", None, None)],
        ),
    ],
)
def test_a_caption_may_be_typed_by_hand(text, things):
    said = grammar.parse(text).things
    assert [(t.kind, t.colour, t.fill, t.size) for t in said] == things


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a cat",
        "a red",
        "red star",
        "a red star on green",
        "a star",
        "a red star, a blue circle",
        "a striped large red star",
        "a small red star, a red star and a red star from left to right",
        "a red star on black on black",
    ],
)
def test_what_the_world_never_writes_is_not_read(text):
    assert grammar.parse(text) is None
