"""Blind votes: pairs of pictures of two models on a page, names hidden and sides shuffled.

votes.html      the page; it downloads votes.json
votes_key.json  what is on which side, for `report.people`; it holds the names, so keep it back
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distill.evaluation.results import CAPTIONS, captions_digest, comparable
from distill.evaluation.tables import steps_text
from distill.report.comparison import tiles
from distill.report.page import Picture, embed_small, environment, open_png
from distill.report.runs import Run
from distill.storage.bounded import json_of
from distill.storage.safe_paths import check_own

PAGE, KEY = "votes.html", "votes_key.json"
MOST = 128  # ours: pairs on a page; LADD's user study has as many prompts
SHAPES = "reader of shapes"  # in the protocol of an evaluation on `shapes`
Shown = Path | Image.Image


@dataclass(frozen=True)
class Model:
    """The first run of a group, whose student is voted on at this number of steps."""

    group: str
    run: Run
    steps: int

    @property
    def name(self) -> str:
        return f"{self.group}, {steps_text(self.steps)}"


@dataclass(frozen=True)
class Pair:
    """The pictures of one prompt; `first` is the model on the left, 0 or 1."""

    number: int
    caption: str
    pictures: tuple[Picture, Picture]
    first: int


def ballot(
    groups: Mapping[str, Sequence[Run]], seed: int, steps: int | None = None
) -> tuple[str, str]:
    """votes.html and votes_key.json of two groups.

    `seed` draws the prompts, their order and the sides. `steps` is that of the students; None: the
    fewest that both have. Raises ValueError for other than two groups, and where no pictures of the
    same prompts are kept.
    """
    models = _models(groups, steps)
    shown, captions = _pictures(models)
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(sorted(shown))[:MOST].tolist()
    sides = rng.permutation(np.arange(len(numbers)) % 2).tolist()  # each is left as often
    pairs = []
    for number, first in zip(numbers, sides, strict=True):
        left, right = (_embedded(shown[number][i]) for i in (first, 1 - first))
        pairs.append(Pair(number, captions.get(number, ""), (left, right), first))
    key = {
        "models": [model.name for model in models],
        "runs": [model.run.folder.name for model in models],
        "left": {str(pair.number): pair.first for pair in pairs},
    }
    content = [key, [[picture.uri for picture in pair.pictures] for pair in pairs]]
    page = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    text = environment().get_template(PAGE).render(page=page, pairs=pairs)
    return text, json.dumps({"page": page, **key}, indent=1).replace("{\n ", "{", 1) + "\n"


def _models(groups: Mapping[str, Sequence[Run]], steps: int | None) -> tuple[Model, Model]:
    if len(groups) != 2:
        what = f"a page is for two models, and runs= has {len(groups)} that differ"
        raise ValueError(f"votes=true: {what}; give two of them")
    (one, (a, *_)), (other, (b, *_)) = groups.items()
    if not comparable(a.protocol, b.protocol):
        what = "the runs were evaluated by different protocols"
        raise ValueError(f"votes=true: {what}; evaluate them anew by one")
    common = set.intersection(*({r.steps for r in x.rows if r.who == "student"} for x in (a, b)))
    if steps is None and common:
        steps = min(common)
    if steps not in common:
        known = ", ".join(map(str, sorted(common))) or "none"
        what = f"not both students were evaluated at this number of steps, but at {known}"
        raise ValueError(f"votes_steps={'null' if steps is None else steps}: {what}; take another")
    return Model(one, a, steps), Model(other, b, steps)


def _pictures(
    models: tuple[Model, Model],
) -> tuple[dict[int, tuple[Shown, Shown]], dict[int, str]]:
    """The pictures by number that both keep, and the captions that are known.

    Whole evaluations are preferred to the few pictures of the comparison.
    """
    kept = [_files(model) for model in models]
    captions = kept[0][1]
    if not all(pictures for pictures, _ in kept):
        kept = [(_strip(model), []) for model in models]
        captions = captions or _captions_of_shapes(models[0].run.protocol, len(kept[0][0]))
    (a, _), (b, _) = kept
    shown = {number: (a[number], b[number]) for number in sorted(a.keys() & b.keys())}
    if not shown:
        folder = models[0 if not a else 1].run.folder
        what = f"{folder} keeps no pictures of this evaluation that the other run has too"
        raise ValueError(f"votes=true: {what}; evaluate both anew: python -m distill.evaluate")
    return shown, dict(enumerate(captions))


def _files(model: Model) -> tuple[dict[int, Shown], list[str]]:
    """The files by number of an evaluation on prompts, and its captions; empty if none is kept."""
    folder = model.run.folder
    found = folder.glob(f"evaluation/student-{model.steps}-*/{CAPTIONS}")
    for file in sorted(found, key=lambda path: -path.lstat().st_mtime):
        with suppress(OSError, ValueError):
            check_own(file, folder)
            captions = json_of(file)
            if _are_of(captions, model.run.protocol):
                paths = {i: file.with_name(f"{i:06d}.png") for i in range(len(captions))}
                return {i: p for i, p in paths.items() if _is_kept(p, folder)}, captions
    return {}, []


def _are_of(captions: Any, protocol: Mapping[str, Any]) -> bool:
    """Whether these are the captions of the protocol, by their digest."""
    texts = isinstance(captions, list) and all(isinstance(text, str) for text in captions)
    return texts and str(protocol.get("data")).endswith(captions_digest(captions))


def _is_kept(path: Path, folder: Path) -> bool:
    with suppress(OSError, ValueError):
        check_own(path, folder)
        return path.is_file()
    return False


def _strip(model: Model) -> dict[int, Shown]:
    """The pictures by number of the comparison; empty if there is none."""
    run = model.run
    path = run.folder / "samples" / run.picture
    places = [
        i for i, row in enumerate(run.rows) if (row.who, row.steps) == ("student", model.steps)
    ]
    with suppress(OSError, ValueError, SyntaxError):  # Pillow: SyntaxError of a broken PNG
        check_own(path, run.folder)
        strips = tiles(path, len(run.rows), MOST) if path.is_file() else []
        return dict(enumerate(strips[places[0]])) if len(strips) > places[0] else {}
    return {}


def _captions_of_shapes(protocol: Mapping[str, Any], most: int) -> list[str]:
    """The first captions of an evaluation on `shapes`; [] for any other."""
    prompts, seed = protocol.get("prompts"), protocol.get("seed")
    if SHAPES not in str(protocol.get("feature network")) or type(prompts) is not int:
        return []
    if type(seed) is not int or not 0 <= seed < 2**32:
        return []
    from distill.worlds.shapes.judge import judging_prompts  # torch

    count = max(0, min(prompts, most))
    return [prompt.caption for prompt in judging_prompts(count, seed=seed)]


def _embedded(picture: Shown) -> Picture:
    if isinstance(picture, Image.Image):
        return embed_small(picture)
    try:
        with open_png(picture) as opened:
            return embed_small(opened.convert("RGB"))
    except (OSError, SyntaxError):  # Pillow: SyntaxError of a broken PNG
        what = "is a picture that cannot be read; remove it and evaluate anew"
        raise ValueError(f"{picture}: {what}") from None
