"""Win rates and ELO ratings of judges' votes."""

import numpy as np
import pytest

from distill.report.wins import elo, votes, win_rate


def test_a_tie_is_half_a_win() -> None:
    assert votes(np.array([1, 0, 2]), np.array([0, 1, 2])).tolist() == [1, 0, 0.5]


def test_scores_of_other_prompts_or_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="the same prompts"):
        votes(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="not finite"):
        votes(np.array([np.nan]), np.zeros(1))


def test_one_vote_moves_both_by_half_a_point() -> None:
    ratings = elo({("a", "b"): np.array([1.0])})
    assert [ratings[name].value for name in "ab"] == [1000.5, 999.5]


def test_ratings_order_the_models_and_keep_their_sum() -> None:
    rng = np.random.default_rng(0)
    found = {
        pair: (rng.random(60) < rate).astype(float)
        for pair, rate in {("a", "b"): 0.8, ("b", "c"): 0.8, ("a", "c"): 0.95}.items()
    }
    ratings = elo(found)
    assert ratings["a"].value > ratings["b"].value > ratings["c"].value
    assert sum(r.value for r in ratings.values()) == pytest.approx(3000)
    assert all(r.low < r.value < r.high for r in ratings.values())


def test_pairs_of_other_prompts_have_no_ratings() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        elo({("a", "b"): np.ones(3), ("a", "c"): np.ones(4)})


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_interval_covers_the_true_rate(seeds: int) -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        rates = np.clip(0.6 + 0.2 * rng.standard_normal(100) * (rng.random(100) < 0.5), 0, 1)
        shift = 0.05 * rng.standard_normal((seeds, 1)) * (seeds > 1)
        found = (rng.random((seeds, 100)) < rates + shift).astype(float)
        interval = win_rate(found)
        covered += interval.low <= 0.6 <= interval.high
    assert 0.91 <= covered / trials <= 0.99
