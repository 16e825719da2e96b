"""A preference on `shapes` that is not in its data: large things near the centre of the picture.

It is measured on pixels. Things lie anywhere in the data, and large ones are as frequent as small
ones. Pairs are a model's own samples, ranked by the measure:

    from distill.data.write import write_preferences
    from distill.worlds.shapes import preference

    write_preferences("pairs/pairs-%06d.tar", preference.pairs(captions, samples), per_shard=1000)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.worlds.shapes.grammar import parse
from distill.worlds.shapes.judge import Judge, as_saved
from distill.worlds.shapes.world import SIDE

EDGE = 2  # pixels of the frame from which the background's colour is taken; things keep 1 away
DISTANCE = 0.25  # of a thing's pixel to the background, in sRGB of [0, 1]; shades vary by 0.05
WIDTH = 14.0  # pixels, standard deviation of the window at the centre


def centred_area(pixels: Tensor) -> Tensor:
    """The share of a Gaussian window at the centre that things cover: [N], in [0, 1].

    pixels [N, 3, 64, 64] in [-1, 1]. Things are what differs from the median colour of the frame.
    """
    colours = as_saved(pixels) / 2 + 0.5
    rows = torch.arange(SIDE)
    in_frame = (rows < EDGE) | (rows >= SIDE - EDGE)
    frame = colours[:, :, in_frame[:, None] | in_frame[None, :]]
    background = frame.median(dim=2).values[..., None, None]
    things = (colours - background).abs().amax(dim=1) > DISTANCE
    at = torch.exp(-0.5 * ((rows + 0.5 - SIDE / 2) / WIDTH).square())
    window = at[:, None] * at[None, :]
    return (things * window).sum((1, 2)) / window.sum()


def rank(judge: Judge, pixels: Tensor, caption: str) -> tuple[int, int] | None:
    """Winner and loser among samples [n, 3, 64, 64] of one caption, by `centred_area`.

    Only those that show the caption count, so that a preference does not teach what a caption
    says. None if there are fewer than two.
    """
    prompt = parse(caption)
    if prompt is None:
        raise ValueError(f"{caption!r}: is no caption of shapes; give captions of its grammar")
    _, answers = judge.read(pixels)
    right = judge.shows_prompt(answers, [prompt] * len(pixels)).nonzero().flatten()
    if len(right) < 2:
        return None
    scores = centred_area(pixels[right])
    return int(right[scores.argmax()]), int(right[scores.argmin()])


def pairs(
    captions: Sequence[str], samples: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    """Key, winner's and loser's latents, and caption of each pair, for `write_preferences`.

    `samples` gives for each caption its candidates: latents [n, C, h, w] and pixels [n, 3, 64, 64].
    Captions with fewer than two right candidates are left out.
    """
    judge = Judge.load()
    for number, (caption, (latents, pixels)) in enumerate(zip(captions, samples, strict=True)):
        if pair := rank(judge, pixels, caption):
            winner, loser = (latents[i].float().cpu().numpy() for i in pair)
            yield f"{number:06d}", winner, loser, caption
