"""A model judged on prompts of COCO or of a file, against real pictures or without; likewise a
folder of pictures.

<folder>/evaluation/<who>-<steps>-<hash>/000000.png
    picture i, of seed + i; kept, so that a killed command goes on

The hash is of the weights and of all that makes a picture. A batch has the same pictures whoever
makes it, and all are scored at once from the files: the number of processes changes no score, but
for rounding if that of threads changes.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image, to_tensor

from distill.core.limits import drawn_at_once
from distill.core.types import Denoiser
from distill.data.folder import MOST_CAPTION
from distill.data.lines import Lines
from distill.evaluation.features import cache_folder, features, open_rgb
from distill.evaluation.networks import Clip, Describer, Dinov2
from distill.evaluation.references import check_measures, check_variety, coco, pictures_in
from distill.evaluation.scores import Score
from distill.evaluation.shapes import (
    SHOWN,
    evaluated_samplers,
    generation_precision,
    model_fingerprint,
    write_result,
)
from distill.machine.hardware import memory_left
from distill.sampling import Consistency, FewSteps, seeded, to_bytes
from distill.storage.atomic import write_atomic
from distill.storage.bounded import text_of
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.progress import Bar, stage

DEFAULT_BATCH_SIZE = 16  # ours: pictures at a time, where they are small
TIMED = re.compile(r"(\d+\.\d+(?:e-\d+)?) (\d+)")  # a batch: its seconds, how many pictures
TILE = 256  # pixels a side in the comparison
Row = tuple[
    str, int, list[Path], Callable[..., Tensor]
]  # who, steps, files, what makes their latents


@dataclass(kw_only=True)
class Prompted:
    """The protocol.

    Args:
        networks, scores: by name; measures: which of the scores are taken.
        path: COCO2017's folder, with annotations/ and val2017/, or a text file, a prompt a line.
        prompts: how many of them, the first; None: all.
        reference: a folder of real pictures; None: COCO's, or none.
        variety: captions, pictures of each, for what needs several.
        guidance: the teacher's; the student has none.
        precision: of the denoisers' passes.
        size: pixels a side, or [width, height]; None: what the teacher was trained for.
        batch_size: pictures drawn at a time; None: 16, and fewer of large ones or where memory is
            short.
        square: of a picture that is none, generated or real, the largest centred square counts.
    """

    networks: Mapping[str, Describer]
    scores: Mapping[str, Score]
    measures: Sequence[str]
    path: str
    prompts: int | None = None
    reference: str | None = None
    variety: Sequence[int] = (8, 8)
    student_steps: Sequence[int] = (1, 2, 4)
    teacher_steps: Sequence[int] = ()
    guidance: float = 5.0
    seed: int = 0
    size: int | Sequence[int] | None = None
    precision: str = "auto"
    square: bool = True
    batch_size: int | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        check_measures(self.measures, self.scores)
        self.data, self.named, self.real = Path(self.path).name, {}, []
        if Path(self.path).is_dir():
            self.data = "COCO2017 val, first caption of each picture"
            self.captions, self.real = coco(self.path, self.prompts)
            self.named = {
                path.stem: caption for path, caption in zip(self.real, self.captions, strict=True)
            }
        else:
            self.captions = Lines(self.path, "metrics.path").lines[: self.prompts]
        if self.reference:
            self.real = pictures_in(Path(self.reference))
        if not self.real and (needing := self._needing("reference")):
            what = (
                "holds no pictures"
                if self.reference
                else f"{needing[0]} needs a folder of real pictures"
            )
            raise ValueError(f"metrics.reference={self.reference}: {what}")
        self.asked = list(self.captions)  # the caption of every picture of a row
        if self._needing("varied"):
            check_variety(self.variety)
            self.asked += [
                caption
                for caption in self.captions[: self.variety[0]]
                for _ in range(self.variety[1])
            ]
        self.named |= {f"{i:06d}": caption for i, caption in enumerate(self.asked)}

    def check(self, kind: str, path: str = "") -> None:
        """Raise ValueError if all distances look as the discriminator does, by its features' class
        and path.
        """
        distances, eyes = self._needing("reference"), Clip if "clip" in path.lower() else Dinov2
        if "ImageFeatures" in kind and {type(self._network(name)) for name in distances} == {eyes}:
            name, other = ("DINO", "cmmd") if eyes is Dinov2 else ("CLIP", "fd_dinov2")
            what = (
                f"{', '.join(distances)} look with {name}, as this run's discriminator does, which"
                " flatters it"
            )
            raise ValueError(
                f"metrics.measures: {what}; add a distance on other features, fid or {other}"
            )

    def _needing(self, what: str) -> list[str]:
        return [name for name in self.measures if self.scores[name].needs == what]

    def _network(self, measure: str) -> Any:
        return self.networks[self.scores[measure].network]

    def __call__(
        self,
        student: Denoiser | None,
        teacher: PipelineTeacher,
        folder: Path,
        sampler: FewSteps | None = None,
    ) -> list[dict[str, Any]]:
        """Judge, and write `evaluation.json` and `samples/comparison.png` into `folder`; returns
        the rows.
        """
        self.load()
        rows, strips, device, sampler = [], [], teacher.device, sampler or Consistency()
        for who, steps, paths, _ in self.draw(student, teacher, folder, sampler):
            place = paths[0].parent
            with stage(f"scoring the {who} in {steps} step{'s' * (steps > 1)}"):
                scores = self._scored(paths, place, self.captions, device)
            rows.append({"who": who, "steps": steps, **scores, **_seconds(place)})
            strips.append(_strip(paths[: len(self.captions)]))
        euler = "Euler" if teacher.prediction == "flow" else "DDIM"
        how = {"seeds": f"{self.seed} + number", "precision": generation_precision(self, teacher)}
        if self.teacher_steps:
            how |= {
                "teacher sampler": f"{euler}, trailing steps",
                "teacher guidance": self.guidance,
            }
        if self.student_steps:
            how |= {"student sampler": str(sampler), "student guidance": "none"}
        about = self._protocol(paths[0], self.captions, self.data) | how
        write_result(folder, about, rows, strips, model_fingerprint(folder, student or teacher))
        return rows

    def judge_folder(self, folder: Path, out: Path, device: torch.device) -> list[dict[str, Any]]:
        """Judge pictures that are there already, and write `evaluation.json` and a strip of them
        into `out`.
        """
        self.load()
        paths = pictures_in(folder)
        captions = self._told(paths) if self._needing("captions") else []
        with stage("scoring the pictures"):
            scores = self._scored(paths, out / "evaluation", captions, device)
        rows = [{"who": "pictures", "steps": 0, **scores}]
        how = {"judged": f"{len(paths)} pictures in {folder}"}
        about = self._protocol(paths[0], captions, "captions of the pictures")
        named = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
        these = hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        write_result(out, about | how, rows, [_strip(paths)], these)
        return rows

    def _told(self, paths: list[Path]) -> list[str]:
        """The captions of files, from .txt beside them, or by their names: numbers of captions, or
        COCO's own.
        """
        if all(path.with_suffix(".txt").is_file() for path in paths):
            files = [path.with_suffix(".txt") for path in paths]
            texts = [text_of(file, MOST_CAPTION, "utf-8-sig") for file in files]
            return [text.strip() for text in texts]
        if all(path.stem in self.named for path in paths):
            return [self.named[path.stem] for path in paths]
        what = (
            "a .txt beside every picture, or as names the numbers of their captions, 000000.png and"
            " so on"
        )
        raise ValueError(f"run={paths[0].parent}: {self._needing('captions')[0]} needs {what}")

    def load(self) -> None:
        """Read what is needed of the networks: before hours of drawing, should one be out of
        reach.
        """
        for network in {
            self.scores[name].network: self._network(name) for name in self.measures
        }.values():
            network.load()

    def draw(
        self, student: Denoiser | None, teacher: PipelineTeacher, folder: Path,
        sampler: FewSteps | None = None,
        *, rank: int = 0, world_size: int = 1,
    ) -> list[Row]:  # fmt: skip
        """Make every picture that is not there, or every world-th batch of them; returns all
        rows.
        """
        shape, rows = teacher.shape_of(self.size, "metrics.size"), []
        many = self.batch_size or _default_batch_size(teacher, student, shape)
        for who, n, make in evaluated_samplers(self, student, teacher, sampler, shape):
            model, how = (teacher, self.guidance) if who == "teacher" else (student, str(sampler))
            marks = json.dumps(
                [
                    self.asked,
                    self.seed,
                    shape,
                    how,
                    teacher.marks(model, scheduled=who == "teacher"),
                    many,
                    generation_precision(self, teacher),
                ]
            )
            place = (
                folder
                / "evaluation"
                / f"{who}-{n}-{hashlib.sha256(marks.encode()).hexdigest()[:8]}"
            )
            rows.append((who, n, [place / f"{i:06d}.png" for i in range(len(self.asked))], make))
            self._fill(rows[-1], teacher, many, rank, world_size)
        return rows

    @torch.no_grad()
    def _fill(
        self, row: Row, teacher: PipelineTeacher, many: int, rank: int, world_size: int
    ) -> None:
        who, steps, paths, make = row
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        batches = [range(len(paths))[i : i + many] for i in range(0, len(paths), many)]
        missing = [
            batch
            for batch in batches[rank::world_size]
            if not all(paths[i].exists() for i in batch)
        ]
        if not missing:
            return
        share = f", process 1 of {world_size}" if world_size > 1 else ""
        what = f"drawing by the {who} in {steps} step{'s' * (steps > 1)}{share}"
        with Bar(what, sum(map(len, missing)), unit="image", rate="images") as bar:
            for batch in missing:
                began = time.monotonic()
                x0 = make(
                    teacher.embed([self.asked[i] for i in batch]),
                    seeded([self.seed + i for i in batch]),
                )
                pixels = to_bytes(teacher.pictures(x0))
                with (paths[0].parent / f"seconds-{rank}.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{time.monotonic() - began} {len(batch)}\n")
                for i, picture in zip(batch, pixels, strict=True):
                    to_pil_image(picture).save(content := BytesIO(), format="PNG")
                    write_atomic(paths[i], content.getvalue())
                bar.advance(len(batch))

    def _scored(
        self, paths: list[Path], cache: Path, captions: list[str], device: torch.device
    ) -> dict[str, float]:
        """The scores of the first pictures, one a caption if there are any; those behind them are
        for variety.
        """
        found: dict[str, float] = {}
        how = {
            "device": device,
            "square": self.square,
            "batch_size": self.batch_size or DEFAULT_BATCH_SIZE,
            "workers": self.workers,
        }
        for name in self.measures:
            score, network = self.scores[name], self._network(name)
            pictures, varied = features(paths, network, cache, **how).tensor_split(
                [len(captions) or len(paths)]
            )
            if score.needs == "reference":
                beside = features(self.real, network, cache_folder(), **how)
            elif score.needs == "captions":
                beside = network.texts(captions, device)
            elif len(varied):
                beside = varied.unflatten(0, (-1, self.variety[1]))
            else:  # a folder of pictures
                continue
            value = score(pictures, beside, network.scale)
            found |= value if isinstance(value, dict) else {name: value}
        return found

    def _protocol(self, first: Path, captions: list[str], data: str) -> dict[str, Any]:
        digest, (width, height) = (
            hashlib.sha256("\n".join(captions).encode()).hexdigest(),
            open_rgb(first).size,
        )
        about: dict[str, Any] = (
            {"data": f"{data}, sha256 {digest[:12]}", "prompts": len(captions)} if captions else {}
        )
        about["reference"] = f"{len(self.real)} pictures" if self._needing("reference") else "none"
        about["pictures"] = f"{width} x {height}, 8 bit" + (
            ", centred square" if self.square else ""
        )
        how = {name: (str(self._network(name)), str(self.scores[name])) for name in self.measures}
        return about | {name: "; ".join(filter(None, said)) for name, said in how.items()}


def _default_batch_size(teacher: PipelineTeacher, student: Any, shape: Sequence[int]) -> int:
    """Pictures drawn at a time where nobody says: the same whenever a command is given again on a
    machine.
    """
    models = [teacher, *([student] if isinstance(student, nn.Module) else [])]
    return drawn_at_once(
        *teacher.sides_of(shape), most=DEFAULT_BATCH_SIZE, room=memory_left(*models)
    )


def _strip(paths: list[Path]) -> Tensor:
    return torch.stack(
        [to_tensor(ImageOps.fit(open_rgb(path), (TILE, TILE))) for path in paths[:SHOWN]]
    )


def _seconds(folder: Path) -> dict[str, float]:
    """Of the batches of a row, whoever made them and when."""
    lines = [
        TIMED.fullmatch(line)
        for file in sorted(folder.iterdir())
        if re.fullmatch(r"seconds-\d+\.txt", file.name)
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    whole = [line for line in lines if line]  # a kill may have cut one short
    try:
        total = sum(int(line[2]) for line in whole)
        seconds = sum(float(line[1]) for line in whole)
    except ValueError:  # not ours
        return {}
    return {"seconds_per_image": seconds / total} if total else {}
