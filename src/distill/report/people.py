"""The votes of people: files that a page of `report.blind` has downloaded, joined by its key.

{"page": "4e07408562bedb8b", "votes": [{"prompt": 7, "vote": "left"}, ...]}
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.report.blind import KEY, PAGE
from distill.report.judged import Verdict, verdict
from distill.report.runs import Run
from distill.storage.bounded import MIB, mapping_of
from distill.terminal.shown import shown

PEOPLE = "people"
MOST_BYTES = MIB  # ours: a page of 128 pairs gives 5 KB
LEFT = {"left": 1.0, "right": 0.0, "tie": 0.5}


def people(files: Sequence[Path], groups: Mapping[str, Sequence[Run]], out: Path) -> Verdict:
    """The verdict of these files, one of each person, on the page in `out`.

    The votes on a prompt are averaged over people, and prompts are resampled. Where the runs were
    evaluated on a list with categories, there is a rate of each. Raises ValueError, naming the
    file, for a damaged one, for other runs, and for prompts that the page has not.
    """
    key = _key(out)
    votes: dict[int, list[float]] = {}
    for file in files:
        where = f"votes={file}"
        found = _mapping(file, where, f"download it from {PAGE}, which votes=true writes")
        if found.get("page") != key["page"]:
            what = f"was made with another page than {out / PAGE}"
            raise ValueError(f"{where}: {what}; give the out= of its page")
        for prompt, vote in _votes(found, key["left"], where).items():
            votes.setdefault(prompt, []).append(vote)
    a, b = key["models"]
    first_runs = {group: runs[0].folder.name for group, runs in groups.items()}
    for name, run in zip(key["models"], key["runs"], strict=True):
        if first_runs.get(name.rpartition(", ")[0]) != run:
            what = f"is about {shown(name)} of {shown(run)}, which runs= has not"
            raise ValueError(f"votes={files[0]}: {what}; give the runs of the page")
    voted = sorted(votes)
    means = [np.mean(votes[prompt]) for prompt in voted]
    return verdict(PEOPLE, {(a, b): np.array([means])}, _categories(voted, groups))


def _categories(voted: Sequence[int], groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """The category of each of these prompts, as the evaluations had it; [] if they had none.

    The first run of each group is asked; one evaluated before its list had categories has none.
    """
    rows = (row for runs in groups.values() for row in runs[0].rows)
    known = {tuple(row.categories) for row in rows if row.categories}
    labels = known.pop() if len(known) == 1 else ()
    return [labels[prompt] for prompt in voted] if max(voted) < len(labels) else []


def _mapping(file: Path, where: str, remedy: str) -> dict[str, Any]:
    try:
        return mapping_of(file, MOST_BYTES)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; {remedy}") from None
    except ValueError as error:
        what = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{where}: {what}") from None


def _key(out: Path) -> dict[str, Any]:
    """The checked key of the page in `out`."""
    where, remedy = f"out={out}: {KEY}", "write the page anew by votes=true"
    key = _mapping(out / KEY, where, f"it comes with {PAGE}, give the out= of that")
    names = [key.get(name) for name in ("models", "runs")]
    left = key.get("left")
    whole = isinstance(key.get("page"), str) and isinstance(left, dict)
    for found in names:
        whole = whole and isinstance(found, list) and len(found) == 2
        whole = whole and all(isinstance(name, str) for name in found)
    whole = whole and all(k.isdecimal() and len(k) < 10 and v in (0, 1) for k, v in left.items())
    if not whole:
        raise ValueError(f"{where}: is damaged; {remedy}")
    return {**key, "left": {int(number): first for number, first in left.items()}}


def _votes(found: Mapping[str, Any], left: Mapping[int, int], where: str) -> dict[int, float]:
    """By prompt: 1 where the first model won, 0 where the second did, 0.5 for a tie."""
    listed, votes = found.get("votes"), {}
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{where}: holds no votes; download it anew at the end of the page")
    for entry in listed:
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        vote = entry.get("vote") if isinstance(entry, dict) else None
        if type(prompt) is not int or not isinstance(vote, str) or vote not in LEFT:
            what = f"{shown(entry, 60)} is no vote, a prompt and one of {', '.join(LEFT)}"
            raise ValueError(f"{where}: {what}; download it anew")
        if prompt not in left:
            what = f"has a vote on prompt {shown(prompt, 20)}, which the page has not"
            raise ValueError(f"{where}: {what}; download it anew")
        if prompt in votes:
            raise ValueError(f"{where}: has two votes on prompt {prompt}; download it anew")
        votes[prompt] = LEFT[vote] if left[prompt] == 0 else 1 - LEFT[vote]
    return votes
