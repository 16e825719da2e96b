"""Categories of prompts, as PartiPrompts and DrawBench have them: scores of each, with intervals.

    row["categories"]   {"names": ["Animals", "Arts"], "of": "0 0 1"}: of every prompt
    row["by_category"]  {"Animals": {"prompts": 2, "few": true, "clip_score":
                         {"value": 0.3, "low": 0.2, "high": 0.4}}}

Intervals are over prompts. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distill.evaluation.results import MOST_PROMPTS
from distill.evaluation.statistics import Interval, Sample, mean_interval

LABELS, SCORES = "categories", "by_category"  # keys of a row
FEW = 20  # ours: of 20 prompts a 95 % interval covers the mean 93 to 95 times in 100, of 10 only 90
MOST = 200  # ours: categories of a list, PartiPrompts has 12
# Means of a number of each prompt. Of a distance a category has only its share of the whole.
OF_PROMPTS = ("prompt_accuracy", "clip_score", "clip_score_b32", "pick_score", "hps")
OF_PROMPTS += ("image_reward", "aesthetic")


def check_categories(labels: Sequence[str]) -> None:
    """Raise ValueError for more than MOST categories."""
    if len(set(labels)) > MOST:
        what = f"the table has {len(set(labels))} categories, and {MOST} is the most"
        raise ValueError(f"metrics.category: {what}; name another column")


def with_categories(
    row: Mapping[str, Any], outcomes: Mapping[str, Sequence[float]], labels: Sequence[str]
) -> dict[str, Any]:
    """The row with the categories of its prompts, and the scores of each. `labels` may be empty."""
    if not labels or any(len(numbers) != len(labels) for numbers in outcomes.values()):
        return dict(row)
    names = list(dict.fromkeys(labels))
    numbers = {name: i for i, name in enumerate(names)}
    of = " ".join(str(numbers[label]) for label in labels)
    found = {name: _scores(outcomes, places) for name, places in places_of(labels).items()}
    return {**row, LABELS: {"names": names, "of": of}, SCORES: found}


def _scores(outcomes: Mapping[str, Sequence[float]], places: np.ndarray) -> dict[str, Any]:
    scores: dict[str, Any] = {"prompts": len(places), "few": len(places) < FEW}
    for key in OF_PROMPTS:
        if key in outcomes:
            numbers = np.asarray(outcomes[key], float)[places]
            interval = mean_interval(Sample([numbers.mean()], numbers[None], fixed=True))
            scores[key] = {n: getattr(interval, n) for n in ("value", "low", "high")}
    return scores


def places_of(labels: Iterable[str]) -> dict[str, np.ndarray]:
    """The numbers of the prompts of each category, in the order of their first."""
    found: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        found.setdefault(label, []).append(i)
    return {label: np.array(places) for label, places in found.items()}


def within(sample: Sample, places: np.ndarray) -> Sample:
    """The sample of these prompts alone; it must have outcomes."""
    assert sample.outcomes is not None
    outcomes = sample.outcomes[:, places]
    return Sample(outcomes.mean(1).tolist(), outcomes, sample.fixed)


def interval_within(sample: Sample, places: np.ndarray) -> Interval:
    """The mean of these prompts with its interval, over seeds and prompts."""
    return mean_interval(within(sample, places))


def labels_of(row: Mapping[str, Any]) -> list[str]:
    """The category of every prompt; [] if the row has none. Raises ValueError for damage."""
    entry = row.get(LABELS)
    if entry is None:
        return []
    names, of = (entry.get(k) for k in ("names", "of")) if isinstance(entry, Mapping) else (0, 0)
    whole = isinstance(names, list) and all(isinstance(n, str) for n in names)
    if not whole or not isinstance(of, str) or len(names) > MOST:
        raise ValueError("categories must be names and a text of numbers; evaluate anew")
    words = of.split(maxsplit=MOST_PROMPTS)
    if not all(w.isdecimal() and len(w) < 5 and int(w) < len(names) for w in words):
        raise ValueError("categories hold a number without a name; evaluate anew")
    return [names[int(word)] for word in words]


def marked(name: str, count: int) -> str:
    """The name of a category, with a mark if it has few prompts."""
    return f"{name} (few)" if count < FEW else name


NOTE = f"(few): fewer than {FEW} prompts, too few for a verdict."
