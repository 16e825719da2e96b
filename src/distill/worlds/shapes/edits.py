"""Edits of `shapes`: a source scene, an instruction, and the target scene that follows it.

An instruction names what changes and leaves all else as it is: the target has the source's other
objects, positions, shades and patterns. So what an editor did can be compared with the truth, by
the reader and in pixels. Edit `i` of a seed is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from distill.worlds.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    HELD_OUT,
    KINDS,
    RADIUS,
    RADIUS_OF_THREE,
    SIDE,
    SIZES,
    TILT,
    Placed,
    Scene,
    draw_prompt,
    draw_scene,
)

MARGIN, GAP = 1.0, 2.0  # pixels from the frame, and between objects; as in `world`
BESIDE = {  # axis -> (before, after) in the order along it
    "horizontal": ("to the left of", "to the right of"),
    "vertical": ("above", "below"),
}
NONE: tuple[int, ...] = ()


@dataclass(frozen=True)
class Edit:
    """An instruction with the scenes before and after it.

    task: one of TASKS. of_source, of_target: the objects of each scene that it changes, by their
    place in the scene; empty for the background.
    """

    task: str
    instruction: str
    source: Scene
    target: Scene
    of_source: tuple[int, ...] = NONE
    of_target: tuple[int, ...] = NONE


def draw_edit(rng: np.random.Generator, task: str | None = None) -> Edit:
    """A random edit, by default of a random task.

    Scenes in which the task is impossible are drawn again: an object too many, or a name for two.
    """
    task = task or str(rng.choice(list(TASKS)))
    while True:
        scene = draw_scene(rng, draw_prompt(rng))
        found = TASKS[task](rng, scene)
        if found is not None and _valid(found):
            return found


def sample_edit(seed: int, index: int, task: str | None = None) -> Edit:
    """Edit number `index` of `seed`."""
    # The 3 separates edits from the scenes of the same seed.
    return draw_edit(np.random.default_rng([seed, index, 3]), task)


def redrawn(rng: np.random.Generator, edit: Edit) -> Edit:
    """The same source and instruction with another target: what an edit that adds leaves free.

    It leaves free where the object stands, within the arrangement, its size, angles and shade.
    """
    (i,), count = edit.of_target, len(edit.target.things)
    old = edit.target.things[i]
    while True:
        size = str(rng.choice(SIZES))
        radius = float(rng.uniform(*(RADIUS[count][size] if count < 3 else RADIUS_OF_THREE)))
        x, y = (float(v) for v in rng.uniform(MARGIN + radius, SIDE - MARGIN - radius, 2))
        angle, pattern_angle = (float(v) for v in rng.uniform(-TILT, TILT, 2))
        new = replace(old, size=size, radius=radius, x=x, y=y, angle=angle)
        shade = tuple(float(v) for v in rng.uniform(-0.05, 0.05, 3))
        new = replace(new, pattern_angle=pattern_angle, shade=shade)
        things = (*edit.target.things[:i], new, *edit.target.things[i + 1 :])
        found = replace(edit, target=replace(edit.target, things=things))
        if _has_room(found.target) and _is_clear(found.target):
            return found


def name_of(thing: Placed) -> str:
    """The object as an instruction names it."""
    return f"{thing.colour} {thing.kind}"


def _recolour(rng: np.random.Generator, scene: Scene) -> Edit:
    i, thing = _some(rng, scene)
    colour = _other(rng, COLOURS, thing.colour)
    text = f"make the {name_of(thing)} {colour}"
    return _changed("recolour", text, scene, i, replace(thing, colour=colour))


def _change_kind(rng: np.random.Generator, scene: Scene) -> Edit:
    i, thing = _some(rng, scene)
    kind = _other(rng, KINDS, thing.kind)
    text = f"turn the {name_of(thing)} into a {kind}"
    return _changed("kind", text, scene, i, replace(thing, kind=kind))


def _change_fill(rng: np.random.Generator, scene: Scene) -> Edit:
    i, thing = _some(rng, scene)
    fill = _other(rng, FILLS, thing.fill)
    text = f"make the {name_of(thing)} {fill}"
    return _changed("fill", text, scene, i, replace(thing, fill=fill))


def _change_size(rng: np.random.Generator, scene: Scene) -> Edit | None:
    if len(scene.things) > 2:
        return None  # three objects have one size
    i, thing = _some(rng, scene)
    size = _other(rng, SIZES, thing.size)
    radius = float(rng.uniform(*RADIUS[len(scene.things)][size]))
    text = f"make the {name_of(thing)} {size}"
    return _changed("size", text, scene, i, replace(thing, size=size, radius=radius))


def _remove(rng: np.random.Generator, scene: Scene) -> Edit | None:
    if len(scene.things) < 2:
        return None
    i, thing = _some(rng, scene)
    text = f"remove the {name_of(thing)}"
    return Edit("remove", text, scene, _without(scene, i), of_source=(i,))


def _add(rng: np.random.Generator, scene: Scene) -> Edit | None:
    """The larger scene is the target, and the source lacks one of its objects."""
    if scene.axis is None:
        return None
    i, thing = _some(rng, scene)
    before, after = BESIDE[scene.axis]
    if i == 0:
        where = f"{before} the {name_of(scene.things[1])}"
    elif i == len(scene.things) - 1:
        where = f"{after} the {name_of(scene.things[-2])}"
    else:
        where = "in the middle"
    text = f"add a {thing.fill} {name_of(thing)} {where}"
    return Edit("add", text, _without(scene, i), scene, of_target=(i,))


def _swap(rng: np.random.Generator, scene: Scene) -> Edit | None:
    if len(scene.things) < 2:
        return None
    i, j = sorted(int(k) for k in rng.choice(len(scene.things), 2, replace=False))
    things = list(scene.things)
    first, second = things[i], things[j]
    things[i] = replace(second, x=first.x, y=first.y)
    things[j] = replace(first, x=second.x, y=second.y)
    text = f"swap the {name_of(first)} and the {name_of(second)}"
    target = replace(scene, things=tuple(things))
    return Edit("swap", text, scene, target, of_source=(i, j), of_target=(i, j))


def _change_background(rng: np.random.Generator, scene: Scene) -> Edit:
    background = _other(rng, BACKGROUNDS, scene.background)
    text = f"make the background {background}"
    return Edit("background", text, scene, replace(scene, background=background))


TASKS: dict[str, Callable[[np.random.Generator, Scene], Edit | None]] = {
    "recolour": _recolour,
    "kind": _change_kind,
    "fill": _change_fill,
    "size": _change_size,
    "add": _add,
    "remove": _remove,
    "swap": _swap,
    "background": _change_background,
}


def _some(rng: np.random.Generator, scene: Scene) -> tuple[int, Placed]:
    i = int(rng.integers(len(scene.things)))
    return i, scene.things[i]


def _other(rng: np.random.Generator, words: object, but: str) -> str:
    return str(rng.choice([word for word in words if word != but]))  # type: ignore[attr-defined]


def _changed(task: str, text: str, scene: Scene, i: int, thing: Placed) -> Edit:
    """The edit that puts `thing` in the place of object i."""
    things = (*scene.things[:i], thing, *scene.things[i + 1 :])
    return Edit(task, text, scene, replace(scene, things=things), of_source=(i,), of_target=(i,))


def _without(scene: Scene, i: int) -> Scene:
    things = scene.things[:i] + scene.things[i + 1 :]
    return replace(scene, things=things, axis=scene.axis if len(things) > 1 else None)


def _valid(edit: Edit) -> bool:
    """Whether names are clear, both scenes have room, and no pair is one that training lacks."""
    for scene in (edit.source, edit.target):
        names = [name_of(thing) for thing in scene.things]
        pairs = {(thing.kind, thing.colour) for thing in scene.things}
        if len(set(names)) < len(names) or pairs & HELD_OUT or not _has_room(scene):
            return False
    return True


def _has_room(scene: Scene) -> bool:
    """Whether all objects are inside the frame, apart, and in clear order along the axis."""
    things = scene.things
    for thing in things:
        low, high = MARGIN + thing.radius, SIDE - MARGIN - thing.radius
        if not (low <= thing.x <= high and low <= thing.y <= high):
            return False
    along = [t.y if scene.axis == "vertical" else t.x for t in things]
    return all(
        along[k + 1] - along[k] >= things[k].radius + things[k + 1].radius + GAP
        for k in range(len(things) - 1)
    )


def _is_clear(scene: Scene) -> bool:
    """Whether neighbours are clearly apart along the axis: more so than across it."""
    points = [(t.x, t.y) if scene.axis != "vertical" else (t.y, t.x) for t in scene.things]
    return all(
        abs(b[1] - a[1]) <= (b[0] - a[0]) / 2 for a, b in zip(points, points[1:], strict=False)
    )
