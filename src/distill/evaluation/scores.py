"""Scores computed from features of pictures [N, D] and a reference."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill.core import distances


@dataclass(frozen=True, kw_only=True)
class Score(ABC):
    """A score. `network` is a key of metrics.networks; `needs` names the second argument.

    reference: features of real pictures [M, D]. captions: features of the captions [N, D]. varied:
    features of n pictures for each of G captions [G, n, D]. pictures: nothing.
    """

    network: str
    needs: ClassVar[str] = "reference"

    @abstractmethod
    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float | dict[str, float]:
        """A number, or several by name. `scale` is the learned scale of the network's logits."""

    def by_picture(self, pictures: Tensor, beside: Tensor, scale: float) -> Tensor | None:
        """A number of each picture [N] whose mean is the score; None where there is no such."""
        return None

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in vars(self).items() if key != "network")


class Frechet(Score):
    """Squared Frechet distance. Unlike torchmetrics' it also takes fewer pictures than features."""

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return distances.frechet(pictures, beside)

    def by_picture(self, pictures: Tensor, beside: Tensor, scale: float) -> Tensor:
        return distances.frechet_by_sample(pictures, beside, paired=False)


@dataclass(frozen=True, kw_only=True)
class Kid(Score):
    """Unbiased squared MMD under (x y / D + 1)^3: mean and standard deviation over subsets
    (Binkowski et al. 2018).
    """

    subsets: int = 100
    size: int = 1000
    seed: int = 0

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> dict[str, float]:
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(self.size, len(pictures), len(beside))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # it warns that it stores all features
            torch.default_generator.manual_seed(self.seed)
            metric = KernelInceptionDistance(
                nn.Identity(),
                subsets=self.subsets,
                subset_size=size,
                sync_on_compute=False,  # one process has all features
            )
            metric.update(beside.double(), real=True)
            metric.update(pictures.double(), real=False)
            return dict(zip(("kid", "kid_std"), map(float, metric.compute()), strict=True))


@dataclass(frozen=True, kw_only=True)
class Mmd(Score):
    """`times` the squared MMD under a Gaussian kernel."""

    bandwidth: float = 10.0
    times: float = 1000.0

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return self.times * distances.mmd(pictures, beside, self.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Manifolds(Score):
    """Precision, recall, density and coverage with k nearest neighbours."""

    k: int = 5

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> dict[str, float]:
        precision, recall = distances.precision_recall(beside, pictures, self.k)
        density, coverage = distances.density_coverage(beside, pictures, self.k)
        return {
            "precision": precision,
            "recall": recall,
            "density": density,
            "coverage": coverage,
        }


@dataclass(frozen=True, kw_only=True)
class Alignment(Score):
    """Mean cosine of picture and caption; with `scaled`, times the network's learned scale, as in
    PickScore.
    """

    scaled: bool = False
    needs = "captions"

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return self.by_picture(pictures, beside, scale).mean().item()

    def by_picture(self, pictures: Tensor, beside: Tensor, scale: float) -> Tensor:
        cosine = (pictures.double() * beside.double()).sum(1)
        return cosine * (scale if self.scaled else 1.0)


class Reward(Score):
    """Mean of the number that the network itself gives each picture, [N, 1]."""

    needs = "pictures"

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return self.by_picture(pictures, beside, scale).mean().item()

    def by_picture(self, pictures: Tensor, beside: Tensor, scale: float) -> Tensor:
        return pictures[:, 0].double()


class Variety(Score):
    """Mean Euclidean distance between two pictures of one caption."""

    needs = "varied"

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return distances.diversity(beside)
