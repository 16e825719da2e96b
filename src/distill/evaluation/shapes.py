"""A run judged on `shapes`: student and teacher at several step counts, on the same prompts and
seeds.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import save_image

from distill.core.tensors import fingerprint
from distill.core.types import Denoiser
from distill.evaluation import results as verdicts
from distill.machine.hardware import precision
from distill.sampling import Consistency, FewSteps, in_precision, seeded
from distill.sampling.guided import guided
from distill.storage.aside import put
from distill.storage.content import mark
from distill.storage.pictures import PADDING
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.progress import Bar
from distill.worlds.shapes.judge import Judge, judging_prompts
from distill.worlds.shapes.world import SIDE, Prompt

BATCH = 32  # pictures at a time; more fall out of a CPU's caches and take twice as long
SHOWN = 16  # pictures of each row in the comparison
VARIETY = (8, 8)  # prompts, pictures of each: for diversity
ALWAYS = {
    "student guidance": "none",
    "feature network": "reader of shapes, 96 features",
    "reference": "fresh renders of the same prompts",
}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The protocol. `guidance` is the teacher's; the student has none.

    `precision` is that of the denoisers' passes.
    """

    prompts: int = 400
    student_steps: Sequence[int] = (1, 2, 4)
    teacher_steps: Sequence[int] = (1, 4, 28)
    guidance: float = 3.0
    seed: int = 0
    precision: str = "auto"

    def fits(self, teacher: PipelineTeacher) -> None:
        """Raise ValueError, before anything is drawn, for a teacher whose pictures the reader
        cannot read.
        """
        if (side := teacher.latent_shape[-1] * teacher.unit // teacher.patch) != SIDE:
            what = (
                f"the judge of shapes reads pictures of {SIDE} pixels a side, and this teacher's"
                f" have {side}"
            )
            raise ValueError(
                f"metrics: {what}; use metrics=coco5k or prompts, or ~metrics to train"
            )

    def __call__(
        self,
        student: Denoiser,
        teacher: PipelineTeacher,
        folder: Path,
        sampler: FewSteps | None = None,
    ) -> list[dict[str, Any]]:
        """Judge, and write `evaluation.json` and `samples/comparison.png` into `folder`; returns
        the rows.
        """
        self.fits(teacher)
        judge, rows, strips = Judge.load(), [], []
        for who, n, make in lineup(self, student, teacher, sampler, teacher.latent_shape):
            count = self.prompts + min(VARIETY[0], self.prompts) * VARIETY[1]
            what = f"judging the {who} in {n} step{'s' * (n > 1)}"
            with Bar(what, count, unit="image", rate="images") as bar:
                scores, shown = self._judge(judge, teacher, make, bar)
            rows.append({"who": who, "steps": n, **scores})
            strips.append((shown[:SHOWN] + 1) / 2)
        protocol = {
            "prompts": self.prompts,
            "seed": self.seed,
            "teacher guidance": self.guidance,
            "precision": drawing_precision(self, teacher),
            **ALWAYS,
        }
        protocol |= {"student sampler": str(sampler or Consistency())}
        write_verdict(folder, protocol, rows, strips, judged(folder, student))
        return rows

    def _judge(
        self, judge: Judge, teacher: PipelineTeacher, make: Callable[..., Tensor], bar: Bar
    ) -> tuple[dict, Tensor]:
        prompts = judging_prompts(self.prompts, seed=self.seed)
        began = time.monotonic()
        shown = pictures(teacher, make, prompts, range(len(prompts)), bar)
        seconds = (time.monotonic() - began) / len(prompts)
        groups, each = VARIETY
        several = [prompt for prompt in prompts[:groups] for _ in range(each)]
        seeds = range(10_000, 10_000 + len(several))
        varied = pictures(teacher, make, several, seeds, bar).unflatten(0, (-1, each))
        scores = judge(shown, prompts, reference_seed=self.seed)
        scores["diversity"] = judge.diversity(varied, prompts[:groups], reference_seed=self.seed)
        return {**scores, "seconds_per_image": seconds}, shown


def lineup(
    protocol: Any,
    student: Denoiser,
    teacher: PipelineTeacher,
    sampler: FewSteps | None,
    shape: Sequence[int],
) -> Iterator[tuple[str, int, Callable[..., Tensor]]]:
    """Who is judged, at how many steps, and what makes latents [B, *shape] of its conditioning and
    generators.
    """
    how = {"shape": shape, "precision": drawing_precision(protocol, teacher)}
    for n in protocol.teacher_steps:
        make = partial(guided, teacher, guidance=protocol.guidance, steps=n)
        yield "teacher", n, partial(in_precision, make, **how)
    for n in protocol.student_steps:
        make = partial(sampler or Consistency(), student, steps=n)
        yield "student", n, partial(in_precision, make, **how)


def drawing_precision(protocol: Any, teacher: PipelineTeacher) -> str:
    """The precision of the denoisers' passes: the protocol's, or the best where the teacher is."""
    accelerator = "cpu" if teacher.device.type == "cpu" else "auto"
    return precision(protocol.precision, accelerator, "metrics.precision").name


def judged(folder: Path, model: Any) -> str | None:
    """A mark of what is judged: the student that lies in the folder, whatever it was read in, else
    the model's own.
    """
    found = mark(folder / "student")
    network = getattr(model, "network", model)
    return found or (fingerprint(network) if isinstance(network, nn.Module) else None)


def write_verdict(
    folder: Path,
    protocol: dict[str, Any],
    rows: list[dict[str, Any]],
    strips: list[Tensor],
    model: str | None = None,
) -> None:
    """Add to `evaluation.json`, with a picture in `samples/` of as many pictures [n, 3, S, S] in
    [0, 1] of every row.

    `model` is a mark of what was judged: verdicts by other protocols stay beside, but for those on
    another one.
    """
    before = verdicts.read(folder)
    after, entry = verdicts.added(before, {"protocol": protocol, "rows": rows}, model)
    (folder / "samples").mkdir(exist_ok=True)
    place = folder / "samples" / entry["picture"]
    save_image(torch.cat(strips), content := BytesIO(), format="PNG", nrow=len(strips[0]))
    drawn = [(row["who"], row["steps"]) for row in rows]
    wanted = [(row["who"], row["steps"]) for row in entry["rows"]]
    if drawn != wanted:
        old = next(v for v in verdicts.verdicts(before) if v["picture"] == entry["picture"])
        had = [(row["who"], row["steps"]) for row in old["rows"]]
        content = _together(place, had, content, drawn, wanted)
    if content:
        put(place, content.getvalue())
    else:  # strips of other rows would be taken for these
        place.unlink(missing_ok=True)
    put(folder / verdicts.FILE, json.dumps(after, indent=2).encode() + b"\n")


def _together(
    place: Path, had: list[Any], new: BytesIO, drawn: list[Any], wanted: list[Any]
) -> BytesIO | None:
    """The strips of the `wanted` rows, from the new picture or the old one at `place`; None if they
    do not fit.
    """
    try:
        with Image.open(place) as old, Image.open(new) as fresh:
            bands = {**_bands(old.convert("RGB"), had), **_bands(fresh.convert("RGB"), drawn)}
    except (OSError, SyntaxError):  # Pillow's, of a torn file
        return None
    if len({band.size for band in bands.values()}) != 1 or not bands.keys() >= set(wanted):
        return None
    width, height = bands[wanted[0]].size
    whole = Image.new("RGB", (width, height * len(wanted) + PADDING))
    for i, name in enumerate(wanted):
        whole.paste(bands[name], (0, i * height))
    whole.save(content := BytesIO(), format="PNG")
    return content


def _bands(grid: Image.Image, rows: list[Any]) -> dict[Any, Image.Image]:
    """The strip of every row of torchvision's grid, with the padding above it."""
    height = (grid.height - PADDING) // len(rows)
    boxes = [(0, i * height, grid.width, (i + 1) * height) for i in range(len(rows))]
    return {row: grid.crop(box) for row, box in zip(rows, boxes, strict=True)}


@torch.no_grad()
def pictures(
    teacher: PipelineTeacher,
    maker: Callable[..., Tensor],
    prompts: list[Prompt],
    seeds: Sequence[int],
    bar: Bar,
) -> Tensor:
    """One picture per prompt and seed, counted by `bar`: [N, 3, S, S] in [-1, 1], on the CPU."""
    parts = []
    for i in range(0, len(prompts), BATCH):
        cond = teacher.embed([p.caption for p in prompts[i : i + BATCH]])
        parts.append(teacher.decode(maker(cond, seeded(seeds[i : i + BATCH]))).clamp(-1, 1).cpu())
        bar.advance(len(parts[-1]))
    return torch.cat(parts)
