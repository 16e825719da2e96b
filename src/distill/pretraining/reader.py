"""Trains the judge of `shapes` on renders whose every attribute is known, and on the autoencoder's copies of them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.pretraining.fit import DEVICE, Budget, fit
from distill.shapes.reader import Reader, targets
from distill.shapes.world import Prompt


def train(
    pictures: Tensor, copies: Tensor, facts: list[Prompt], budget: Budget, *, out: Path, seed: int = 0
) -> tuple[Reader, dict[str, float]]:
    """`pictures` uint8 [N, 3, 64, 64]; `copies` [M, ...] the first M, autoencoded; `facts` complete."""
    torch.manual_seed(seed)
    reader = Reader()
    truth = targets(facts)

    def objective(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(pictures), (budget.batch_size,), generator=generator)
        x = pictures[index].float() / 127.5 - 1
        if len(copies) and step % 3 == 0:
            index = index % len(copies)
            x = copies[index].float() / 127.5 - 1
        noise = 0.08 * torch.rand((), generator=generator)
        x = x + noise * torch.randn(x.shape, generator=generator)
        answers = reader(x.to(DEVICE))
        losses = [
            F.cross_entropy(v.float(), truth[k][index].to(DEVICE), ignore_index=-1, reduction="sum")
            for k, v in answers.items()
        ]
        return {"ce": torch.stack(losses).sum() / len(index)}

    seconds = fit("reader", reader, objective, budget, out=out, seed=seed)
    return reader.eval().requires_grad_(False), {"seconds": seconds}
