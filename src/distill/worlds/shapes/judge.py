"""Evaluation of generated `shapes`: agreement with the prompt, and distance to renders.

The reader classifies each picture. An answer counts only where the prompt states that attribute;
the others are free. The distances compare with renders of the same prompts, so that they measure
pictures and not prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.core import distances
from distill.evaluation.tables import ATTRIBUTES
from distill.worlds.shapes.frames import framed
from distill.worlds.shapes.reader import CHOICES, Reader, targets
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import SIDE, Prompt, draw_prompt, draw_scene, fits_in

MODEL = Path(__file__).parent / "models" / "reader"
LUMA = torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]  # Rec. 709
PATTERNS = ("striped", "dotted")
# Training seeds are below: prompts and scenes of evaluation are not in the training data.
SEEDS = 9_000_000
FRAME = (SIDE, SIDE)  # [width, height] that the reader was trained on


def judging_prompts(
    n: int, *, seed: int, held_out: bool = False, size: tuple[int, int] = FRAME
) -> list[Prompt]:
    """n prompts that training does not draw; with `held_out`, each has a pair that training never
    shows.

    Those without room in a picture of `size`, [width, height], are left out: in 64x64 none.
    """
    drawn = (
        draw_prompt(np.random.default_rng([SEEDS + seed, i]), held_out=held_out) for i in count()
    )
    return list(islice((prompt for prompt in drawn if fits_in(prompt, size)), n))


def fresh_renders(prompts: list[Prompt], *, seed: int, size: tuple[int, int] = FRAME) -> Tensor:
    """One new scene per prompt: pixels [N, 3, height, width] in [-1, 1].

    A repeated prompt gets another scene. `size` is [width, height].
    """
    # The 2 separates scenes from prompts: numpy pads short seeds with zeros, [s, i] to [s, i, 0].
    scenes = [
        draw_scene(np.random.default_rng([SEEDS + seed, i, 2]), prompt, size)
        for i, prompt in enumerate(prompts)
    ]
    return torch.from_numpy(render(scenes, size)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True, eq=False)
class Renders:
    """Renders [N, 3, H, W] in [-1, 1], with the reader's features [N, 96] and answers [N]."""

    pixels: Tensor
    features: Tensor
    answers: dict[str, Tensor]


@dataclass
class Judge:
    """Evaluates pictures [N, 3, H, W] against their prompts, on the CPU, rounded as in a PNG file.

    Other sizes than 64x64 are read through `frames`.
    """

    reader: Reader
    _reference: tuple[Any, Renders] | None = field(default=None, init=False, repr=False)

    @classmethod
    def load(cls, folder: Path = MODEL) -> Judge:
        return cls(Reader.load(folder))

    @torch.no_grad()
    def read(self, pixels: Tensor, batch: int = 256) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels [N, 3, H, W] in [-1, 1] -> features [N, 96], and per question the most likely
        answer [N].
        """
        shown = framed(as_saved(pixels))
        features = torch.cat([self.reader.features(part) for part in shown.split(batch)])
        return features, {
            question: logits.argmax(1) for question, logits in self.reader.answer(features).items()
        }

    def reference(
        self, prompts: list[Prompt], *, seed: int, size: tuple[int, int] = FRAME
    ) -> Renders:
        """Fresh renders of the prompts in a size, [width, height].

        Those of the last call are kept: every row of an evaluation asks for the same.
        """
        return self.renders(
            (seed, size, *prompts), lambda: fresh_renders(prompts, seed=seed, size=size)
        )

    def renders(self, asked: tuple[Any, ...], render: Callable[[], Tensor]) -> Renders:
        """What `render` gives, [N, 3, H, W] in [-1, 1], as the reader reads it; kept until another
        is asked for.
        """
        if self._reference is None or self._reference[0] != asked:
            pixels = render()
            self._reference = (asked, Renders(pixels, *self.read(pixels)))
        return self._reference[1]

    @staticmethod
    def accuracy(answers: dict[str, Tensor], prompts: list[Prompt]) -> dict[str, float]:
        """Accuracy in [0, 1] by attribute, where prompts state it; nan where none does.

        `prompt_accuracy` is the share of pictures with the right count and everything that the
        prompt states.
        """
        right, stated = _right(answers, prompts)
        scores = {"prompt_accuracy": Judge.shows_prompt(answers, prompts).double().mean().item()}
        for name in ATTRIBUTES:
            hits = [right[q][stated[q]] for q in CHOICES if q.rstrip("012") == name]
            scores[name] = torch.cat(hits).double().mean().item()
        return scores

    @staticmethod
    def shows_prompt(answers: dict[str, Tensor], prompts: list[Prompt]) -> Tensor:
        """Whether each picture [N] has the right count and everything that its prompt states."""
        right, stated = _right(answers, prompts)
        return torch.stack([right[question] | ~stated[question] for question in CHOICES]).all(dim=0)

    def __call__(
        self, pixels: Tensor, prompts: list[Prompt], *, reference_seed: int = 0
    ) -> dict[str, float]:
        """All scores except diversity of pixels [N, 3, H, W] in [-1, 1], one per prompt, at least
        four.
        """
        return self.scores_and_outcomes(pixels, prompts, reference_seed=reference_seed)[0]

    def scores_and_outcomes(
        self, pixels: Tensor, prompts: list[Prompt], *, reference_seed: int = 0
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The scores, and for those that are means over prompts the number of each prompt [N].

        For other sizes than 64x64 also `render_accuracy`: how many renders are read right.
        """
        if len(pixels) != len(prompts):
            raise ValueError(
                f"the judge needs one prompt per picture, got {len(prompts)} for {len(pixels)}"
                " pictures"
            )
        features, answers = self.read(pixels)
        size = _size(pixels)
        renders = self.reference(prompts, seed=reference_seed, size=size)
        real_features = renders.features
        precision, recall = distances.precision_recall(real_features, features)
        outcomes = {
            "prompt_accuracy": self.shows_prompt(answers, prompts).double(),
            "frechet": distances.frechet_by_sample(features, real_features, paired=True),
        }
        scores = self.accuracy(answers, prompts) | {
            "frechet": distances.frechet(features, real_features),
            "precision": precision,
            "recall": recall,
            "stripe_sharpness": stripe_sharpness(pixels, renders.pixels, prompts),
        }
        if size != FRAME:
            right = self.shows_prompt(renders.answers, prompts).double()
            scores["render_accuracy"] = right.mean().item()
        return scores, outcomes

    def render_accuracy(self, prompts: list[Prompt], *, seed: int, size: tuple[int, int]) -> float:
        """The share of fresh renders of `size`, [width, height], that are read right as a whole."""
        answers = self.reference(prompts, seed=seed, size=size).answers
        return self.shows_prompt(answers, prompts).double().mean().item()

    def diversity(self, groups: Tensor, prompts: list[Prompt], *, reference_seed: int = 0) -> float:
        """Diversity of groups [G, n, 3, H, W] relative to renders: 1 is that of the data, 0 is
        one picture.
        """
        n = groups.shape[1]
        repeated = [prompt for prompt in prompts for _ in range(n)]
        renders = fresh_renders(repeated, seed=reference_seed, size=_size(groups))
        both = (self.read(x)[0].unflatten(0, (-1, n)) for x in (groups.flatten(0, 1), renders))
        of_fakes, of_renders = map(distances.diversity, both)
        return of_fakes / of_renders


def _size(pixels: Tensor) -> tuple[int, int]:
    """[Width, height] of pixels [..., H, W]."""
    height, width = pixels.shape[-2:]
    return width, height


def _right(
    answers: dict[str, Tensor], prompts: list[Prompt]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By question: whether each answer [N] is right, and whether the prompt states it."""
    truth = targets(prompts)
    stated = {question: truth[question] >= 0 for question in CHOICES}
    right = {question: answers[question] == truth[question] for question in CHOICES}
    return right, stated


def as_saved(pixels: Tensor) -> Tensor:
    """Pixels clamped to [-1, 1] and rounded to 8 bits, in float32 on the CPU."""
    pixels = pixels.detach().float().cpu()
    if broken := int((~pixels.isfinite().flatten(1).all(dim=1)).sum()):
        raise ValueError(
            f"{broken} of {len(pixels)} pictures hold pixels that are not finite; has training"
            " diverged?"
        )
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def stripe_sharpness(pixels: Tensor, reference: Tensor, prompts: list[Prompt]) -> float:
    """Mean |Laplacian| of luminance relative to `reference`, over pictures with striped or dotted
    prompts.

    1 is that of the data, less is blur, more is noise; nan if no prompt states a pattern.
    """
    patterned = torch.tensor(
        [any(thing.fill in PATTERNS for thing in prompt.things) for prompt in prompts]
    )
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    luma = ((as_saved(x)[patterned] * LUMA).sum(1, keepdim=True) for x in (pixels, reference))
    fake, real = (F.conv2d(y, kernel).abs().mean() for y in luma)
    return (fake / real).item()
