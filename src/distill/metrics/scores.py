"""Scores of pictures from their features. Each names its network, and what it needs beside the pictures themselves."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from distill import distances


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Features of pictures [N, D]; where there are any, of reference pictures [M, D], of the captions [N, D], and of
    several pictures of one caption [G, n, D]; and what the network itself multiplies similarities with."""

    pictures: Tensor
    reference: Tensor | None = None
    captions: Tensor | None = None
    varied: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Score(ABC):
    """`network` is a key of metrics.networks."""

    network: str
    needs: ClassVar[str]

    @abstractmethod
    def __call__(self, name: str, seen: Seen) -> dict[str, float]:
        """What is reported, under `name` where it is one number."""

    @property
    def about(self) -> str:
        """Its settings, in words."""
        return ", ".join(f"{key} {value}" for key, value in vars(self).items() if key != "network")


class Frechet(Score):
    """Squared Frechet distance; unlike torchmetrics', which its test compares, also of fewer pictures than features."""

    needs = "reference"

    def __call__(self, name: str, seen: Seen) -> dict[str, float]:
        return {name: distances.frechet(seen.pictures, seen.reference)}


@dataclass(frozen=True, kw_only=True)
class Kid(Score):
    """Unbiased squared MMD under (x y / D + 1)^3, the mean over subsets (Binkowski et al. 2018); torchmetrics."""

    subsets: int = 100
    size: int = 1000
    seed: int = 0
    needs = "reference"

    def __call__(self, name: str, seen: Seen) -> dict[str, float]:
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(self.size, len(seen.pictures), len(seen.reference))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # that it keeps features
            torch.default_generator.manual_seed(self.seed)
            metric = KernelInceptionDistance(nn.Identity(), subsets=self.subsets, subset_size=size)
            metric.update(seen.reference.double(), real=True)
            metric.update(seen.pictures.double(), real=False)
            mean, std = metric.compute()
        return {name: float(mean), f"{name}_std": float(std)}


@dataclass(frozen=True, kw_only=True)
class Mmd(Score):
    """`times` the squared MMD under a Gaussian kernel."""

    bandwidth: float = 10.0
    times: float = 1000.0
    needs = "reference"

    def __call__(self, name: str, seen: Seen) -> dict[str, float]:
        return {name: self.times * distances.mmd(seen.pictures, seen.reference, self.bandwidth)}


@dataclass(frozen=True, kw_only=True)
class Manifolds(Score):
    """Precision, recall, density and coverage with k neighbours."""

    k: int = 5
    needs = "reference"

    def __call__(self, name: str, seen: Seen) -> dict[str, float]:
        both = seen.reference, seen.pictures
        values = distances.precision_recall(*both, self.k) + distances.density_coverage(*both, self.k)
        return dict(zip(("precision", "recall", "density", "coverage"), values, strict=True))


@dataclass(frozen=True, kw_only=True)
class Alignment(Score):
    """Mean cosine between picture and caption; with `scaled` times what the network has learnt, as PickScore has it."""

    scaled: bool = False
    needs = "captions"

    def __call__(self, name: str, seen: Seen) -> dict[str, float]:
        cosine = (seen.pictures.double() * seen.captions.double()).sum(1).mean().item()
        return {name: cosine * (seen.scale if self.scaled else 1.0)}


class Variety(Score):
    """Mean Euclidean distance between two pictures of one caption."""

    needs = "varied"

    def __call__(self, name: str, seen: Seen) -> dict[str, float]:
        return {name: distances.diversity(seen.varied)}
