"""Evaluation of edited `shapes`: was the instruction followed, and is the rest unchanged?

The reader answers both in words; differences from the source say it in pixels. An instruction
leaves free where an added object stands, so only the pixels of the other objects count there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distill.core import distances
from distill.worlds.shapes.edits import TASKS, Edit, redrawn, sample_edit
from distill.worlds.shapes.judge import SEEDS, Judge, Renders, as_saved
from distill.worlds.shapes.reader import targets
from distill.worlds.shapes.render import coverage, render
from distill.worlds.shapes.world import SIDE, Scene

REACH = 1.25  # an object is inside this many of its radii, as in `render`
INSIDE = 1.0  # coverage of the pixels that are an object's alone
Answers = dict[str, int]  # question -> index of the answer


def judging_edits(n: int, *, seed: int) -> list[Edit]:
    """n edits that training does not draw; every task in turn."""
    tasks = list(TASKS)
    return [sample_edit(SEEDS + seed, i, tasks[i % len(tasks)]) for i in range(n)]


def rendered(scenes: Sequence[Scene]) -> Tensor:
    """Pixels [N, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Wanted:
    """What the reader must answer for an edit.

    followed: what the instruction asks for. before: the same questions in the source, where it
    answers them. kept: all else that the source shows, in the places of the target, or of the
    source if the number of objects has not changed.
    """

    followed: Answers
    before: Answers
    kept: tuple[Answers, Answers]


def wanted(edit: Edit) -> Wanted:
    """The answers that an edit asks for.

    Sizes are asked only while the number of objects is the same and below three: they are relative
    to it.
    """
    before, after = (_answers(scene) for scene in (edit.source, edit.target))
    counts = {len(edit.source.things), len(edit.target.things)}
    if len(counts) > 1 or max(counts) > 2:
        before, after = _unsized(before), _unsized(after)
    named = {q for q in after if _slot(q) in edit.of_target}
    if edit.task == "background":
        named = {"background"}
    elif len(counts) > 1:
        named |= {"count", "axis"} & after.keys()
    elif edit.task != "swap":
        named = {q for q in named if before[q] != after[q]}
    of_source = {q for q in before if _slot(q) in edit.of_source}
    lost = of_source if len(counts) > 1 else named
    kept_after = {q: answer for q, answer in after.items() if q not in named}
    kept_before = {
        q: answer for q, answer in before.items() if q not in lost and q not in ("count", "axis")
    }
    return Wanted(
        followed={q: after[q] for q in named},
        before={q: before[q] for q in named & before.keys()},
        kept=(kept_after, kept_before),
    )


@dataclass(frozen=True)
class EditJudge:
    """Evaluates edited pictures [N, 3, 64, 64] against their edits."""

    judge: Judge

    @classmethod
    def load(cls) -> EditJudge:
        return cls(Judge.load())

    def __call__(self, pixels: Tensor, edits: Sequence[Edit]) -> dict[str, float]:
        """All scores but diversity of pixels [N, 3, 64, 64] in [-1, 1], one per edit, at least
        four.

        followed, kept: shares of pictures in which the reader sees what the instruction asks for,
        and everything else as in the source; edited: both. stuck: the share in which what the
        instruction names is as in the source. kept_error: mean difference in pixels from the
        source, in [0, 1], where nothing should change. change: the mean difference from the
        source where something should, relative to the true target's; 0 is the source. frechet: to
        renders of the true targets. Each task has its own `followed`.
        """
        return self.scores_and_outcomes(pixels, edits)[0]

    def scores_and_outcomes(
        self, pixels: Tensor, edits: Sequence[Edit]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The scores, and for those that are means over pictures the outcome of each [N]."""
        outcomes = self.outcomes(pixels, edits)
        scores = {name: _mean(values) for name, values in outcomes.items()}
        for task in dict.fromkeys(edit.task for edit in edits):
            of_task = torch.tensor([edit.task == task for edit in edits])
            scores[f"followed_{task}"] = _mean(outcomes["followed"][of_task])
        features, _ = self.judge.read(pixels)
        real = self._targets(edits).features
        return scores | {"frechet": distances.frechet(features, real)}, outcomes

    def _targets(self, edits: Sequence[Edit]) -> Renders:
        """The true targets; every row of an evaluation asks for the same."""
        return self.judge.renders(
            ("targets", *edits), lambda: rendered([edit.target for edit in edits])
        )

    def outcomes(self, pixels: Tensor, edits: Sequence[Edit]) -> dict[str, Tensor]:
        """The outcome of each picture [N], for all scores that are means over pictures."""
        if len(pixels) != len(edits):
            raise ValueError(
                f"the judge needs one edit per picture, got {len(edits)} for {len(pixels)} pictures"
            )
        _, answers = self.judge.read(pixels)
        read = [{q: int(x[i]) for q, x in answers.items()} for i in range(len(edits))]
        asked = [wanted(edit) for edit in edits]
        followed = [_agrees(found, want.followed) for found, want in zip(read, asked, strict=True)]
        kept = [
            any(_agrees(found, each) for each in want.kept)
            for found, want in zip(read, asked, strict=True)
        ]
        stuck = [
            not right and _agrees(found, want.before)
            for found, want, right in zip(read, asked, followed, strict=True)
        ]
        right, rest = torch.tensor(followed).double(), torch.tensor(kept).double()
        in_words = {"followed": right, "kept": rest, "edited": right * rest}
        in_words["stuck"] = torch.tensor(stuck).double()
        return in_words | self._in_pixels(pixels, edits)

    def _in_pixels(self, pixels: Tensor, edits: Sequence[Edit]) -> dict[str, Tensor]:
        source, target = rendered([edit.source for edit in edits]), self._targets(edits).pixels
        made = (as_saved(pixels) - source).abs().mean(1) / 2  # [N, 64, 64] in [0, 1]
        true = (target - source).abs().mean(1) / 2
        keep = torch.from_numpy(np.stack([unchanged(edit) for edit in edits]))
        area = torch.from_numpy(np.stack([changed(edit) for edit in edits]))
        return {
            "kept_error": _mean_where(made, keep),
            "change": _mean_where(made, area) / _mean_where(true, area),
        }

    def diversity(self, groups: Tensor, edits: Sequence[Edit], *, seed: int = 0) -> float:
        """Spread of groups [G, n, 3, 64, 64] of answers to one edit, relative to the spread of what
        it leaves free.

        Only edits that add an object leave much free, so all must be of that task.
        """
        n = groups.shape[1]
        free = [
            redrawn(np.random.default_rng([SEEDS + seed, i, k, 4]), edit).target
            for i, edit in enumerate(edits)
            for k in range(n)
        ]
        both = (
            distances.diversity(self.judge.read(x)[0].unflatten(0, (-1, n)))
            for x in (groups.flatten(0, 1), rendered(free))
        )
        of_answers, of_truth = both
        return of_answers / of_truth


def unchanged(edit: Edit) -> np.ndarray:
    """Where the picture must stay as it is, bool [64, 64]."""
    if edit.task not in ("background", "add"):
        return ~changed(edit)
    # A new background is seen through edges; an added object may hide any of the background.
    inside = [coverage(thing) >= INSIDE for thing in edit.source.things]
    return np.logical_or.reduce(inside)


def changed(edit: Edit) -> np.ndarray:
    """Where the true target may differ from the source, bool [64, 64]."""
    if edit.task == "background":
        covered = [coverage(thing) > 0 for thing in edit.source.things]
        return ~np.logical_or.reduce(covered)
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    things = [edit.source.things[i] for i in edit.of_source]
    things += [edit.target.things[i] for i in edit.of_target]
    discs = [np.hypot(xs - t.x, ys - t.y) <= REACH * t.radius + 1 for t in things]
    return np.logical_or.reduce(discs)


def _answers(scene: Scene) -> Answers:
    return {q: int(index) for q, (index,) in targets([scene]).items() if index >= 0}


def _unsized(answers: Answers) -> Answers:
    return {q: answer for q, answer in answers.items() if not q.startswith("size")}


def _slot(question: str) -> int:
    """The object that a question is about; -1 for those about the scene."""
    return int(question[-1]) if question[-1].isdigit() else -1


def _agrees(found: Answers, want: Answers) -> bool:
    return all(found[question] == answer for question, answer in want.items())


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values [N, H, W] over each sample's mask [N, H, W]: [N]."""
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()
