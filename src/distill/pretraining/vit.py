"""A small DINOv2-type ViT, trained without labels by self-distillation (DINO, Caron et al. 2021).

student sees 2 global and 4 local crops, teacher (its moving average) the 2 global ones;
loss = - sum over crops a != b of softmax((teacher(a) - centre) / 0.04) . log softmax(student(b) / 0.1)
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from distill.pretraining.assemble import save_half
from distill.pretraining.fit import DEVICE
from distill.pretraining.work import Work, draw, pixels
from distill.shapes.world import COLOURS, KINDS, sample

WIDTH, PROTOTYPES = 128, 512
GLOBAL, LOCAL, LOCAL_CROPS = (0.4, 1.0), (0.1, 0.4), 4  # shares of the picture's area
MOMENTUM, TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.99, 0.04, 0.1


class SelfDistilled(nn.Module):
    """Student and moving-average teacher, each a ViT with a projection to prototypes, and the running centre."""

    def __init__(self, side: int):
        super().__init__()
        shape = {"hidden_size": WIDTH, "num_hidden_layers": 6, "num_attention_heads": 4}
        head = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, PROTOTYPES))
        self.vit = Dinov2Model(Dinov2Config(**shape, image_size=side, patch_size=side // 8))
        self.head = head  # drawn first, but second among the parameters
        self.teacher = copy.deepcopy(nn.ModuleList([self.vit, self.head])).requires_grad_(False)
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


def train(work: Work) -> dict[str, Any]:
    """Leaves the teacher's ViT, whose CLS and patch tokens are the features. Scores: of scenes of one thing."""
    pictures, fit = work.pictures, work.fit("vit")
    side, n = pictures.shape[-1], work.asked["scoring"]["prompts"]
    torch.manual_seed(fit.seed)
    net = SelfDistilled(side)

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = pixels(pictures[index].to(DEVICE))
        wide = [crop(x, GLOBAL, side, generator) for _ in range(2)]
        narrow = [crop(x, LOCAL, side // 2, generator) for _ in range(LOCAL_CROPS)]
        opinions = net.teach(wide)
        guesses = [net.guess(view) for view in (*wide, *narrow)]
        pairs = [-(p * q).sum(-1).mean() for i, p in enumerate(opinions) for j, q in enumerate(guesses) if i != j]
        return {"dino": torch.stack(pairs).mean()}

    fit(net, objective, samples=len(pictures))
    vit, scores = net.teacher[0], {}
    if work.of_shapes:
        drawn = (sample(work.data["seed"] + 3, i)[1] for i in itertools.count())
        scenes = list(itertools.islice((scene for scene in drawn if len(scene.things) == 1), 6 * n))
        for name, words in (("kind", KINDS), ("colour", list(COLOURS))):
            labels = torch.tensor([words.index(getattr(scene.things[0], name)) for scene in scenes])
            scores[name] = round(neighbour_accuracy(vit, draw(scenes), labels, known=5 * n), 4)
    save_half(vit, work.models / "vit")
    return {"seconds": fit.seconds} | ({"neighbour_accuracy": scores} if scores else {})


def crop(x: Tensor, share: tuple[float, float], side: int, generator: torch.Generator) -> Tensor:
    """A random square of each x [B, 3, S, S], perhaps mirrored, brightened -> [B, 3, side, side]."""
    scale, brightness, *place = torch.rand(4, len(x), generator=generator)
    mirror = torch.randint(2, (len(x),), generator=generator) * 2 - 1
    half = (share[0] + (share[1] - share[0]) * scale).sqrt()
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = half * mirror, half
    theta[:, 0, 2], theta[:, 1, 2] = ((1 - half) * (2 * share - 1) for share in place)
    grid = F.affine_grid(theta.to(x.device), [len(x), 3, side, side], align_corners=False)
    view = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return view + 0.2 * (brightness - 0.5).to(x.device)[:, None, None, None]


@torch.no_grad()
def neighbour_accuracy(vit: Dinov2Model, pictures: Tensor, labels: Tensor, known: int) -> float:
    """Share of pictures after the first `known` whose nearest of those, by cosine of CLS tokens, has their label."""
    tokens = F.normalize(torch.cat([vit(pixels(part)).pooler_output for part in pictures.split(256)]), dim=1)
    nearest = (tokens[known:] @ tokens[:known].T).argmax(1)
    return float((labels[:known][nearest] == labels[known:]).float().mean())
