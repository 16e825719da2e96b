"""Anti-aliased rendering of scenes from signed distances: coverage = clip(1/2 - distance, 0, 1), in
pixels.
"""

from collections.abc import Sequence

import numpy as np

from distill.worlds.shapes.world import BACKGROUNDS, COLOURS, SIDE, Placed, Scene

PERIOD, DOT_RADIUS = 8.0, 2.4  # pixels; two periods still fit the smallest object
DARK = 0.45  # the pattern is the object's own colour, darkened


def render(scenes: Sequence[Scene], size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """Scenes -> uint8 sRGB pictures [N, height, width, 3]; `size` is [width, height]."""
    width, height = size
    canvases = np.empty((len(scenes), height, width, 3), np.float32)
    for canvas, scene in zip(canvases, scenes, strict=True):
        canvas[:] = _shaded(BACKGROUNDS[scene.background], scene.background_shade)
        for thing in scene.things:
            _paint(canvas, thing)
    return (canvases.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _shaded(colour: tuple[int, ...], shade: tuple[float, ...]) -> np.ndarray:
    return np.array(colour, np.float32) / 255 + np.array(shade, np.float32)


def _paint(canvas: np.ndarray, thing: Placed) -> None:
    """Blend one object over the canvas, inside its bounding box."""
    reach = thing.radius * 1.25 + 2
    height, width, _ = canvas.shape
    x0, x1 = (int(np.clip(v, 0, width)) for v in (thing.x - reach, thing.x + reach + 1))
    y0, y1 = (int(np.clip(v, 0, height)) for v in (thing.y - reach, thing.y + reach + 1))
    ys, xs = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    cover = _cover(thing, xs, ys)[..., None]
    dark = _pattern(thing, xs - thing.x, ys - thing.y)[..., None]
    colour = _shaded(COLOURS[thing.colour], thing.shade).clip(0, 1) * (1 - dark * (1 - DARK))
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - cover) + colour * cover


def coverage(thing: Placed) -> np.ndarray:
    """Share of each pixel that the object covers, [64, 64] in [0, 1], whatever is painted later."""
    ys, xs = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    return _cover(thing, xs, ys)


def _cover(thing: Placed, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    u, v = _rotate(xs + 0.5 - thing.x, ys + 0.5 - thing.y, thing.angle)
    return np.clip(0.5 - DISTANCE[thing.kind](u, v, thing.radius), 0, 1)


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def _pattern(thing: Placed, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Darkness of each pixel, in [0, 1]."""
    if thing.fill == "solid":
        return np.zeros_like(x)
    u, v = (
        (w + phase) % PERIOD - PERIOD / 2
        for w, phase in zip(_rotate(x, y, thing.pattern_angle), thing.phase, strict=True)
    )
    if thing.fill == "striped":
        return np.clip(0.5 + np.abs(u) - PERIOD / 4, 0, 1)
    return np.clip(0.5 + DOT_RADIUS - np.hypot(u, v), 0, 1)


def _triangle(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    """Equilateral, with circumradius 1.2 r and half of that as inradius."""
    return (
        np.maximum.reduce([np.cos(a) * u + np.sin(a) * v for a in np.pi * np.array([1, 3, 5]) / 3])
        - 1.2 * r / 2
    )


def _star(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    """Five points: fold into a tenth of the turn, then the distance to the line from tip
    to notch.
    """
    half = np.pi / 5
    turn = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)
    rho = np.hypot(u, v)
    tip, notch = np.array([1.15 * r, 0.0]), 0.5 * r * np.array([np.cos(half), np.sin(half)])
    edge = notch - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (rho * np.cos(turn) - tip[0]) * normal[0] + (rho * np.sin(turn) - tip[1]) * normal[1]


def _bar(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(u) - 1.05 * r, np.abs(v) - 0.36 * r)


DISTANCE = {  # of points (u, v) to the edge of each kind, negative inside
    "circle": lambda u, v, r: np.hypot(u, v) - r,
    "square": lambda u, v, r: np.maximum(np.abs(u), np.abs(v)) - 0.86 * r,
    "triangle": _triangle,
    "star": _star,
    "cross": lambda u, v, r: np.minimum(_bar(u, v, r), _bar(v, u, r)),
}
