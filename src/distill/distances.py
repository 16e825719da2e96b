"""How far apart two sets of feature vectors are, and how varied one set is. N, M samples, G groups, D features.

    frechet     |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))              Heusel et al. 2017
    precision   share of fakes inside the real manifold                           Kynkaanniemi et al. 2019
    recall      share of reals inside the fake manifold
    diversity   E |f_i - f_j| over pairs of samples of one prompt

The manifold of a set is the union of balls around its members, each reaching the member's k-th nearest neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512  # of a distance matrix at a time: 512 x 50,000 in float32 is 100 MB


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between the Gaussians fitted to a [N, D] and b [M, D]; fewer samples than D are fine."""
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
            raise ValueError(f"frechet needs two or more finite rows [N, D] in {name}, got shape {list(x.shape)}")
    a, b = a.double(), b.double()  # the result is a small difference of large traces
    s_a, s_b = (x.T.cov().reshape(x.shape[1], x.shape[1]) for x in (a, b))  # cov of one feature is a scalar
    # S_a S_b and S_a^(1/2) S_b S_a^(1/2) have the same eigenvalues, and only the latter is symmetric.
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ s_b @ root)
    cross = product.clamp(min=0).sqrt().sum()  # eigenvalues that should be zero come out as +-1e-17
    distance = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    return max(0.0, float(distance))


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Fidelity and coverage of fake [M, D] with respect to real [N, D], both in [0, 1]."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"a {k}-nearest-neighbour manifold needs more than {k} samples, got {len(real)}, {len(fake)}")
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(points: Tensor, members: Tensor, k: int) -> float:
    """Share of `points` that lie in the manifold of `members`."""
    # The nearest neighbour of a member is itself, at distance zero.
    radii = torch.cat([_distances(rows, members).kthvalue(k + 1, dim=1).values for rows in torch.split(members, ROWS)])
    inside = torch.cat([(_distances(rows, members) <= radii).any(dim=1) for rows in torch.split(points, ROWS)])
    return inside.double().mean().item()


def diversity(groups: Tensor) -> float:
    """Mean Euclidean distance between two of the n samples of a group, over all pairs of groups [G, n, D]."""
    n = groups.shape[1]
    if n < 2:
        raise ValueError(f"diversity compares samples of one prompt: groups [G, n, D] need n >= 2, got n = {n}")
    sums = torch.stack([_distances(group, group).double().sum() for group in groups])
    return (sums.mean() / (n * (n - 1))).item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean [n, m] between a [n, D] and b [m, D]."""
    # The faster |a|^2 + |b|^2 - 2ab would leave a point at some distance from its own copy.
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")
