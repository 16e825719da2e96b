"""Evaluate a model that edits on `shapes`: was the instruction followed, is the rest unchanged?"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.evaluation import kinds, results
from distill.evaluation.shapes import BATCH, VARIETY, Shapes
from distill.sampling import seeded
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.progress import Bar
from distill.worlds.shapes.edit_judge import EditJudge, judging_edits, rendered
from distill.worlds.shapes.edits import Edit
from distill.worlds.shapes.judge import Judge

FIXED_PROTOCOL = {
    "student guidance": "none",
    "feature network": "reader of shapes, 96 features",
    "reference": "renders of the true targets",
}


@dataclass(frozen=True, kw_only=True)
class EditedShapes(Shapes):
    """The protocol of `Shapes` for edits, whose scores `EditJudge` describes.

    diversity: over answers to instructions that add an object.

    Args:
        prompts: number of edits, every task in turn.
        image_guidance: the teacher's, by the source picture.
    """

    any_size: ClassVar[bool] = False
    image_guidance: float = 1.5

    def _check_kind(self, teacher: PipelineTeacher) -> None:
        kinds.check_edits(teacher)

    def count(self) -> int:
        return self.prompts + len(_adding(judging_edits(self.prompts, seed=self.seed))) * VARIETY[1]

    def fixed(self) -> dict[str, Any]:
        return {**FIXED_PROTOCOL, "teacher image guidance": self.image_guidance}

    def _evaluate(
        self, judge: Judge, teacher: PipelineTeacher, sample: Callable[..., Tensor], bar: Bar
    ) -> tuple[dict, Tensor]:
        scorer, edits = EditJudge(judge), judging_edits(self.prompts, seed=self.seed)
        start = time.monotonic()
        pictures = edited(teacher, sample, edits, range(len(edits)), bar)
        seconds = (time.monotonic() - start) / len(edits)
        each, adding = VARIETY[1], _adding(edits)
        scores, outcomes = scorer.scores_and_outcomes(pictures, edits)
        row = {**scores, "seconds_per_image": seconds, results.OUTCOMES: results.packed(outcomes)}
        if adding:
            repeated = [edit for edit in adding for _ in range(each)]
            seeds = range(10_000, 10_000 + len(repeated))
            varied = edited(teacher, sample, repeated, seeds, bar).unflatten(0, (-1, each))
            row["diversity"] = scorer.diversity(varied, adding, seed=self.seed)
        return row, pictures


def _adding(edits: Sequence[Edit]) -> list[Edit]:
    """The first edits that add an object, each of which is answered several times."""
    return [edit for edit in edits if edit.task == "add"][: VARIETY[0]]


@torch.no_grad()
def edited(
    teacher: PipelineTeacher,
    sample: Callable[..., Tensor],
    edits: Sequence[Edit],
    seeds: Sequence[int],
    bar: Bar,
) -> Tensor:
    """The answer to each edit by each seed: pixels [N, 3, 64, 64] in [-1, 1], on the CPU."""
    parts = []
    for start in range(0, len(edits), BATCH):
        part = edits[start : start + BATCH]
        source = rendered([edit.source for edit in part]).to(teacher.device)
        cond = teacher.embed([edit.instruction for edit in part])
        cond = replace(cond, image=teacher.image_of({"source": source}))
        x0 = sample(cond, seeded(seeds[start : start + BATCH]))
        parts.append(teacher.decode(x0).clamp(-1, 1).cpu())
        bar.advance(len(part))
    return torch.cat(parts)
