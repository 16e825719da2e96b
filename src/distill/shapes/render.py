"""Anti-aliased drawing of scenes by signed distance: coverage = clip(1/2 - distance, 0, 1), distance in pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distill.shapes.world import BACKGROUNDS, COLOURS, SIDE, Placed, Scene

STRIPE_PERIOD = 8.0  # pixels; two periods still fit the smallest object
DOT_PERIOD, DOT_RADIUS = 8.0, 2.4
DARK = 0.45  # the pattern is the object's own colour, darkened


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Scenes -> uint8 sRGB pictures [N, 64, 64, 3]."""
    return np.stack([_render_one(scene) for scene in scenes])


def _render_one(scene: Scene) -> np.ndarray:
    ground = np.array(BACKGROUNDS[scene.background], np.float32) / 255 + np.array(scene.background_shade, np.float32)
    canvas = np.broadcast_to(ground, (SIDE, SIDE, 3)).astype(np.float32)
    for thing in scene.things:
        _paint(canvas, thing)
    return (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _paint(canvas: np.ndarray, thing: Placed) -> None:
    """Blend one object over the canvas, inside its bounding box only."""
    reach = thing.radius * 1.25 + 2
    x0, x1 = (int(np.clip(v, 0, SIDE)) for v in (thing.x - reach, thing.x + reach + 1))
    y0, y1 = (int(np.clip(v, 0, SIDE)) for v in (thing.y - reach, thing.y + reach + 1))
    ys, xs = np.mgrid[y0:y1, x0:x1].astype(np.float32)
    u, v = _rotate(xs + 0.5 - thing.x, ys + 0.5 - thing.y, thing.angle)
    cover = np.clip(0.5 - DISTANCE[thing.kind](u, v, thing.radius), 0, 1)[..., None]
    bright = (np.array(COLOURS[thing.colour], np.float32) / 255 + np.array(thing.shade, np.float32)).clip(0, 1)
    dark = _pattern(thing, xs - thing.x, ys - thing.y)[..., None]
    colour = bright * (1 - dark * (1 - DARK))
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - cover) + colour * cover


def _rotate(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def _pattern(thing: Placed, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of dark in each pixel, in [0, 1]."""
    if thing.fill == "solid":
        return np.zeros_like(x)
    u, v = _rotate(x, y, thing.pattern_angle)
    if thing.fill == "striped":
        offset = np.abs((u + thing.phase[0]) % STRIPE_PERIOD - STRIPE_PERIOD / 2)
        return np.clip(0.5 + offset - STRIPE_PERIOD / 4, 0, 1)
    cell_u = (u + thing.phase[0]) % DOT_PERIOD - DOT_PERIOD / 2
    cell_v = (v + thing.phase[1]) % DOT_PERIOD - DOT_PERIOD / 2
    return np.clip(0.5 + DOT_RADIUS - np.hypot(cell_u, cell_v), 0, 1)


def _circle(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(u, v) - r


def _square(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.86 * r


def _triangle(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    corner = 1.2 * r  # circumradius; an equilateral triangle's inradius is half of it
    sides = [np.cos(a) * u + np.sin(a) * v for a in np.pi * np.array([1, 3, 5]) / 3]
    return np.maximum.reduce(sides) - corner / 2


def _star(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    """Five points: fold into one tenth of the turn, then the distance to the line from tip to notch."""
    half = np.pi / 5
    turn = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)
    rho = np.hypot(u, v)
    tip, notch = np.array([1.15 * r, 0.0]), 0.5 * r * np.array([np.cos(half), np.sin(half)])
    edge = notch - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (rho * np.cos(turn) - tip[0]) * normal[0] + (rho * np.sin(turn) - tip[1]) * normal[1]


def _cross(u: np.ndarray, v: np.ndarray, r: float) -> np.ndarray:
    long, wide = 1.05 * r, 0.36 * r
    bars = [np.maximum(np.abs(a) - long, np.abs(b) - wide) for a, b in ((u, v), (v, u))]
    return np.minimum(*bars)


DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross}
