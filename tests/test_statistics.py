"""Intervals over seeds and prompts, held against simulated runs whose true difference is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from distill.core.distances import frechet, frechet_by_sample
from distill.evaluation.statistics import (
    RESAMPLES,
    Sample,
    _student_t,
    difference_interval,
    mean_interval,
    paired_interval,
)

TRIALS = 300
SEEDS = 3


def simulated(rng, mean, prompts, *, of_seeds, of_rest):
    """Outcomes [SEEDS, P] with effects of seeds and of the rest; `prompts` [P] are theirs."""
    seeds = rng.normal(0, of_seeds, (SEEDS, 1))
    return mean + prompts + seeds + rng.normal(0, of_rest, (SEEDS, len(prompts)))


@pytest.mark.parametrize(
    ("of_seeds", "of_others", "of_prompts", "of_rest"),
    [(0.05, 0.05, 1.0, 1.0), (0.0, 0.0, 0.3, 1.0), (0.3, 0.06, 0.3, 0.5), (0.05, 0.2, 2.0, 0.1)],
)
def test_the_interval_of_a_difference_covers_the_true_one(of_seeds, of_others, of_prompts, of_rest):
    """Two groups of three seeds, on prompts that are hard for both (2.0) and for one of them."""
    rng, covered, wide = np.random.default_rng(7), 0, 0
    for _ in range(TRIALS):
        hard = rng.normal(0, 2.0, 200)
        own = rng.normal(0, of_prompts, (2, 200))
        a = simulated(rng, 0.4, hard + own[0], of_seeds=of_seeds, of_rest=of_rest)
        b = simulated(rng, 0.1, hard + own[1], of_seeds=of_others, of_rest=of_rest)
        found = difference_interval(Sample(a.mean(1), a), Sample(b.mean(1), b))
        covered += found.low <= 0.3 <= found.high
        wide += found.high - found.low
    assert 0.93 <= covered / TRIALS <= 0.97
    # Unpaired, the prompts that are hard for both would make it much wider than this.
    variance = (of_seeds**2 + of_others**2) / 3 + 2 * (of_prompts**2 + of_rest**2 / 3) / 200
    assert wide / TRIALS < 2 * 4.3 * variance**0.5


def test_the_interval_of_a_mean_covers_the_true_one():
    """Right or wrong at every prompt: the logit has an effect of the seed and one of the prompt."""
    rng, covered = np.random.default_rng(3), 0
    true = np.mean(1 / (1 + np.exp(-1 - rng.normal(0, (1 + 0.2**2) ** 0.5, 10**6))))
    for _ in range(TRIALS):
        logits = 1 + rng.normal(0, 1, 300) + rng.normal(0, 0.2, (SEEDS, 1))
        right = (rng.random((SEEDS, 300)) < 1 / (1 + np.exp(-logits))).astype(float)
        found = mean_interval(Sample(right.mean(1), right))
        covered += found.low <= true <= found.high
    assert 0.93 <= covered / TRIALS <= 0.97


@pytest.mark.parametrize("freedom", [2.0, 3.37, 4.0, 30.0])
def test_the_seeds_part_is_student_s_t(freedom):
    found = np.quantile(_student_t(freedom), [0.025, 0.5, 0.975])
    assert len(_student_t(freedom)) == RESAMPLES
    expected = stats.t.ppf([0.025, 0.5, 0.975], freedom)
    assert found == pytest.approx(expected, rel=0.01, abs=0.002)


def test_a_single_run_has_an_interval_over_prompts_alone():
    right = np.repeat([[0.0, 1.0]], 200, axis=0).reshape(1, -1)
    found = mean_interval(Sample([0.5], right))
    assert found.over == ("prompts",)
    low, high = 0.5 + np.array([-1, 1]) * 1.96 * 0.5 / 20  # the binomial's, of 400 prompts
    assert (found.low, found.high) == (
        pytest.approx(low, abs=0.004),
        pytest.approx(high, abs=0.004),
    )


def test_without_outcomes_the_interval_is_over_seeds_or_there_is_none():
    three, one = Sample([0.1, 0.2, 0.3]), Sample([0.2])
    low, high = stats.t.interval(0.95, 2, loc=0.2, scale=0.1 / 3**0.5)
    found = mean_interval(three)
    assert found.over == ("seeds",)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))
    for a, b in ((three, one), (one, three), (one, one)):
        nothing = difference_interval(a, b)
        assert (nothing.low, nothing.high, nothing.over) == (None, None, ())
        assert not nothing.excludes_zero
    # a teacher has no seeds to differ
    assert difference_interval(three, Sample([0.2], fixed=True)).over == ("seeds",)


def test_outcomes_of_other_numbers_of_prompts_are_not_paired():
    a, b = (np.ones((3, n)) * [[0.1], [0.2], [0.4]] for n in (10, 20))
    found = difference_interval(Sample(a.mean(1), a), Sample(b.mean(1), b))
    assert found.over == ("seeds",)


def test_other_steps_of_the_same_runs_are_paired_by_seed():
    a, b = Sample([0.5, 0.7, 0.9]), Sample([0.4, 0.61, 0.81])
    low, high = stats.t.interval(
        0.95, 2, loc=0.28 / 3, scale=np.std([0.1, 0.09, 0.09], ddof=1) / 3**0.5
    )
    found = paired_interval(a, b)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))
    assert not difference_interval(a, b).excludes_zero  # as of other runs


def test_other_seeds_are_not_paired():
    """As many runs have the other number of steps, but not the same."""
    a = Sample([0.5, 0.7, 0.9], seeds=("0", "1", "2"))
    b = Sample([0.4, 0.61, 0.81], seeds=("0", "1", "3"))
    assert paired_interval(a, b) == difference_interval(a, b)
    assert paired_interval(a, replace(b, seeds=a.seeds)).excludes_zero


def test_a_factor_scales_the_second():
    a, b = Sample([0.9, 0.91, 0.92]), Sample([1.0], fixed=True)
    assert difference_interval(a, b, times=0.9).value == pytest.approx(0.01)


@pytest.mark.parametrize("paired", [False, True])
def test_the_frechet_distance_of_a_resampled_set_is_the_mean_of_its_samples_numbers(paired):
    """Held against a real bootstrap, whose spread it must give."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 8, generator=generator) for _ in range(2))
    a = 1.5 * a + 0.4
    numbers = frechet_by_sample(a, b, paired=paired)
    assert float(numbers.mean()) == pytest.approx(frechet(a, b), rel=1e-9)
    linear, real = [], []
    for _ in range(300):
        chosen = torch.randint(0, 500, (500,), generator=generator)
        linear.append(float(numbers[chosen].mean()))
        real.append(frechet(a[chosen], b[chosen] if paired else b))
    assert np.corrcoef(linear, real)[0, 1] > 0.98
    assert np.std(linear) == pytest.approx(np.std(real), rel=0.06)


@pytest.mark.parametrize(("count", "others"), [(7, 8), (8, 7), (7, 40), (40, 7), (2, 2)])
def test_fewer_samples_than_features_have_numbers_too(count, others):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 20, generator=generator) for n in (count, others))
    numbers = frechet_by_sample(a, b, paired=count == others)
    assert numbers.shape == (count,)
    assert float(numbers.mean()) == pytest.approx(frechet(a, b), rel=1e-6)
