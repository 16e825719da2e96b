"""Evaluate a run on `shapes`: student and teacher at several step counts, with the same prompts
and seeds.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import save_image

from distill.core.tensors import fingerprint
from distill.core.types import FILL, Denoiser
from distill.data.masks import Masks
from distill.evaluation import results
from distill.evaluation.judged import check_judged
from distill.evaluation.tables import steps_text
from distill.machine.hardware import precision
from distill.sampling import (
    Consistency,
    FewSteps,
    distilled,
    in_precision,
    possible_steps,
    sampler_of,
    seeded,
)
from distill.sampling.guided import guided
from distill.storage.atomic import write_atomic
from distill.storage.fingerprints import path_fingerprint
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.progress import Bar
from distill.worlds.shapes.frames import LEAST, sides
from distill.worlds.shapes.judge import FRAME, SEEDS, Judge, judging_prompts
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import SIDE, Prompt, draw_scene

BATCH = 32  # pictures at a time; larger batches exceed a CPU's caches and take twice as long
SHOWN = 16  # pictures of each row in the comparison
MASKED = 3  # of the seeds of pictures to fill; the judge's renders have 2
CHECKED, GOOD = 200, 0.95  # ours: renders of another size, and the least share of them read right
VARIETY = (8, 8)  # prompts, pictures of each: for diversity
FIXED_PROTOCOL = {
    "student guidance": "none",
    "feature network": "reader of shapes, 96 features",
    "reference": "fresh renders of the same prompts",
}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The protocol. `guidance` is a many-step teacher's; student and few-step teachers have none.

    Args:
        precision: that of the denoiser.
        size: pixels a side, or [width, height]; None: 64x64.
    """

    any_size: ClassVar[bool] = True
    judges: ClassVar[str] = "shapes"  # of the protocols in `judged`; read from the source

    prompts: int = 400
    student_steps: Sequence[int] = (1, 2, 4)
    teacher_steps: Sequence[int] = (1, 4, 28)
    guidance: float = 3.0
    seed: int = 0
    precision: str = "auto"
    size: int | Sequence[int] | None = None

    def fits(self, teacher: PipelineTeacher) -> None:
        """Raise ValueError for a teacher whose pictures the reader of shapes cannot read, and for
        sizes that the teacher cannot make or the reader does not read well.
        """
        if getattr(teacher, "video", False):
            what = "the reader of shapes reads pictures, and this teacher makes videos"
            raise ValueError(f"metrics: {what}; leave them out by ~metrics")
        side = teacher.latent_shape[-1] * teacher.unit // teacher.patch
        if side != SIDE:
            what = (
                f"the reader of shapes needs pictures of {SIDE} pixels a side, and this teacher's"
                f" have {side}"
            )
            raise ValueError(
                f"metrics: {what}; use metrics=coco5k or prompts, or ~metrics to train"
            )
        if self.size is not None and sides(self.size) != FRAME:
            self._check_size(teacher)
        self._check_kind(teacher)

    def _check_kind(self, teacher: PipelineTeacher) -> None:
        """Raise ValueError for a teacher that does something else than this protocol evaluates."""
        check_judged(self.judges, teacher.image)

    def _check_size(self, teacher: PipelineTeacher) -> None:
        key = f"metrics.size={self.size}"
        if not self.any_size:
            what = f"this protocol has pictures of {SIDE} pixels a side alone"
            raise ValueError(f"{key}: {what}; leave it out")
        teacher.shape_of(self.size, "metrics.size")
        size = sides(self.size)
        if min(size) < LEAST:
            raise ValueError(f"{key}: the largest object needs {LEAST} pixels; take larger sides")
        prompts = judging_prompts(CHECKED, seed=self.seed, size=size)
        found = Judge.load().render_accuracy(prompts, seed=self.seed, size=size)
        if found < GOOD:
            what = f"the reader gets {found:.1%} of {CHECKED} renders of this size right"
            raise ValueError(f"{key}: {what}, too few to judge by; take smaller sides")

    def judging_prompts(self) -> list[Prompt]:
        """The prompts of a row, a picture of each."""
        return judging_prompts(self.prompts, seed=self.seed, size=sides(self.size))

    def __call__(
        self,
        student: Denoiser,
        teacher: PipelineTeacher,
        folder: Path,
        sampler: FewSteps | None = None,
    ) -> list[dict[str, Any]]:
        """Evaluate; write `evaluation.json` and `samples/comparison.png` into `folder`.

        Returns the rows.
        """
        self.fits(teacher)
        judge, rows, strips = Judge.load(), [], []
        for who, n, sample in self.samplers(student, teacher, sampler):
            what = f"evaluating the {who} in {steps_text(n)}"
            with Bar(what, self.count(), unit="image", rate="images") as bar:
                scores, shown = self._evaluate(judge, teacher, sample, bar)
            rows.append({"who": who, "steps": n, **scores})
            strips.append(_squared((shown[:SHOWN] + 1) / 2))
        protocol = {
            "prompts": self.prompts,
            "seed": self.seed,
            **teacher_sampling(self.guidance, teacher),
            "precision": generation_precision(self, teacher),
            **self.fixed(),
        }
        if (size := sides(self.size)) != FRAME:
            # in a key that results of 64x64 have too, which are therefore not compared with these
            protocol["reference"] += ", {} x {} pixels".format(*size)
        protocol |= {"student sampler": str(sampler or Consistency())}
        write_result(folder, protocol, rows, strips, model_fingerprint(folder, student))
        return rows

    def count(self) -> int:
        """The number of pictures of a row, those of the diversity among them."""
        return self.prompts + min(VARIETY[0], self.prompts) * VARIETY[1]

    def fixed(self) -> dict[str, Any]:
        """What the protocol says that is not a setting."""
        return FIXED_PROTOCOL

    def samplers(
        self, student: Denoiser, teacher: PipelineTeacher, sampler: FewSteps | None
    ) -> Iterator[tuple[str, int, Callable[..., Tensor]]]:
        """The rows, as `evaluated_samplers` gives them."""
        shape = teacher.shape_of(self.size, "metrics.size")
        return evaluated_samplers(self, student, teacher, sampler, shape)

    def _evaluate(
        self, judge: Judge, teacher: PipelineTeacher, sample: Callable[..., Tensor], bar: Bar
    ) -> tuple[dict, Tensor]:
        """The scores of one sampler, and its pictures [N, 3, H, W] in [-1, 1]."""
        prompts, generate = self.judging_prompts(), self.generate
        start = time.monotonic()
        images = generate(teacher, sample, prompts, range(len(prompts)), bar)
        seconds = (time.monotonic() - start) / len(prompts)
        groups, each = VARIETY
        repeated = [prompt for prompt in prompts[:groups] for _ in range(each)]
        seeds = range(10_000, 10_000 + len(repeated))
        places = [place for place in range(len(prompts[:groups])) for _ in range(each)]
        varied = generate(teacher, sample, repeated, seeds, bar, places).unflatten(0, (-1, each))
        scores, outcomes = judge.scores_and_outcomes(images, prompts, reference_seed=self.seed)
        scores["diversity"] = judge.diversity(varied, prompts[:groups], reference_seed=self.seed)
        row = {**scores, "seconds_per_image": seconds, results.OUTCOMES: results.packed(outcomes)}
        return row, images

    def generate(self, *args: Any) -> Tensor:
        """The pictures of `generate_pictures`."""
        return generate_pictures(*args)


def _squared(pictures: Tensor) -> Tensor:
    """Pictures [n, 3, H, W] in [0, 1] in the middle of white squares, as comparisons have them."""
    height, width = pictures.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    margins = (left, side - width - left, top, side - height - top)
    return F.pad(pictures, margins, value=1.0)


def evaluated_samplers(
    protocol: Any,
    student: Denoiser,
    teacher: PipelineTeacher,
    sampler: FewSteps | None,
    shape: Sequence[int],
) -> Iterator[tuple[str, int, Callable[..., Tensor]]]:
    """Each (`teacher` or `student`, number of steps, function that samples latents [B, *shape]).

    The function takes a conditioning and generators. A teacher that was distilled itself samples as
    its own pipeline does, without guidance.
    """
    options = {"shape": shape, "precision": generation_precision(protocol, teacher)}
    for n in protocol.teacher_steps:
        if distilled(teacher.pipeline):
            sample = partial(sampler_of(teacher.pipeline), teacher, steps=n)
        else:
            scales = {"guidance": protocol.guidance}
            if image_guidance := getattr(protocol, "image_guidance", None):
                scales["image_guidance"] = image_guidance
            sample = partial(guided, teacher, steps=n, **scales)
        yield "teacher", n, partial(in_precision, sample, **options)
    for n in possible_steps(protocol.student_steps, student):
        sample = partial(sampler or Consistency(), student, steps=n)
        yield "student", n, partial(in_precision, sample, **options)


def teacher_sampling(guidance: float, teacher: PipelineTeacher) -> dict[str, Any]:
    """What a protocol says of the teacher: its guidance, or the sampler of a few-step one."""
    if distilled(teacher.pipeline):
        return {"teacher sampler": str(sampler_of(teacher.pipeline))}
    return {"teacher guidance": guidance}


def generation_precision(protocol: Any, teacher: PipelineTeacher) -> str:
    """The precision of the denoisers: the protocol's, or the best on the teacher's device."""
    accelerator = "cpu" if teacher.device.type == "cpu" else "auto"
    return precision(protocol.precision, accelerator, "metrics.precision").name


def model_fingerprint(folder: Path, model: Any) -> str | None:
    """A fingerprint of the evaluated model: of the files in `folder`/student, else of `model`.

    That of the files does not depend on the dtype in which they were read.
    """
    found = path_fingerprint(folder / "student")
    network = getattr(model, "network", model)
    return found or (fingerprint(network) if isinstance(network, nn.Module) else None)


def write_result(
    folder: Path,
    protocol: dict[str, Any],
    rows: list[dict[str, Any]],
    strips: list[Tensor],
    model: str | None = None,
) -> None:
    """Add a result to `evaluation.json`, and its strips to a picture in `samples/`.

    `strips` has pictures [n, 3, S, S] in [0, 1] of every row. `model` is a fingerprint: results by
    other protocols stay in the file, and those of another model are removed.
    """
    before = results.read_evaluation(folder)
    after, entry = results.add_result(before, {"protocol": protocol, "rows": rows}, model)
    (folder / "samples").mkdir(exist_ok=True)
    place = folder / "samples" / entry["picture"]
    save_image(torch.cat(strips), content := BytesIO(), format="PNG", nrow=len(strips[0]))
    new_rows = [(row["who"], row["steps"]) for row in rows]
    all_rows = [(row["who"], row["steps"]) for row in entry["rows"]]
    if new_rows != all_rows:
        old = next(v for v in results.results_in(before) if v["picture"] == entry["picture"])
        old_rows = [(row["who"], row["steps"]) for row in old["rows"]]
        content = _merge_strips(place, old_rows, content, new_rows, all_rows)
    if content:
        write_atomic(place, content.getvalue())
    else:  # remove the old picture: its strips belong to other rows
        place.unlink(missing_ok=True)
    write_atomic(folder / results.FILE, json.dumps(after, indent=2).encode() + b"\n")


def _merge_strips(
    place: Path,
    old_rows: list[Any],
    new: BytesIO,
    new_rows: list[Any],
    all_rows: list[Any],
) -> BytesIO | None:
    """The strips of `all_rows`, from the new picture or else the old one at `place`.

    None if the sizes differ, or strips are missing.
    """
    try:
        with Image.open(place) as old, Image.open(new) as fresh:
            strips = _row_strips(old.convert("RGB"), old_rows)
            strips |= _row_strips(fresh.convert("RGB"), new_rows)
    except (OSError, SyntaxError):  # Pillow raises them for a damaged file
        return None
    if len({strip.size for strip in strips.values()}) != 1 or not strips.keys() >= set(all_rows):
        return None
    width, height = strips[all_rows[0]].size
    merged = Image.new("RGB", (width, height * len(all_rows) + results.PADDING))
    for i, name in enumerate(all_rows):
        merged.paste(strips[name], (0, i * height))
    merged.save(content := BytesIO(), format="PNG")
    return content


def _row_strips(grid: Image.Image, rows: list[Any]) -> dict[Any, Image.Image]:
    """The strip of every row of torchvision's grid, with the padding above it."""
    height = (grid.height - results.PADDING) // len(rows)
    boxes = [(0, i * height, grid.width, (i + 1) * height) for i in range(len(rows))]
    return {row: grid.crop(box) for row, box in zip(rows, boxes, strict=True)}


@torch.no_grad()
def generate_pictures(
    teacher: PipelineTeacher,
    sample: Callable[..., Tensor],
    prompts: list[Prompt],
    seeds: Sequence[int],
    bar: Bar,
    places: Sequence[int] | None = None,
    image_of: Callable[[dict[str, Tensor]], Tensor] | None = None,
) -> Tensor:
    """One picture per prompt and seed: [N, 3, S, S] in [-1, 1], on the CPU. `bar` counts them.

    An inpainting teacher fills a masked render of each prompt, the one numbered in `places`; None:
    0, 1, ... `image_of` makes the image channels of it; None: as the teacher does.
    """
    parts, places = [], places or range(len(prompts))
    image_of = image_of or (teacher.image_of if teacher.image_channels else None)
    for i in range(0, len(prompts), BATCH):
        now = slice(i, i + BATCH)
        cond = teacher.embed([p.caption for p in prompts[now]])
        if image_of:
            batch = {k: x.to(teacher.device) for k, x in masked(prompts[now], places[now]).items()}
            cond = replace(cond, image=image_of(batch))
        x0 = sample(cond, seeded(seeds[now]))
        parts.append(teacher.decode(x0).clamp(-1, 1).cpu())
        bar.advance(len(parts[-1]))
    return torch.cat(parts)


def masked(prompts: Sequence[Prompt], places: Sequence[int]) -> dict[str, Tensor]:
    """A render of each prompt, `pixels` [N, 3, 64, 64] in [-1, 1], and the mask of what an
    inpainting model fills, `fill` [N, 1, 64, 64]; both by the number in `places`.

    These scenes are neither in the training data nor among the renders that pictures are compared
    with.
    """
    scenes = [
        draw_scene(np.random.default_rng([SEEDS, place, MASKED]), prompt)
        for place, prompt in zip(places, prompts, strict=True)
    ]
    pixels = torch.from_numpy(render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return {"pixels": pixels, FILL: Masks()(SEEDS, places, (SIDE, SIDE))}
