"""Judging generated `shapes`: do they show what the prompt says, and are they as real, varied and sharp as renders?

The reader answers what it sees. An answer counts only where the prompt says something: what a caption leaves free
cannot be wrong. The distances compare with renders of the same prompts, so that they measure pictures, not prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill import distances
from distill.shapes.reader import CHOICES, Reader, targets
from distill.shapes.render import render
from distill.shapes.world import Prompt, draw_prompt, draw_scene

MODEL = Path(__file__).parent / "models" / "reader"
ATTRIBUTES = ("kind", "colour", "fill", "size", "axis", "background", "count")
LUMA = (0.2126, 0.7152, 0.0722)  # Rec. 709
PATTERNS = ("striped", "dotted")
SEEDS = 9_000_000  # training seeds stay below: no judging prompt and no reference scene was ever trained on


def judging_prompts(n: int, *, seed: int, held_out: bool = False) -> list[Prompt]:
    """n prompts apart from training's draws; with `held_out`, each names a pair that training never shows."""
    return [draw_prompt(np.random.default_rng([SEEDS + seed, i]), held_out=held_out) for i in range(n)]


def fresh_renders(prompts: list[Prompt], *, seed: int) -> Tensor:
    """One scene per prompt, drawn anew: pixels [N, 3, 64, 64] in [-1, 1]. A prompt given twice gives two scenes."""
    # The 2 keeps scenes apart from prompts: numpy pads short seeds with zeros, so [s, i] is [s, i, 0].
    scenes = [draw_scene(np.random.default_rng([SEEDS + seed, i, 2]), prompt) for i, prompt in enumerate(prompts)]
    return torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge:
    """Scores pictures [N, 3, 64, 64] against their prompts, on the CPU, each picture as a PNG file would hold it."""

    def __init__(self, reader: Reader):
        self.reader = reader

    @classmethod
    def load(cls, folder: Path = MODEL) -> Judge:
        return cls(Reader.load(folder))

    @torch.no_grad()
    def read(self, pixels: Tensor, batch: int = 256) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels [N, 3, 64, 64] in [-1, 1] -> features [N, 96] and the likeliest answer's index [N] per question."""
        features = torch.cat([self.reader.features(part) for part in as_saved(pixels).split(batch)])
        return features, {question: logits.argmax(1) for question, logits in self.reader.answer(features).items()}

    @staticmethod
    def accuracy(answers: dict[str, Tensor], prompts: list[Prompt]) -> dict[str, float]:
        """Shares in [0, 1] of right answers to what was said, by attribute; nan where no prompt says any.

        `prompt_accuracy` is the share of pictures with everything right: the count and all that their prompt says.
        """
        truth = targets(prompts)
        said = {question: truth[question] >= 0 for question in CHOICES}
        right = {question: answers[question] == truth[question] for question in CHOICES}
        whole = torch.stack([right[question] | ~said[question] for question in CHOICES]).all(dim=0)
        scores = {"prompt_accuracy": whole.double().mean().item()}
        for name in ATTRIBUTES:
            slots = [question for question in CHOICES if question.rstrip("012") == name]
            hits = torch.cat([right[question][said[question]] for question in slots])
            scores[name] = hits.double().mean().item()
        return scores

    def __call__(
        self,
        pixels: Tensor,
        prompts: list[Prompt],
        *,
        reference_seed: int = 0,
        diversity: tuple[list[Prompt], Tensor] | None = None,
    ) -> dict[str, float]:
        """All scores of pixels [N, 3, 64, 64] in [-1, 1], one per prompt, at least four.

        `diversity` = (G prompts, pixels [G, n, 3, 64, 64]) adds the ratio of their spread to that of n renders of each
        prompt: 1 is as varied as the data, 0 is one picture per prompt.
        """
        if len(pixels) != len(prompts):
            raise ValueError(f"the judge needs one prompt per picture, got {len(prompts)} for {len(pixels)} pictures")
        features, answers = self.read(pixels)
        reference = fresh_renders(prompts, seed=reference_seed)
        real = self.read(reference)[0]
        precision, recall = distances.precision_recall(real, features)
        scores = self.accuracy(answers, prompts) | {
            "frechet": distances.frechet(features, real),
            "precision": precision,
            "recall": recall,
            "stripe_sharpness": stripe_sharpness(pixels, reference, prompts),
        }
        if diversity is not None:
            scores["diversity"] = self._relative_diversity(*diversity, seed=reference_seed)
        return scores

    def _relative_diversity(self, prompts: list[Prompt], groups: Tensor, *, seed: int) -> float:
        """Spread of groups [G, n, 3, 64, 64] over that of as many renders of the same prompts."""
        if len(groups) != len(prompts):
            raise ValueError(f"diversity needs one group per prompt, got {len(groups)} for {len(prompts)} prompts")
        count, n = groups.shape[:2]
        renders = fresh_renders([prompt for prompt in prompts for _ in range(n)], seed=seed)
        fake, real = (
            distances.diversity(self.read(pixels)[0].unflatten(0, (count, n)))
            for pixels in (groups.flatten(0, 1), renders)
        )
        return fake / real


def as_saved(pixels: Tensor) -> Tensor:
    """Pixels clamped to [-1, 1] and rounded to 8 bits, in float32 on the CPU."""
    pixels = pixels.detach().float().cpu()
    if broken := int((~pixels.isfinite().flatten(1).all(dim=1)).sum()):
        raise ValueError(f"{broken} of {len(pixels)} pictures hold pixels that are not finite; has training diverged?")
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def stripe_sharpness(pixels: Tensor, reference: Tensor, prompts: list[Prompt]) -> float:
    """Mean |Laplacian| of luminance over the pictures whose prompt says striped or dotted, relative to `reference`.

    1 is as sharp as the data, less is blur, more is noise; nan if no prompt says a pattern.
    """
    patterned = torch.tensor([any(thing.fill in PATTERNS for thing in prompt.things) for prompt in prompts])
    if not patterned.any():
        return float("nan")
    fake, real = (_edges(as_saved(x)[patterned]) for x in (pixels, reference))
    return (fake / real).item()


def _edges(pixels: Tensor) -> Tensor:
    """Mean absolute response of the five-point Laplacian to the luminance of pixels [N, 3, H, W] -> scalar."""
    luminance = torch.einsum("nchw,c->nhw", pixels, torch.tensor(LUMA))[:, None]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    return F.conv2d(luminance, kernel[None, None]).abs().mean()
