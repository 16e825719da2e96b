"""The world of `shapes`: scenes, their captions, and the combinations that are held out.

A scene has one to three objects on a plain background. Each object has a kind, a colour, a fill and
a size. Two objects are left/right or above/below each other; three are in a row or a column. A
caption states kind and colour of every object, the arrangement, and some of the other attributes.
The rest is free, as are position, rotation, exact size, shade and stripe phase: many pictures fit
one caption.

Everything is drawn from a seed, so scene `i` of a seed is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = {  # sRGB, far enough apart that a shade of one is never another
    "red": (214, 48, 49), "green": (46, 160, 67), "blue": (48, 96, 220),
    "yellow": (244, 208, 44), "purple": (150, 66, 190), "orange": (240, 134, 30),
}  # fmt: skip
BACKGROUNDS = {
    "white": (244, 244, 244),
    "gray": (140, 140, 140),
    "black": (22, 22, 22),
    "pink": (246, 184, 200),
}
FILLS = ("solid", "striped", "dotted")
SIZES = ("small", "large")
PHRASINGS = {  # of several things, named in order along the axis
    (2, "horizontal"): ("{} to the left of {}", "{1} to the right of {0}"),
    (2, "vertical"): ("{} above {}", "{1} below {0}"),
    (3, "horizontal"): ("{}, {} and {} from left to right", "from left to right, {}, {} and {}"),
    (3, "vertical"): ("{}, {} and {} from top to bottom", "from top to bottom, {}, {} and {}"),
}
AXES = ("horizontal", "vertical")

# One pair per kind is not in the training data, to test composition.
HELD_OUT = {
    ("star", "blue"),
    ("circle", "yellow"),
    ("triangle", "purple"),
    ("square", "green"),
    ("cross", "red"),
}
SIDE = 64  # pixels
RADIUS = {
    1: {"small": (9.5, 11.5), "large": (15.5, 19.0)},
    2: {"small": (8.3, 9.8), "large": (12.0, 13.8)},
}
RADIUS_OF_THREE = (8.2, 9.3)  # three objects have one size, which captions do not mention
TILT = np.pi / 9  # radians either way, of objects and patterns; more is too hard for 6 M parameters


@dataclass(frozen=True)
class Thing:
    """An object as a caption describes it; `None` means not stated, hence free."""

    kind: str
    colour: str
    fill: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What a caption states: things in order along `axis` (left to right, or top to bottom), and
    background.
    """

    things: tuple[Thing, ...]
    axis: str | None
    background: str | None
    caption: str


@dataclass(frozen=True)
class Placed:
    """A thing with all attributes.

    Lengths in pixels, angles in radians; `shade` is added to sRGB in [0, 1].
    """

    kind: str
    colour: str
    fill: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    pattern_angle: float
    phase: tuple[float, float]
    shade: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    things: tuple[Placed, ...]
    axis: str | None
    background: str
    background_shade: tuple[float, float, float] = (0.0, 0.0, 0.0)


def draw_prompt(rng: np.random.Generator, *, held_out: bool = False) -> Prompt:
    """A random prompt. With `held_out`, one of its things is a pair that training never shows."""
    count = int(rng.choice([1, 2, 3], p=[0.55, 0.35, 0.1]))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        pair = (str(rng.choice(KINDS)), str(rng.choice(list(COLOURS))))
        pairs += [pair] if pair not in HELD_OUT else []
    if held_out:
        pairs[int(rng.integers(count))] = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
    fill_probability = 0.7 if count < 3 else 0.35

    def maybe(probability: float, words: Iterable[str]) -> str | None:
        return str(rng.choice(list(words))) if rng.random() < probability else None

    free = (
        (maybe(fill_probability, FILLS), maybe(0.6, SIZES) if count < 3 else None) for _ in pairs
    )
    things = tuple(Thing(*pair, *said) for pair, said in zip(pairs, free, strict=True))
    axis = str(rng.choice(AXES)) if count > 1 else None
    background = maybe(0.7, BACKGROUNDS)
    return Prompt(things, axis, background, _caption(rng, things, axis, background))


def _caption(
    rng: np.random.Generator, things: tuple[Thing, ...], axis: str | None, background: str | None
) -> str:
    """A caption that states exactly the arguments, in one of several phrasings."""
    names = [" ".join(["a", *filter(None, (t.size, t.fill, t.colour, t.kind))]) for t in things]
    text = names[0]
    if axis:
        text = PHRASINGS[len(things), axis][rng.random() >= 0.5].format(*names)
    if background:
        text += str(rng.choice([f" on a {background} background", f" on {background}"]))
    return text


def draw_scene(
    rng: np.random.Generator, prompt: Prompt, size: tuple[int, int] = (SIDE, SIDE)
) -> Scene:
    """A random scene that fits the prompt, in a frame of `size`, [width, height] in pixels.

    Objects are as large as in any other frame. The prompt must fit, see `fits_in`.
    """
    count = len(prompt.things)
    sizes = [t.size or str(rng.choice(SIZES)) for t in prompt.things]
    spans = [RADIUS[count][s] if count < 3 else RADIUS_OF_THREE for s in sizes]
    radii = [float(rng.uniform(*span)) for span in spans]
    centres = _layout(rng, radii, prompt.axis, size)
    things = tuple(
        Placed(
            t.kind,
            t.colour,
            t.fill or str(rng.choice(FILLS)),
            size,
            *centre,
            radius,
            angle=float(rng.uniform(-TILT, TILT)),
            pattern_angle=float(rng.uniform(-TILT, TILT)),
            phase=(float(rng.uniform(0, 8)), float(rng.uniform(0, 8))),
            shade=tuple(float(v) for v in rng.uniform(-0.05, 0.05, 3)),
        )
        for t, size, radius, centre in zip(prompt.things, sizes, radii, centres, strict=True)
    )
    background = prompt.background or str(rng.choice(list(BACKGROUNDS)))
    return Scene(
        things, prompt.axis, background, tuple(float(v) for v in rng.uniform(-0.03, 0.03, 3))
    )


def fits_in(prompt: Prompt, size: tuple[int, int]) -> bool:
    """Whether every scene of the prompt has room in a frame of `size`, [width, height]."""
    count = len(prompt.things)
    sizes = [thing.size or "large" for thing in prompt.things]
    radii = [(RADIUS[count][s] if count < 3 else RADIUS_OF_THREE)[1] for s in sizes]
    along, across = size[::-1] if prompt.axis == "vertical" else size
    return _length(radii) <= along and 2 * max(radii) + 2 <= across


def _length(radii: list[float]) -> float:
    """Pixels that objects of these radii take along their axis, close together."""
    return 2 * sum(radii) + 2.0 * len(radii)


def _layout(
    rng: np.random.Generator, radii: list[float], axis: str | None, size: tuple[int, int]
) -> list[tuple[float, float]]:
    """Centres (x, y) in pixels: inside the frame, separate, and clearly ordered along `axis`."""
    length, breadth = size[::-1] if axis == "vertical" else size
    gaps = [a + b + 2.0 for a, b in zip(radii, radii[1:], strict=False)]
    slack = length - 2.0 - radii[0] - radii[-1] - sum(gaps)
    shares = np.sort(rng.uniform(0, slack, len(radii)))
    along = 1.0 + radii[0] + np.concatenate([[0.0], np.cumsum(gaps)]) + shares
    # The offset across is below half the distance along the axis, so the order is clear.
    middle = rng.uniform(1 + max(radii), breadth - 1 - max(radii))
    reach = 0.25 * (min(gaps) if gaps else 0.0)
    across = np.clip(
        middle + rng.uniform(-reach, reach, len(radii)),
        1 + np.array(radii),
        breadth - 1 - np.array(radii),
    )
    points = (
        zip(along, across, strict=True) if axis != "vertical" else zip(across, along, strict=True)
    )
    return [(float(x), float(y)) for x, y in points]


def sample(seed: int, index: int, *, held_out: bool = False) -> tuple[Prompt, Scene]:
    """Prompt and scene number `index` of `seed`."""
    rng = np.random.default_rng([seed, index, int(held_out)])
    prompt = draw_prompt(rng, held_out=held_out)
    return prompt, draw_scene(rng, prompt)
