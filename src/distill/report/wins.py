"""Pairwise win rates and ELO ratings of models that answered the same prompts. NumPy only.

As the user study of ADD (arXiv 2311.17042) has it: every rating starts at START, a vote moves both
by K (S - E), and the mean is taken over bootstrap samples of the prompts in random orders.
"""

from collections.abc import Mapping

import numpy as np

from distill.evaluation.statistics import LEVEL, Interval, Sample, mean_interval

K, START = 1.0, 1000.0  # ADD
SCALE = 400.0  # Elo's own: ten times the odds
ORDERS = 1000  # ours: bootstrap samples, each in an order of its own


def votes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Votes of a judge by its scores of one shape: 1 where a is higher, 0 where b is, 0.5 for ties.

    Raises ValueError for scores of different shapes, or that are not finite.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"scores of shapes {a.shape} and {b.shape}: votes need the same prompts")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("scores that are not finite cannot be compared; score the pictures anew")
    return (1 + np.sign(a - b)) / 2


def win_rate(found: np.ndarray) -> Interval:
    """The rate at which a wins, a tie counting half, of votes [S, P] by pair of seeds and prompt.

    Both are resampled. One pair of seeds leaves the prompts alone, and the interval then speaks of
    these two models, not of their settings.
    """
    one = len(found) == 1
    interval = mean_interval(Sample(found.mean(1).tolist(), found, fixed=one))
    if interval.low is None or interval.high is None:
        return interval
    low, high = max(0.0, interval.low), min(1.0, interval.high)
    return Interval(interval.value, low, high, interval.over)


def elo(found: Mapping[tuple[str, str], np.ndarray], seed: int = 0) -> dict[str, Interval]:
    """Ratings by name from votes [P] of the first name of each pair against the second.

    With E = 1 / (1 + 10^((R_b - R_a) / 400)) a vote S moves R_a by K (S - E), and R_b by as much
    the other way. Every pair has the same prompts, which are resampled together.

    Raises ValueError if there are no votes, or pairs of different numbers of prompts.
    """
    pairs = list(found)
    counts = {len(found[pair]) for pair in pairs}
    if len(counts) != 1 or counts == {0}:
        raise ValueError("votes: ratings need the same prompts, at least one, for every pair")
    names = sorted({name for pair in pairs for name in pair})
    sides = np.array([[names.index(a), names.index(b)] for a, b in pairs])
    scores = np.stack([found[pair] for pair in pairs])
    ratings = _rated(sides, scores, len(names), np.random.default_rng(seed))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(ratings, [tail, 1 - tail], axis=0)
    return {
        name: Interval(float(ratings[:, i].mean()), float(low[i]), float(high[i]), ("prompts",))
        for i, name in enumerate(names)
    }


def _rated(
    sides: np.ndarray, scores: np.ndarray, models: int, rng: np.random.Generator
) -> np.ndarray:
    """Ratings [ORDERS, models] of sides [pairs, 2] and scores [pairs, P]."""
    pairs, prompts = scores.shape
    chosen = rng.integers(0, prompts, (ORDERS, prompts))
    # a vote is a pair and a prompt; all pairs of a prompt come with it
    matches = (np.arange(pairs)[:, None, None] * prompts + chosen).transpose(1, 0, 2)
    matches = rng.permuted(matches.reshape(ORDERS, -1), axis=1)
    ratings, rows = np.full((ORDERS, models), START), np.arange(ORDERS)
    for match in matches.T:
        a, b = sides[match // prompts].T
        expected = 1 / (1 + 10 ** ((ratings[rows, b] - ratings[rows, a]) / SCALE))
        moved = K * (scores[match // prompts, match % prompts] - expected)
        ratings[rows, a] += moved
        ratings[rows, b] -= moved
    return ratings
