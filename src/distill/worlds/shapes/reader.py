"""The reader of `shapes`: a classifier of what a caption can state. No generator is trained on it.

Things are read in order along the arrangement's axis (left to right, or top to bottom), as prompts
list them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.storage.atomic import atomic_file
from distill.worlds.shapes.world import (
    AXES,
    BACKGROUNDS,
    COLOURS,
    FILLS,
    KINDS,
    SIZES,
    Prompt,
    Scene,
)

SLOTS = 3
OF_THINGS = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "fill": FILLS,
    "size": SIZES,
}  # questions for each slot
CHOICES = {  # question -> possible answers
    "count": (1, 2, 3),
    "axis": AXES,
    "background": tuple(BACKGROUNDS),
}
CHOICES |= {
    f"{name}{slot}": options for slot in range(SLOTS) for name, options in OF_THINGS.items()
}


class Residual(nn.Module):
    """x + conv(conv(x)), each after a norm and an activation, at one resolution."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(*(part for _ in range(2) for part in _normed(width, width)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _normed(fan_in: int, fan_out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.GroupNorm(8, fan_in),
        nn.SiLU(),
        nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1),
    )


class Reader(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] -> logits per question. `features` [B, 96] are those of
    the distances.
    """

    FEATURES = 96

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = [
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            Residual(32),
            Residual(32),
        ]
        # 32 -> 16 -> 8 pixels a side: positions must stay distinct.
        for fan_in, fan_out in ((32, 64), (64, 128)):
            stages += [*_normed(fan_in, fan_out, stride=2), Residual(fan_out), Residual(fan_out)]
        stages += [nn.GroupNorm(8, 128), nn.SiLU(), nn.Conv2d(128, 48, 1), nn.Flatten()]
        self.trunk = nn.Sequential(*stages, nn.Linear(48 * 64, 256), nn.SiLU())
        self.to_features = nn.Linear(256, self.FEATURES)
        self.heads = nn.Linear(self.FEATURES, sum(len(options) for options in CHOICES.values()))

    def features(self, pixels: Tensor) -> Tensor:
        return self.to_features(self.trunk(pixels))

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The maps [B, 32, 32, 32], [B, 64, 16, 16] and [B, 128, 8, 8] after each resolution."""
        found: dict[int, Tensor] = {}
        x = pixels
        for module in self.trunk:
            if isinstance(module, nn.Flatten):
                break
            x = module(x)
            if isinstance(module, Residual):
                found[x.shape[-1]] = x
        return list(found.values())

    def answer(self, features: Tensor) -> dict[str, Tensor]:
        """Features [B, 96] -> logits [B, options] per question."""
        parts = self.heads(nn.functional.silu(features)).split(
            [len(options) for options in CHOICES.values()], dim=1
        )
        return dict(zip(CHOICES, parts, strict=True))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.answer(self.features(pixels))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        with atomic_file(folder / "reader.safetensors") as part:
            save_file(state, part)

    @classmethod
    def load(cls, folder: Path) -> Reader:
        reader = cls()
        reader.load_state_dict(
            {k: v.float() for k, v in load_file(folder / "reader.safetensors").items()}
        )
        return reader.eval().requires_grad_(False)


def targets(prompts: Sequence[Prompt | Scene]) -> dict[str, Tensor]:
    """Per question the index [B] that each prompt states, or scene shows; -1 where it is not
    stated.
    """
    found = {question: torch.full((len(prompts),), -1) for question in CHOICES}
    for row, prompt in enumerate(prompts):
        stated = {"count": len(prompt.things), "axis": prompt.axis, "background": prompt.background}
        for slot, thing in enumerate(prompt.things):
            stated |= {f"{name}{slot}": getattr(thing, name) for name in OF_THINGS}
        for question, answer in stated.items():
            if answer is not None:
                found[question][row] = CHOICES[question].index(answer)
    return found
