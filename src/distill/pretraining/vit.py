"""A small DINOv2-type ViT, trained without labels by self-distillation (DINO, Caron et al. 2021).

student sees 2 global and 4 local crops, teacher (its moving average) the 2 global ones;
loss = - sum over crops a != b of softmax((teacher(a) - centre) / 0.04) . log softmax(student(b) / 0.1)
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from distill.pretraining.fit import DEVICE, Budget, fit

WIDTH, PROTOTYPES = 128, 512
GLOBAL, LOCAL, LOCAL_CROPS = (0.4, 1.0), (0.1, 0.4), 4  # shares of the picture's area
MOMENTUM, TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.99, 0.04, 0.1


class SelfDistilled(nn.Module):
    """Student and moving-average teacher, each a ViT with a projection to prototypes, and the running centre."""

    def __init__(self, side: int):
        super().__init__()
        config = Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=6, num_attention_heads=4, image_size=side, patch_size=side // 8
        )
        hidden = 2 * WIDTH
        head = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, PROTOTYPES))
        self.vit, self.head = Dinov2Model(config), head
        self.teacher = nn.ModuleList([copy.deepcopy(self.vit), copy.deepcopy(head)]).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(PROTOTYPES))

    @torch.no_grad()
    def teach(self, crops: list[Tensor]) -> list[Tensor]:
        """Move the teacher towards the student, and give its sharpened, centred opinion of every crop."""
        for old, new in zip(self.teacher.parameters(), [*self.vit.parameters(), *self.head.parameters()], strict=True):
            old.lerp_(new, 1 - MOMENTUM)
        vit, head = self.teacher
        scores = [head(vit(x).pooler_output).float() for x in crops]
        opinions = [((s - self.centre) / TEACHER_TEMPERATURE).softmax(-1) for s in scores]
        self.centre.lerp_(torch.cat(scores).mean(0), 0.1)
        return opinions

    def guess(self, x: Tensor) -> Tensor:
        return (self.head(self.vit(x).pooler_output).float() / STUDENT_TEMPERATURE).log_softmax(-1)


def train(pictures: Tensor, budget: Budget, *, out: Path, seed: int = 0) -> tuple[Dinov2Model, float]:
    """`pictures` uint8 [N, 3, S, S] -> the teacher's ViT, whose CLS and patch tokens are the features."""
    torch.manual_seed(seed)
    side = pictures.shape[-1]
    net = SelfDistilled(side)

    def objective(step: int, generator: torch.Generator) -> dict[str, Tensor]:
        index = torch.randint(len(pictures), (budget.batch_size,), generator=generator)
        x = pictures[index].to(DEVICE).float() / 127.5 - 1
        wide = [crop(x, GLOBAL, side, generator) for _ in range(2)]
        narrow = [crop(x, LOCAL, side // 2, generator) for _ in range(LOCAL_CROPS)]
        opinions = net.teach(wide)
        guesses = [net.guess(view) for view in (*wide, *narrow)]
        pairs = [-(p * q).sum(-1).mean() for i, p in enumerate(opinions) for j, q in enumerate(guesses) if i != j]
        return {"dino": torch.stack(pairs).mean()}

    seconds = fit("vit", net, objective, budget, out=out, seed=seed)
    return net.teacher[0].eval(), seconds


def crop(x: Tensor, share: tuple[float, float], side: int, generator: torch.Generator) -> Tensor:
    """A random square of each x [B, 3, S, S], perhaps mirrored, brightened -> [B, 3, side, side]."""
    scale, brightness, *place = torch.rand(4, len(x), generator=generator)
    mirror = torch.randint(2, (len(x),), generator=generator) * 2 - 1
    half = (share[0] + (share[1] - share[0]) * scale).sqrt()
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = half * mirror, half
    for axis in range(2):
        theta[:, axis, 2] = (1 - half) * (2 * place[axis] - 1)
    grid = F.affine_grid(theta.to(x.device), [len(x), 3, side, side], align_corners=False)
    view = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return view + 0.2 * (brightness - 0.5).to(x.device)[:, None, None, None]


@torch.no_grad()
def neighbour_accuracy(vit: Dinov2Model, pictures: Tensor, labels: Tensor, known: int) -> float:
    """Share of pictures after the first `known` whose nearest of those, by cosine of CLS tokens, has their label."""
    tokens = torch.cat([vit(part.float() / 127.5 - 1).pooler_output for part in pictures.split(256)])
    tokens = F.normalize(tokens, dim=1)
    nearest = (tokens[known:] @ tokens[:known].T).argmax(1)
    return float((labels[:known][nearest] == labels[known:]).float().mean())
