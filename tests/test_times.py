"""Distributions of noise levels: their frequencies, percentiles and bounds."""

import pytest
import torch

from distill.core.times import Discrete, LogitNormal, Refinement, Uniform

MANY = 200_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(t: torch.Tensor, levels: list[float]) -> list[float]:
    counts = [(t == level).double().mean().item() for level in levels]
    assert sum(counts) == pytest.approx(1)  # nothing but the levels
    return counts


def test_discrete_follows_its_odds_and_its_warmup():
    levels = [1, 0.75, 0.5, 0.25]
    times = Discrete(levels, [7, 1, 1, 1], warmup_odds=[0, 0, 0.5, 0.5], warmup_steps=500)
    tolerance = 5 * (0.25 / MANY) ** 0.5  # five standard deviations of a frequency, at most
    for step in (0, 499):
        assert frequencies(times.sample(MANY, step, seeded()), levels) == pytest.approx(
            [0, 0, 0.5, 0.5], abs=tolerance
        )
    for step in (500, 100_000):
        expected = pytest.approx([0.7, 0.1, 0.1, 0.1], abs=tolerance)
        assert frequencies(times.sample(MANY, step, seeded()), levels) == expected


def test_discrete_without_warmup_is_the_same_at_every_step():
    times = Discrete((1.0, 0.5), (1, 3), warmup_odds=(1, 0))
    assert torch.equal(times.sample(50, 0, seeded()), times.sample(50, 9, seeded()))
    assert 0.5 in times.sample(50, 0, seeded())


def test_logit_normal_percentiles_of_the_paper():
    t = LogitNormal(m=1, s=1).sample(MANY, 0, seeded())
    low, median, high = t.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    # sigmoid(1 + z) at the normal quantiles z = -1.645, 0, 1.645: .344, .731, .934; papers.md
    # section 2.2
    assert low == pytest.approx(0.344, abs=0.005)
    assert median == pytest.approx(0.731, abs=0.003)
    assert high == pytest.approx(0.934, abs=0.002)
    assert (t > 0.5).double().mean() == pytest.approx(0.841, abs=0.005)


def test_logit_normal_is_normal_in_logits():
    u = (torch.logit(LogitNormal(m=-0.6, s=1.6).sample(MANY, 0, seeded()).double()) + 0.6) / 1.6
    assert u.mean().item() == pytest.approx(0, abs=0.015)
    assert u.std().item() == pytest.approx(1, abs=0.01)


def test_uniform_fills_its_range_evenly():
    t = Uniform(0.2, 0.7).sample(MANY, 0, seeded()).double()
    assert 0.2 < t.min() < 0.201
    assert 0.699 < t.max() <= 0.7 + 1e-7
    assert torch.histc(t, 5, 0.2, 0.7).div(MANY).tolist() == pytest.approx([0.2] * 5, abs=0.006)


def test_level_zero_is_never_drawn(monkeypatch):
    # The least favourable draw that torch.rand can make, in place of waiting for it.
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    assert (Uniform(0, 1).sample(3, 0) > 0).all()


@pytest.mark.parametrize(
    "times", [Discrete([1, 0.5], [1, 1]), LogitNormal(), Uniform()], ids=lambda x: type(x).__name__
)
def test_draws_are_float32_in_range_and_belong_to_the_generator(times):
    t = times.sample(1000, 3, seeded(1))
    assert t.shape == (1000,)
    assert t.dtype == torch.float32
    assert ((t > 0) & (t <= 1)).all()
    assert torch.equal(t, times.sample(1000, 3, seeded(1)))
    assert not torch.equal(t, times.sample(1000, 3, seeded(2)))
    torch.manual_seed(5)
    first = times.sample(1000, 3)
    torch.manual_seed(5)
    assert torch.equal(first, times.sample(1000, 3))
    before = torch.get_rng_state()
    times.sample(10, 0, seeded())
    assert torch.equal(
        before, torch.get_rng_state()
    )  # its own generator leaves the global one alone


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Discrete([1, 0], [1, 1]), r"must be levels in \(0, 1\]"),
        (lambda: Discrete([999, 499], [1, 1]), r"must be levels in \(0, 1\]"),
        (lambda: Discrete([], []), r"must be levels in \(0, 1\]"),
        (lambda: Discrete([1, 0.5], [1]), "must be 2 numbers, .* and are 1"),
        (lambda: Discrete([1, 0.5], [0, 0]), "not all 0"),
        (lambda: Discrete([1, 0.5], [2, -1]), "0 or more"),
        (lambda: Discrete([1, 0.5], [1, float("nan")]), "finite"),
        (
            lambda: Discrete([1, 0.5], [1, 1], [1, 1, 1], 5),
            "warmup_odds=.*: must be 2 numbers, .* and are 3",
        ),
        (lambda: Discrete([1, 0.5], [1, 1], warmup_steps=5), "come with warmup_odds"),
        (lambda: Discrete([1, 0.5], [1, 1], [1, 0], -1), "warmup_steps=-1"),
        (lambda: LogitNormal(s=0), "s=0: must be finite and above 0"),
        (lambda: LogitNormal(m=float("inf")), "m=inf: must be finite"),
        (lambda: Uniform(0.5, 0.5), "low=0.5: must be below high=0.5"),
        (lambda: Uniform(0, 1.5), "both from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refinement_forces_one_step_and_draws_the_rest_from_one_on():
    """With four numbers of steps, n = 1 has .5 + .5 / 4, and each step i of any n a share of
    .5 / 4 / n.
    """
    levels = [[1.0], [1.0, 0.5], [1.0, 0.7, 0.3], [1.0, 0.75, 0.5, 0.25]]
    refinement, generator, many = Refinement(levels, [0, 0, 0, 0], 0.5), seeded(), 20_000
    drawn = [refinement.draw(0, generator) for _ in range(many)]
    expected: dict[tuple, float] = {}
    for n, steps in enumerate(levels, 1):
        for i in range(n):
            key = (tuple(steps[:i]), steps[i])
            expected[key] = expected.get(key, 0.0) + 0.5 * (n == 1) + 0.5 / 4 / n
    assert {(tuple(earlier), trained) for earlier, trained in drawn} == set(expected)
    for key, share in expected.items():
        found = sum((tuple(earlier), trained) == key for earlier, trained in drawn) / many
        assert found == pytest.approx(share, abs=0.02)
