"""Scores of pictures [N, D], given as features, and of what they are held beside."""

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
    """`network` is a key of metrics.networks; `needs` says what a score is given `beside` the
    pictures.

    reference: features of real pictures [M, D]; captions: theirs [N, D]; varied: of pictures of one
    caption [G, n, D].
    """

    network: str
    needs: ClassVar[str] = "reference"

    @abstractmethod
    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float | dict[str, float]:
        """A number, or several by name; `scale` is what the network itself multiplies similarities
        with.
        """

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in vars(self).items() if key != "network")


class Frechet(Score):
    """Squared Frechet distance; unlike torchmetrics', which its test compares, also of fewer
    pictures than features.
    """

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return distances.frechet(pictures, beside)


@dataclass(frozen=True, kw_only=True)
class Kid(Score):
    """Unbiased squared MMD under (x y / D + 1)^3, mean and deviation over subsets (Binkowski et al.

    2018).
    """

    subsets: int = 100
    size: int = 1000
    seed: int = 0

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> dict[str, float]:
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(self.size, len(pictures), len(beside))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # that it keeps features
            torch.default_generator.manual_seed(self.seed)
            how = {
                "subsets": self.subsets,
                "subset_size": size,
                "sync_on_compute": False,
            }  # one process has it all
            metric = KernelInceptionDistance(nn.Identity(), **how)
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
    """Precision, recall, density and coverage with k neighbours."""

    k: int = 5

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> dict[str, float]:
        shares = [
            f(beside, pictures, self.k)
            for f in (distances.precision_recall, distances.density_coverage)
        ]
        return dict(
            zip(("precision", "recall", "density", "coverage"), sum(shares, ()), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Alignment(Score):
    """Mean cosine between picture and caption; with `scaled` times what the network has learnt, as
    PickScore has it.
    """

    scaled: bool = False
    needs = "captions"

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return (pictures.double() * beside.double()).sum(1).mean().item() * (
            scale if self.scaled else 1.0
        )


class Variety(Score):
    """Mean Euclidean distance between two pictures of one caption."""

    needs = "varied"

    def __call__(self, pictures: Tensor, beside: Tensor, scale: float) -> float:
        return distances.diversity(beside)
