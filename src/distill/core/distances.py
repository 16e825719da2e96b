"""Distances between two sets of feature vectors, and the diversity of one set. N, M samples, G
groups, D features.

    frechet    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))              Heusel 2017
    precision  share of fakes inside the real manifold                           Kynkaanniemi 2019
    recall     share of reals inside the fake manifold
    density    mean number of real balls around a fake, over k                   Naeem 2020
    coverage   share of real balls with a fake inside
    mmd        E k(a, a') + E k(b, b') - 2 E k(a, b),  k = exp(-|a - b|^2 / 2 s^2)  Jayasumana 2024
    diversity  E |f_i - f_j| over pairs of samples of one prompt

The manifold of a set is the union of balls around its samples. A ball's radius is the distance to
the sample's k-th nearest neighbour.
"""

import torch
from torch import Tensor


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to a [N, D] and b [M, D].

    N and M may be smaller than D. Raises ValueError for fewer than two samples or values not
    finite.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
            raise ValueError(
                f"frechet needs two or more finite rows [N, D] in {name}, got shape {list(x.shape)}"
            )
    a, b = a.double(), b.double()  # the result is a small difference of large traces
    # With S = R^T R, tr S is |R|^2, and tr (S_a S_b)^(1/2) is the sum of the singular values of R_a
    # R_b^T.
    r_a, r_b = (torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5).R for x in (a, b))
    cross = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (
        (a.mean(0) - b.mean(0)).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * cross
    )
    return max(0.0, float(distance))


def frechet_by_sample(a: Tensor, b: Tensor, *, paired: bool) -> Tensor:
    """The squared Frechet distance as a number of each of the N samples of a [N, D], whose mean is
    the distance. b is [M, D].

    The number of sample i is the distance plus its influence: N times the derivative of the
    distance by the weight of sample i (infinitesimal jackknife, Efron 1982). To first order, the
    mean over a resampled set is the distance of that set. `paired`: a_i and b_i belong to one
    prompt and are resampled together, so that the influence of b_i is added. Otherwise b is fixed.
    """
    value = frechet(a, b)
    a, b = a.double(), b.double()
    centred = [x - x.mean(0) for x in (a, b)]
    (q_a, r_a), (q_b, r_b) = (torch.linalg.qr(x / (len(x) - 1) ** 0.5) for x in centred)
    # The derivative of the sum of singular values of A is U V^T.
    u, _, vh = torch.linalg.svd(r_a @ r_b.T, full_matrices=False)
    rotation, shift = u @ vh, 2 * (a.mean(0) - b.mean(0))
    grad_a, grad_b = q_a @ (rotation @ r_b), q_b @ (rotation.T @ r_a)
    influence = _influence(centred[0], grad_a, shift)
    if paired:
        influence = influence + _influence(centred[1], grad_b, -shift)
    return value + influence


def _influence(centred: Tensor, grad: Tensor, shift: Tensor) -> Tensor:
    """The influences of samples [N, D]; `grad` is the derivative of the cross term by them."""
    scale = (len(centred) - 1) ** 0.5
    own: Tensor = centred.square().sum(1) - scale * (centred * grad).sum(1)
    return torch.mv(centred, shift) + own - own.mean()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Fidelity and coverage of fake [M, D] with respect to real [N, D], both in [0, 1]."""
    if min(len(real), len(fake)) <= k:
        raise ValueError(
            f"a {k}-nearest-neighbour manifold needs more than {k} samples, got {len(real)},"
            f" {len(fake)}"
        )
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> tuple[float, float]:
    """Fidelity and coverage of fake [M, D] by the balls of real [N, D].

    Density may exceed 1; coverage is in [0, 1]. Unlike precision and recall, both are robust to
    outliers with a large ball.
    """
    if len(real) <= k:
        raise ValueError(
            f"a {k}-nearest-neighbour manifold needs more than {k} samples, got {len(real)}"
        )
    inside = _distances(fake, real) <= _radii(real, k)
    return inside.double().sum(1).mean().item() / k, inside.any(dim=0).double().mean().item()


def mmd(a: Tensor, b: Tensor, bandwidth: float = 10.0) -> float:
    """Squared maximum mean discrepancy of a [N, D] and b [M, D] under a Gaussian kernel.

    The biased estimate: pairs of a sample with itself count. CMMD is 1,000 times this, of CLIP
    embeddings of length 1, with a bandwidth of 10.
    """
    a, b = a.double(), b.double()  # the kernel is close to 1 everywhere
    aa, bb, ab = (
        torch.exp(-torch.cdist(x, y).square() / (2 * bandwidth**2)).mean()
        for x, y in ((a, a), (b, b), (a, b))
    )
    return float(aa + bb - 2 * ab)


def _radii(samples: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th nearest neighbour, itself not counted."""
    return _distances(samples, samples).kthvalue(k + 1, dim=1).values


def _share_inside(points: Tensor, samples: Tensor, k: int) -> float:
    """Share of `points` that lie in the manifold of `samples`."""
    return (_distances(points, samples) <= _radii(samples, k)).any(dim=1).double().mean().item()


def diversity(groups: Tensor) -> float:
    """Mean Euclidean distance between two of the n samples of a group, over groups [G, n, D]."""
    n = groups.shape[1]
    if n < 2:
        raise ValueError(
            f"diversity compares samples of one prompt: groups [G, n, D] need n >= 2, got n = {n}"
        )
    return (_distances(groups, groups).double().sum() / (len(groups) * n * (n - 1))).item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean [..., n, m] between a [..., n, D] and b [..., m, D]."""
    # The faster |a|^2 + |b|^2 - 2ab gives a point a distance above 0 to its own copy.
    return torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")
