"""Pictures and captions to learn from: scenes of `shapes` written as shards, or a user's own, read the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from distill.data.datasets import ImageShards
from distill.data.write import write_images
from distill.pretraining.plan import MIN_PICTURES
from distill.shapes.render import render
from distill.shapes.world import COLOURS, KINDS, Prompt, Scene, Thing, draw_prompt, sample

PER_SHARD = 1024


def write_shapes(count: int, seed: int, folder: Path) -> None:
    """Scene i of `seed` as sample i of WebDataset shards: picture, caption, and what the caption fixes."""

    def samples() -> Iterator[tuple[str, np.ndarray, str, dict]]:
        for i in track(range(count), description="data: drawing"):
            prompt, scene = sample(seed, i)
            yield f"{i:06d}", render([scene])[0], prompt.caption, prompt.to_json()

    write_images(str(folder / "shapes-%06d.tar"), samples(), PER_SHARD)


def read(data: Mapping[str, Any], out: Path) -> tuple[Tensor, list[str]]:
    """uint8 pictures [N, 3, S, S] and their captions; a bad sample is replaced by the next, and named in the log.

    Scenes of `shapes` come in their order. Others are shuffled by the seed: the last ones are held out for scores, and
    files may lie sorted by what they show.
    """
    path, size = data["path"], data["size"]
    dataset = ImageShards(path or str(out / "data"), size=size)
    if len(dataset) < MIN_PICTURES:
        raise ValueError(f"data.path={path} holds {len(dataset)} pictures; at least {MIN_PICTURES} are needed")
    order = torch.arange(len(dataset))
    if path is not None:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(data["seed"]))
    order = order[: data["count"]]
    pictures = torch.empty(len(order), 3, size, size, dtype=torch.uint8)
    captions = []
    for row, number in enumerate(track(order.tolist(), description="data: reading")):
        item = dataset[number]
        pictures[row] = ((item["pixels"] + 1) * 127.5).round().to(torch.uint8)
        captions.append(item["caption"])
    return pictures, captions


def scenes(seed: int, shared: int, fresh: int) -> list[Scene]:
    """The first `shared` scenes of the data, then `fresh` ones, every fifth with a pair that training never shows."""
    old = [sample(seed, i)[1] for i in range(shared)]
    return old + [sample(seed + 1, i, held_out=i % 5 == 0)[1] for i in range(fresh)]


def draw(wanted: list[Scene]) -> Tensor:
    """Scenes -> uint8 pictures [N, 3, 64, 64]."""
    pictures = torch.empty(len(wanted), 3, 64, 64, dtype=torch.uint8)
    for start in track(range(0, len(wanted), 500), description="reader: drawing"):
        part = torch.from_numpy(render(wanted[start : start + 500]))
        pictures[start : start + len(part)] = part.permute(0, 3, 1, 2)
    return pictures


def facts(scene: Scene) -> Prompt:
    """The prompt that says all there is to say about a scene; three things have one size, which nobody mentions."""
    sized = len(scene.things) < 3
    things = tuple(Thing(t.kind, t.colour, t.fill, t.size if sized else None) for t in scene.things)
    return Prompt(things, scene.axis, scene.background, "")


def new_captions(seed: int, count: int) -> list[str]:
    """Captions for the teacher's own latents, apart from those of the data."""
    return [draw_prompt(np.random.default_rng([seed + 2, i])).caption for i in range(count)]


def single_things(seed: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Scenes of one thing: pictures [N, 3, 64, 64], and its kind and colour as numbers [N]."""
    found: list[Scene] = []
    for i in range(100 * count):
        scene = sample(seed + 3, i)[1]
        found += [scene] if len(scene.things) == 1 else []
        if len(found) == count:
            break
    labels = {
        "kind": torch.tensor([KINDS.index(s.things[0].kind) for s in found]),
        "colour": torch.tensor([list(COLOURS).index(s.things[0].colour) for s in found]),
    }
    return torch.from_numpy(render(found)).permute(0, 3, 1, 2), labels
