"""A small ViT in DINOv2's architecture, trained without labels on masked pictures (SimMIM, Xie et
al. 2022).

    patches = mean |pixels predicted from the patch token - pixels|, over masked patches
    whole = mean |downsampled picture predicted from the class token - downsampled picture|

DINO's loss on crops was tried first. In the available time it learns to distinguish pictures by
colour, or nothing with colour augmentation.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from distill.worlds.shapes.pretraining.assemble import save_half
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import Work, pixels, render_all
from distill.worlds.shapes.world import COLOURS, KINDS, sample

WIDTH, PATCHES = 128, 8  # patches a side
MASKED = (0.1, 0.8)  # shares of the patches


def build(side: int) -> Dinov2Model:
    """The network with random weights, for pictures of `side` pixels a side."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    # Eager: torch's fused attention has a slow backward pass in half precision on a CPU.
    shape |= {"image_size": side, "patch_size": side // PATCHES}
    model = Dinov2Model(Dinov2Config(**shape, attn_implementation="eager"))
    nn.init.normal_(model.embeddings.mask_token, std=0.02)
    return model


class Masked(nn.Module):
    """A ViT with two linear layers that predict pixels from its tokens."""

    def __init__(self, side: int):
        super().__init__()
        self.patch = side // PATCHES
        self.vit = build(side)
        self.of_patch = nn.Linear(WIDTH, 3 * self.patch**2)
        self.of_whole = nn.Linear(WIDTH, 3 * (side // 4) ** 2)

    def losses(self, x: Tensor, masked: Tensor) -> dict[str, Tensor]:
        """Losses of pictures x [B, 3, S, S] in [-1, 1] with masked patches, bool [B, 64]."""
        tokens = self.vit(x, bool_masked_pos=masked).last_hidden_state
        target = F.unfold(x, self.patch, stride=self.patch).mT  # [B, 64, 3 p^2]
        predicted = self.of_patch(tokens[:, 1:][masked]).float()
        whole = self.of_whole(tokens[:, 0]).float()
        return {
            "patches": (predicted - target[masked]).abs().mean(),
            "whole": (whole - F.avg_pool2d(x, 4).flatten(1)).abs().mean(),
        }


def train(work: Work) -> dict[str, Any]:
    """Train the ViT, whose class and patch tokens are the features.

    Scores: probes on scenes of one thing.
    """
    pictures, fit = work.pictures, work.fit("vit")
    side, n = pictures.shape[-1], work.asked["scoring"]["prompts"]
    torch.manual_seed(fit.seed)
    net = Masked(side)

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        masked = mask(len(index), generator)
        return net.losses(pixels(pictures[index].to(DEVICE)), masked.to(DEVICE))

    fit(net, objective, samples=len(pictures))
    scores = {}
    if work.of_shapes:
        drawn = (sample(work.data["seed"] + 3, i)[1] for i in itertools.count())
        scenes = list(itertools.islice((scene for scene in drawn if len(scene.things) == 1), 6 * n))
        tokens = describe(net.vit, render_all(scenes))
        for name, words in (("kind", KINDS), ("colour", list(COLOURS))):
            labels = torch.tensor([words.index(getattr(scene.things[0], name)) for scene in scenes])
            scores[name] = round(probe_accuracy(tokens, labels, known=5 * n), 4)
    save_half(net.vit, work.models / "vit")
    return {"seconds": fit.seconds} | ({"probe_accuracy": scores} if scores else {})


def mask(count: int, generator: torch.Generator) -> Tensor:
    """bool [count, 64]: each row masks a share of its patches, drawn from MASKED."""
    order = torch.rand(count, PATCHES**2, generator=generator).argsort(1)
    share = MASKED[0] + (MASKED[1] - MASKED[0]) * torch.rand(count, 1, generator=generator)
    return order < share * PATCHES**2


@torch.no_grad()
def describe(vit: Dinov2Model, pictures: Tensor) -> Tensor:
    """uint8 pictures [N, 3, S, S] -> class token, mean and maximum of the patch tokens [N, 3 D]."""
    tokens = torch.cat([vit(pixels(part)).last_hidden_state for part in pictures.split(256)])
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1), tokens[:, 1:].amax(1)], dim=1)


def probe_accuracy(x: Tensor, labels: Tensor, known: int) -> float:
    """Accuracy on x [N, D] after the first `known`, of a ridge regression on those, for
    labels [N].
    """
    x, target = x.double() - x[:known].double().mean(0), F.one_hot(labels).double()
    x = torch.cat([x / x[:known].std(), torch.ones_like(x[:, :1])], dim=1)
    ridge = torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(x[:known].T @ x[:known] + ridge, x[:known].T @ target[:known])
    return float(((x[known:] @ weights).argmax(1) == labels[known:]).float().mean())
