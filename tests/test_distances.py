"""Distances between sets of features: against closed forms, against other people's matrix roots,
and by hand.
"""

import math

import pytest
import torch

from distill.core.distances import diversity, frechet, precision_recall


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int, d: int, seed: int) -> torch.Tensor:
    """Samples [n, d] whose mean is exactly zero and whose covariance is exactly the identity."""
    x = normal(n, d, seed=seed)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    mean_a, std_a = torch.tensor([[1.0, -2, 0, 5], [1, 2, 3, 0.1]], dtype=torch.float64)
    mean_b, std_b = torch.tensor([[0.0, -2, 3, 5], [1, 5, 0.5, 0.2]], dtype=torch.float64)
    a, b = whitened(50, 4, seed=1) * std_a + mean_a, whitened(80, 4, seed=2) * std_b + mean_b
    expected = (mean_a - mean_b).square().sum() + (std_a - std_b).square().sum()
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_in_one_dimension():
    assert frechet(torch.tensor([[-1.0], [1]]), torch.tensor([[1.0], [7]])) == pytest.approx(
        16 + (2**0.5 - 18**0.5) ** 2
    )


def test_frechet_agrees_with_scipy():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    a, b = (
        normal(300, 12, seed=3) @ normal(12, 12, seed=4),
        normal(200, 12, seed=5) @ normal(12, 12, seed=6) + 0.3,
    )
    s_a, s_b = a.T.cov(), b.T.cov()
    root = torch.from_numpy(sqrtm((s_a @ s_b).numpy()).real)
    expected = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * root.trace()
    assert frechet(a, b) == pytest.approx(expected.item(), rel=1e-7)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-9)


@pytest.mark.parametrize("n", [400, 10], ids=["full rank", "rank deficient"])
def test_frechet_of_a_set_with_itself_and_with_its_shifted_copy(n):
    a = (normal(n, 48) * 10).float()
    shift = torch.zeros(48)
    shift[7] = 3.0
    assert 0 <= frechet(a, a.clone()) < 1e-4  # of a trace of about 4800
    assert frechet(a, a + shift) == pytest.approx(9, abs=1e-3)


def test_frechet_between_two_sets_that_span_different_planes():
    """Orthogonal supports: the cross term vanishes, and the distance is the sum of both traces."""
    a, b = torch.zeros(40, 30, dtype=torch.float64), torch.zeros(40, 30, dtype=torch.float64)
    a[:, :2], b[:, 10:12] = whitened(40, 2, seed=1) * 3, whitened(40, 2, seed=2)
    assert frechet(a, b) == pytest.approx(2 * 9 + 2 * 1, rel=1e-6)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(1, 4), torch.zeros(8), torch.full((8, 4), math.nan)],
    ids=["one row", "vector", "nan"],
)
def test_frechet_refuses_what_has_no_covariance(bad):
    with pytest.raises(ValueError, match="in b"):
        frechet(torch.zeros(8, 4), bad)


def test_precision_and_recall_by_hand():
    """With k = 1 on a line, the reals 0, 1, 10 reach 1, 1 and 9; the fakes 0.5, 1.5, 30 reach 1, 1
    and 28.5.
    """
    real, fake = torch.tensor([[0.0], [1], [10]]), torch.tensor([[0.5], [1.5], [30]])
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3)  # 30 is 20 from the real 10
    assert recall == pytest.approx(3 / 3)  # even 10 is within 28.5 of the stray fake
    assert precision_recall(fake, real, k=1) == (recall, precision)


def test_precision_and_recall_tell_fidelity_from_coverage():
    left, right = normal(60, 5), normal(60, 5, seed=1) + 100
    both = torch.cat([left, right])
    assert precision_recall(both, both) == (1, 1)
    assert precision_recall(left, right) == (0, 0)
    assert precision_recall(both, left) == (1, 0.5)  # faithful, but one mode only
    assert precision_recall(left, both) == (0.5, 1)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_a_naive_loop(k):
    real, fake = normal(40, 3).float(), (normal(25, 3, seed=1) * 0.8 + 1.2).float()

    def share(points: torch.Tensor, members: torch.Tensor) -> float:
        reach = [
            sorted((m - o).norm().item() for j, o in enumerate(members) if j != i)[k - 1]
            for i, m in enumerate(members)
        ]
        return sum(
            any((p - m).norm() <= r for m, r in zip(members, reach, strict=True)) for p in points
        ) / len(points)

    expected = share(fake, real), share(real, fake)
    assert min(expected) > 0.2
    assert max(expected) < 1
    assert precision_recall(real, fake, k=k) == pytest.approx(expected)


def test_a_copy_is_found_inside_however_large_the_features():
    """All fakes are copies: a distance by |a|^2 + |b|^2 - 2ab would put many of them outside balls
    of radius zero.
    """
    real = (normal(30, 64) * 1e3).float().repeat_interleave(2, dim=0)
    assert precision_recall(real, real.clone(), k=1) == (1, 1)


def test_too_few_samples_for_a_manifold_are_refused():
    with pytest.raises(ValueError, match="more than 3 samples, got 10, 3"):
        precision_recall(normal(10, 2), normal(3, 2))


def test_diversity_by_hand():
    triangle = torch.tensor([[0.0, 0], [3, 0], [0, 4]])  # sides 3, 4, 5
    assert diversity(triangle[None]) == pytest.approx(4)
    assert diversity(torch.stack([triangle, torch.ones(3, 2)])) == pytest.approx(
        2
    )  # the second group is one point
    assert diversity(torch.stack([triangle, 2 * triangle + 7])) == pytest.approx(
        6
    )  # blind to where a group lies


def test_diversity_needs_two_samples():
    with pytest.raises(ValueError, match="n = 1"):
        diversity(torch.zeros(4, 1, 8))
