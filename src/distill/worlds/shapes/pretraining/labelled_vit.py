"""A ViT of the size of `vit`, trained on labels: it stands for DINOv2, whose features know what is
in a picture.

    patches = cross-entropy of kind, colour and fill of the thing that covers a patch, and of the
              background, predicted from the patch token
    whole = binary cross-entropy of which kinds, colours, fills and background the picture has,
            predicted from the class token

DINOv2 has no labels. It has 142 million pictures; this world has minutes on a CPU, in which nothing
without labels learnt kinds (see the card).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.worlds.shapes.pretraining import vit
from distill.worlds.shapes.pretraining.assemble import save_half
from distill.worlds.shapes.pretraining.fit import DEVICE
from distill.worlds.shapes.pretraining.work import Work, pixels, render_all
from distill.worlds.shapes.render import coverage
from distill.worlds.shapes.world import BACKGROUNDS, COLOURS, FILLS, KINDS, SIDE, Scene, sample

OF_THINGS: dict[str, tuple[str, ...]] = {"kind": KINDS, "colour": tuple(COLOURS), "fill": FILLS}
WORDS = OF_THINGS | {"background": tuple(BACKGROUNDS)}
COVERED = 0.25  # of a patch, at least, for the patch to show a thing
NOISE = 0.08  # highest standard deviation, as for the reader: generated pictures are not clean
# Seeds of scenes, counted from `data.seed`. The teachers train on the seed itself, the reader on
# the next as well; `shards` draws captions of the one after, and probes of `vit` read the third.
TRAINING_SEED, PROBE_SEED = 4, 5


class Labelled(nn.Module):
    """A ViT with two linear layers that predict labels from its tokens."""

    def __init__(self, side: int = SIDE):
        super().__init__()
        answers = sum(len(words) for words in WORDS.values())
        self.vit = vit.build(side)
        self.of_patch = nn.Linear(vit.WIDTH, answers)
        self.of_whole = nn.Linear(vit.WIDTH, answers)

    def losses(self, x: Tensor, truth: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of pictures x [B, 3, S, S] in [-1, 1] with labels [B, 64] of `label_patches`."""
        tokens = self.vit(x).last_hidden_state
        sizes = [len(words) for words in WORDS.values()]
        of_patches = self.of_patch(tokens[:, 1:]).float().split(sizes, dim=-1)
        losses = [
            F.cross_entropy(logits.flatten(0, 1), truth[name].flatten(), ignore_index=-1)
            for name, logits in zip(WORDS, of_patches, strict=True)
        ]
        whole = F.binary_cross_entropy_with_logits(
            self.of_whole(tokens[:, 0]).float(), present(truth)
        )
        return {"patches": torch.stack(losses).sum(), "whole": whole}


def label_patches(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Scenes -> per name of WORDS the index [N, 64] of the word that each patch shows.

    -1 for kind, colour and fill of a patch that no thing covers by COVERED.
    """
    labels = {name: torch.full((len(scenes), vit.PATCHES**2), -1) for name in WORDS}
    for row, scene in enumerate(scenes):
        labels["background"][row] = WORDS["background"].index(scene.background)
        shares = torch.stack([torch.from_numpy(coverage(thing)) for thing in scene.things])
        shares = F.avg_pool2d(shares[:, None], SIDE // vit.PATCHES).flatten(1)
        most, first = shares.max(0)
        for name, words in OF_THINGS.items():
            own = torch.tensor([words.index(getattr(thing, name)) for thing in scene.things])
            labels[name][row] = torch.where(most >= COVERED, own[first], -1)
    return labels


def present(truth: dict[str, Tensor]) -> Tensor:
    """Labels [B, 64] of patches -> which words the picture shows, 0 or 1, [B, words]."""
    shown = [
        F.one_hot(truth[name] + 1, len(words) + 1).amax(1)[:, 1:] for name, words in WORDS.items()
    ]
    return torch.cat(shown, dim=1).float()


def train(work: Work) -> dict[str, Any]:
    """Train on scenes of its own. Scores: linear probes of patch tokens, on other scenes."""
    fit, seed = work.fit("vit_labels"), work.data["seed"]
    scenes = [sample(seed + TRAINING_SEED, i)[1] for i in range(work.asked["labelled_scenes"])]
    truth, pictures = label_patches(scenes), render_all(scenes)
    torch.manual_seed(fit.seed)
    net = Labelled()

    def objective(step: int, index: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x, noise = pixels(pictures[index]), NOISE * torch.rand((), generator=generator)
        x = x + noise * torch.randn(x.shape, generator=generator)
        return net.losses(
            x.to(DEVICE), {k: labels[index].to(DEVICE) for k, labels in truth.items()}
        )

    fit(net, objective, samples=len(pictures))
    save_half(net.vit, work.models / "vit_labels")
    scores = probe_patches(net.vit, seed + PROBE_SEED, count=5 * work.asked["scoring"]["prompts"])
    return {"seconds": fit.seconds, "patch_probe_accuracy": scores}


@torch.no_grad()
def probe_patches(model: nn.Module, seed: int, count: int) -> dict[str, float]:
    """Accuracy of linear probes of kind, colour and fill on the last patch tokens of covered
    patches.

    They are fitted on the first half of `count` scenes of the seed, and read the second half.
    `model` maps pixels in [-1, 1] to `last_hidden_state`, class token first.
    """
    scenes = [sample(seed, i)[1] for i in range(count)]
    labels = label_patches(scenes)
    parts = pixels(render_all(scenes)).split(256)
    tokens = torch.cat([model(part).last_hidden_state[:, 1:] for part in parts])
    covered = labels["kind"] >= 0
    known = int(covered[: count // 2].sum())
    return {
        name: round(vit.probe_accuracy(tokens[covered], labels[name][covered], known), 4)
        for name in OF_THINGS
    }
