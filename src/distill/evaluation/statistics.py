"""Intervals of means and of differences over seeds and prompts. NumPy only.

A score of seed s at prompt p is taken as

    y_sp = mean + seed_s + prompt_p + rest_sp

and a group of runs has the mean over its seeds and prompts. Two sources make another such mean
differ: other seeds and other prompts. The interval has a part for each.

- Prompts are resampled (bootstrap, RESAMPLES times), those of both groups of a difference together:
  runs of one protocol have the same prompts and noise. What the seeds' part counts already, `rest`
  over few seeds, is taken out of the resampled deviations before (rescaled as in Carpenter,
  Goldstein and Rasbash 2003).
- Seeds are few: resampling three of them gives intervals that are much too short. Their part is
  drawn from Student's t, for two groups with the degrees of freedom of Welch (1947).

`tests/test_statistics.py` holds the coverage against simulated runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

RESAMPLES = 4000  # ours: the ends of an interval vary by 2 % of its length
LEVEL = 0.95
CHUNK = 2**22  # ours: weights in memory at a time
FEW = 1000  # ours: prompts up to which the weights are kept for the next interval, 16 MB


@dataclass(frozen=True)
class Sample:
    """One measure of a group of runs, or of a teacher.

    Args:
        scores: one for each seed [S].
        outcomes: the number of each prompt, by seed [S, P], whose means over prompts are the
            scores; None if they were not recorded.
        fixed: a model without seeds, a teacher: S is 1.
        seeds: the name of each seed, to pair two samples of the same runs.
    """

    scores: Sequence[float]
    outcomes: np.ndarray | None = None
    fixed: bool = False
    seeds: Sequence[object] = ()

    @property
    def has_seeds(self) -> bool:
        return not self.fixed and len(self.scores) > 1


@dataclass(frozen=True)
class Interval:
    """A mean, or a difference of means, with its 95 % interval.

    `over` has what was resampled, of "seeds" and "prompts". Without any there is no interval, and
    `low` and `high` are None.
    """

    value: float
    low: float | None
    high: float | None
    over: tuple[str, ...]

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and self.low * self.high > 0


def mean_interval(sample: Sample) -> Interval:
    """The interval of a group's mean."""
    return _interval([(1.0, sample)])


def difference_interval(a: Sample, b: Sample, times: float = 1.0) -> Interval:
    """The interval of mean(a) - times * mean(b).

    Prompts are resampled if both have outcomes of the same prompts.
    """
    return _interval([(1.0, a), (-times, b)])


def paired_interval(a: Sample, b: Sample, times: float = 1.0) -> Interval:
    """The same for two samples of the same runs, at other numbers of steps: seeds are paired.

    Samples of other seeds are compared as those of other runs.
    """
    if len(a.scores) != len(b.scores) or list(a.seeds) != list(b.seeds):
        return difference_interval(a, b, times)
    scores = [x - times * y for x, y in zip(a.scores, b.scores, strict=True)]
    both = (
        a.outcomes is not None and b.outcomes is not None and a.outcomes.shape == b.outcomes.shape
    )
    outcomes = a.outcomes - times * b.outcomes if both else None  # type: ignore[operator]
    return mean_interval(Sample(scores, outcomes, a.fixed and b.fixed))


def _interval(terms: Sequence[tuple[float, Sample]]) -> Interval:
    value = float(sum(c * np.mean(sample.scores) for c, sample in terms))
    seeds, prompts = _seeds_part(terms), _prompts_part(terms)
    parts = {"seeds": seeds, "prompts": prompts}
    over = tuple(name for name, part in parts.items() if part is not None)
    # A group of one seed, beside another of several, leaves the seeds' part unknown.
    unknown = any(not s.fixed and len(s.scores) < 2 for _, s in terms)
    if "prompts" not in over and (unknown or not over):
        return Interval(value, None, None, ())
    if unknown:
        over = ("prompts",)
    draws = value + sum(part for name, part in parts.items() if name in over and part is not None)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(value, float(low), float(high), over)


def _seeds_part(terms: Sequence[tuple[float, Sample]]) -> np.ndarray | None:
    """Draws [RESAMPLES] of the deviation by other seeds; None without several seeds."""
    found = [(c, np.asarray(s.scores, float)) for c, s in terms if s.has_seeds]
    if not found:
        return None
    variances = np.array([c**2 * x.var(ddof=1) / len(x) for c, x in found])
    freedoms = np.array([len(x) - 1 for _, x in found])
    total = variances.sum()
    if total == 0:
        return np.zeros(RESAMPLES)
    # Welch (1947). The more usual form of Satterthwaite covers 96.6 % with three seeds a group and
    # equal variances; this one 93 to 96 %, at any ratio of them.
    freedom = total**2 / (variances**2 / (freedoms + 2)).sum() - 2
    freedom = float(np.clip(freedom, freedoms.min(), freedoms.sum()))
    return np.sqrt(total) * _student_t(round(freedom, 3))


@cache
def _student_t(freedom: float) -> np.ndarray:
    """RESAMPLES values of Student's t at evenly spaced probabilities, in random order."""
    # With x = sqrt(freedom) tan(angle), the density of the angle is proportional to a power of its
    # cosine.
    angles = np.linspace(-np.pi / 2, np.pi / 2, 20001)
    density = np.cos(angles).clip(0) ** (freedom - 1)
    cumulated = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    probabilities = (np.arange(RESAMPLES) + 0.5) / RESAMPLES
    found = np.interp(probabilities, cumulated / cumulated[-1], angles)
    return np.random.default_rng(1).permutation(np.sqrt(freedom) * np.tan(found))


def _prompts_part(terms: Sequence[tuple[float, Sample]]) -> np.ndarray | None:
    """Draws [RESAMPLES] of the deviation by other prompts; None without outcomes of the same
    prompts.
    """
    outcomes = [s.outcomes for _, s in terms]
    known = [x for x in outcomes if x is not None and x.ndim == 2]
    if len(known) < len(terms) or len({x.shape[1] for x in known}) > 1 or known[0].shape[1] < 2:
        return None
    combined = sum(c * x.mean(0) for (c, _), x in zip(terms, known, strict=True))
    deviations = np.asarray(combined - np.mean(combined))
    variance = deviations.var(ddof=1)
    if variance == 0:
        return np.zeros(RESAMPLES)
    rest = sum(
        c**2 * _rest_variance(x) / len(x)
        for (c, sample), x in zip(terms, known, strict=True)
        if sample.has_seeds
    )
    of_prompts = max(0.0, float(variance - rest))
    # the sum of squares of N deviations is N - 1 times the variance
    scale = np.sqrt(of_prompts / variance * len(deviations) / (len(deviations) - 1))
    return scale * _resampled_means(deviations)


def _rest_variance(outcomes: np.ndarray) -> float:
    """The variance of `rest` in outcomes [S, P], S > 1: what neither seed nor prompt explains."""
    rest = outcomes - outcomes.mean(0) - outcomes.mean(1, keepdims=True) + outcomes.mean()
    seeds, prompts = outcomes.shape
    return float((rest**2).sum() / ((seeds - 1) * (prompts - 1)))


def _resampled_means(values: np.ndarray) -> np.ndarray:
    """Means of values [P] over RESAMPLES samples of P with replacement; the same samples for the
    same P.
    """
    if len(values) <= FEW:
        return _few_resamples(len(values)) @ values
    return np.concatenate([part @ values for part in _resamples(len(values))])


@lru_cache(maxsize=4)
def _few_resamples(count: int) -> np.ndarray:
    return np.concatenate(list(_resamples(count)))


def _resamples(count: int) -> Iterator[np.ndarray]:
    """The weights [n, P] of P values in n resampled means, for RESAMPLES in all."""
    rng, rows = np.random.default_rng(0), max(1, CHUNK // count)
    for start in range(0, RESAMPLES, rows):
        size = min(rows, RESAMPLES - start)
        chosen = rng.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        counts = np.bincount(chosen.ravel(), minlength=size * count)
        yield counts.reshape(size, count).astype(np.float32) / count
