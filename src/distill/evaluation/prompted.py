"""Evaluate a model on prompts of COCO or of a file, with or without real pictures as reference.
A folder of pictures can be evaluated too.

<folder>/evaluation/<who>-<steps>-<hash>/000000.png
    picture i, from seed + i; kept, so that a killed command resumes
                                       captions.json
    the caption of every number

The hash covers the weights and every setting that changes a picture. A batch gives the same
pictures in every process, and all are scored together from the files. So the number of processes
changes no score, except for rounding if the number of threads changes.
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
from distill.evaluation.categories import check_categories, with_categories
from distill.evaluation.features import cache_folder, features, open_rgb
from distill.evaluation.networks import Clip, Describer, Dinov2
from distill.evaluation.references import check_measures, check_variety, coco, pictures_in
from distill.evaluation.results import CAPTIONS, OUTCOMES, captions_digest, packed
from distill.evaluation.scores import Score
from distill.evaluation.shapes import (
    SHOWN,
    evaluated_samplers,
    generation_precision,
    model_fingerprint,
    teacher_sampling,
    write_result,
)
from distill.evaluation.tables import steps_text
from distill.machine.hardware import memory_left
from distill.sampling import Consistency, FewSteps, seeded, to_bytes
from distill.storage.atomic import write_atomic, write_text_atomic
from distill.storage.bounded import text_of
from distill.teachers.pipeline import PipelineTeacher
from distill.terminal.progress import Bar, stage

DEFAULT_BATCH_SIZE = 16  # ours: of small pictures
TIMED = re.compile(r"(\d+\.\d+(?:e-\d+)?) (\d+)")  # a batch: seconds, number of pictures
TILE = 256  # pixels a side in the comparison
# Teacher or student, steps, files, and the function that samples their latents.
Row = tuple[str, int, list[Path], Callable[..., Tensor]]


@dataclass(kw_only=True)
class Prompted:
    """The protocol.

    Args:
        networks, scores: by name; measures: names of the scores to compute.
        path: COCO2017's folder, with annotations/ and val2017/, or a text file, a prompt a line.
        prompts: use only so many, the first ones; None: all.
        reference: a folder of real pictures; None: COCO's, or none.
        variety: [captions, pictures of each], for scores that need several pictures of a caption.
        guidance: a many-step teacher's; the student and few-step teachers have none.
        precision: of the denoisers' passes.
        size: pixels a side, or [width, height]; None: the size that the teacher was trained for.
        batch_size: pictures generated at a time; None: 16, or fewer if they are large or memory is
            short.
        square: crop generated and real pictures to their largest centred square.
        workers: of the DataLoader that reads pictures.
        column: of prompts in a table.
        category: column of their categories; None: category, if the table has one.
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
    column: str | None = None
    category: str | None = None

    def __post_init__(self) -> None:
        check_measures(self.measures, self.scores)
        self.data = Path(self.path).name
        self.captions_by_name: dict[str, str] = {}
        self.labels: list[str] = []  # the category of every caption
        self.reference_paths: list[Path] = []
        if Path(self.path).is_dir():
            self.data = "COCO2017 val, first caption of each picture"
            self.captions, self.reference_paths = coco(self.path, self.prompts)
            self.captions_by_name = {
                path.stem: caption
                for path, caption in zip(self.reference_paths, self.captions, strict=True)
            }
        else:
            lines = Lines(self.path, "metrics.path", self.column, self.category, True)
            self.captions = lines.lines[: self.prompts]
            self.labels = lines.labels[: self.prompts]
            check_categories(self.labels)
        if self.reference:
            self.reference_paths = pictures_in(Path(self.reference))
        needing = self._measures_needing("reference")
        if needing and not self.reference_paths:
            what = f"{needing[0]} needs a folder of real pictures"
            if self.reference:
                what = "holds no pictures"
            raise ValueError(f"metrics.reference={self.reference}: {what}")
        self.image_captions = list(self.captions)  # the caption of every picture of a row
        if self._measures_needing("varied"):
            check_variety(self.variety)
            self.image_captions += [
                caption
                for caption in self.captions[: self.variety[0]]
                for _ in range(self.variety[1])
            ]
        self.captions_by_name |= {
            f"{i:06d}": caption for i, caption in enumerate(self.image_captions)
        }

    def check(self, kind: str, path: str = "") -> None:
        """Raise ValueError if all distances use the discriminator's feature network.

        `kind` and `path` are the class and the path of the discriminator's features.
        """
        distances = self._measures_needing("reference")
        network = Clip if "clip" in path.lower() else Dinov2
        used = {type(self._network(name)) for name in distances}
        if "ImageFeatures" in kind and used == {network}:
            name, other = ("DINO", "cmmd") if network is Dinov2 else ("CLIP", "fd_dinov2")
            what = (
                f"{', '.join(distances)} use features of {name}, as this run's discriminator does,"
                " which favours the run"
            )
            raise ValueError(
                f"metrics.measures: {what}; add a distance on other features, fid or {other}"
            )

    def _measures_needing(self, kind: str) -> list[str]:
        return [n for n in self.measures if kind in (self.scores[n].needs, self._network(n).needs)]

    def _network(self, measure: str) -> Any:
        return self.networks[self.scores[measure].network]

    def __call__(
        self,
        student: Denoiser | None,
        teacher: PipelineTeacher,
        folder: Path,
        sampler: FewSteps | None = None,
    ) -> list[dict[str, Any]]:
        """Evaluate; write `evaluation.json` and `samples/comparison.png` into `folder`.

        Returns the rows.
        """
        self.load()
        sampler = sampler or Consistency()
        rows, strips = [], []
        for who, steps, paths, _ in self.generate(student, teacher, folder, sampler):
            images = paths[0].parent
            with stage(f"scoring the {who} in {steps_text(steps)}"):
                scores = self._scores(paths, images, self.captions, teacher.device)
            rows.append({"who": who, "steps": steps, **scores, **_seconds(images)})
            strips.append(_strip(paths[: len(self.captions)]))
        protocol = self._protocol(paths[0], self.captions, self.data)
        protocol["seeds"] = f"{self.seed} + number"
        protocol["precision"] = generation_precision(self, teacher)
        if self.teacher_steps:
            solver = "Euler" if teacher.prediction == "flow" else "DDIM"
            protocol["teacher sampler"] = f"{solver}, trailing steps"
            protocol |= teacher_sampling(self.guidance, teacher)
        if self.student_steps:
            protocol |= {"student sampler": str(sampler), "student guidance": "none"}
        write_result(folder, protocol, rows, strips, model_fingerprint(folder, student or teacher))
        return rows

    def evaluate_folder(
        self, folder: Path, out: Path, device: torch.device
    ) -> list[dict[str, Any]]:
        """Evaluate existing pictures; write `evaluation.json` and a strip of them into `out`."""
        self.load()
        paths = pictures_in(folder)
        captions = self._captions_of(paths) if self._measures_needing("captions") else []
        with stage("scoring the pictures"):
            scores = self._scores(paths, out / "evaluation", captions, device)
        rows = [{"who": "pictures", "steps": 0, **scores}]
        protocol = self._protocol(paths[0], captions, "captions of the pictures")
        protocol["judged"] = f"{len(paths)} pictures in {folder}"  # a key of saved protocols
        listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
        fingerprint = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        write_result(out, protocol, rows, [_strip(paths)], fingerprint)
        return rows

    def _captions_of(self, paths: list[Path]) -> list[str]:
        """The captions of picture files: from .txt files beside them, else by the file names.

        A name is the number of a caption, or that of a COCO picture. Raises ValueError for others.
        """
        if all(path.with_suffix(".txt").is_file() for path in paths):
            files = [path.with_suffix(".txt") for path in paths]
            texts = [text_of(file, MOST_CAPTION, "utf-8-sig") for file in files]
            return [text.strip() for text in texts]
        if all(path.stem in self.captions_by_name for path in paths):
            return [self.captions_by_name[path.stem] for path in paths]
        what = (
            "a .txt beside every picture, or pictures named by the numbers of their captions:"
            " 000000.png and so on"
        )
        raise ValueError(
            f"run={paths[0].parent}: {self._measures_needing('captions')[0]} needs {what}"
        )

    def load(self) -> None:
        """Read the networks of all measures now: one that is missing is found before hours of
        generating.
        """
        for network in {
            self.scores[name].network: self._network(name) for name in self.measures
        }.values():
            network.load()

    def generate(
        self, student: Denoiser | None, teacher: PipelineTeacher, folder: Path,
        sampler: FewSteps | None = None,
        *, rank: int = 0, world_size: int = 1,
    ) -> list[Row]:  # fmt: skip
        """Generate the pictures that are missing, or every world_size-th batch of them; returns
        all rows.
        """
        shape, rows = teacher.shape_of(self.size, "metrics.size"), []
        batch_size = self.batch_size or _default_batch_size(teacher, student, shape)
        for who, n, sample in evaluated_samplers(self, student, teacher, sampler, shape):
            model, how = student, str(sampler)
            if who == "teacher":
                model, how = teacher, next(iter(teacher_sampling(self.guidance, teacher).values()))
            provenance = json.dumps(
                [
                    self.image_captions,
                    self.seed,
                    shape,
                    how,
                    teacher.provenance(model, scheduled=who == "teacher"),
                    batch_size,
                    generation_precision(self, teacher),
                ]
            )
            digest = hashlib.sha256(provenance.encode()).hexdigest()[:8]
            images = folder / "evaluation" / f"{who}-{n}-{digest}"
            paths = [images / f"{i:06d}.png" for i in range(len(self.image_captions))]
            rows.append((who, n, paths, sample))
            self._generate_missing(rows[-1], teacher, batch_size, rank, world_size)
            if rank == 0:
                write_text_atomic(images / CAPTIONS, json.dumps(self.captions))
        return rows

    @torch.no_grad()
    def _generate_missing(
        self, row: Row, teacher: PipelineTeacher, batch_size: int, rank: int, world_size: int
    ) -> None:
        who, steps, paths, sample = row
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        starts = range(0, len(paths), batch_size)
        batches = [range(len(paths))[i : i + batch_size] for i in starts]
        own_batches = batches[rank::world_size]
        missing = [batch for batch in own_batches if not all(paths[i].exists() for i in batch)]
        if not missing:
            return
        share = f", process 1 of {world_size}" if world_size > 1 else ""
        what = f"generating by the {who} in {steps_text(steps)}{share}"
        with Bar(what, sum(map(len, missing)), unit="image", rate="images") as bar:
            for batch in missing:
                start = time.monotonic()
                x0 = sample(
                    teacher.embed([self.image_captions[i] for i in batch]),
                    seeded([self.seed + i for i in batch]),
                )
                pixels = to_bytes(teacher.pictures(x0))
                with (paths[0].parent / f"seconds-{rank}.txt").open("a", encoding="utf-8") as file:
                    file.write(f"{time.monotonic() - start} {len(batch)}\n")
                for i, picture in zip(batch, pixels, strict=True):
                    to_pil_image(picture).save(content := BytesIO(), format="PNG")
                    write_atomic(paths[i], content.getvalue())
                bar.advance(len(batch))

    def _scores(
        self, paths: list[Path], cache: Path, captions: list[str], device: torch.device
    ) -> dict[str, Any]:
        """All measures, and the outcomes of each prompt. The first pictures are one for each
        caption; those after them are for scores that need several of a caption.
        """
        found: dict[str, Any] = {}
        outcomes: dict[str, Tensor] = {}
        options = {
            "device": device,
            "square": self.square,
            "batch_size": self.batch_size or DEFAULT_BATCH_SIZE,
            "workers": self.workers,
        }
        for name in self.measures:
            score, network = self.scores[name], self._network(name)
            # of those for variety no other measure needs a number
            some = paths[: len(captions) or None] if score.needs == "pictures" else paths
            found_all = features(some, network, cache, captions=captions, **options)
            pictures, varied = found_all.tensor_split([len(captions) or len(paths)])
            if score.needs == "reference":
                beside = features(self.reference_paths, network, cache_folder(), **options)
            elif score.needs == "captions":
                beside = network.texts(captions, device)
            elif score.needs == "pictures":
                beside = pictures
            elif len(varied):
                beside = varied.unflatten(0, (-1, self.variety[1]))
            else:  # a folder of pictures
                continue
            value = score(pictures, beside, network.scale)
            found |= value if isinstance(value, dict) else {name: value}
            single = score.by_picture(pictures, beside, network.scale)
            if single is not None and captions:
                outcomes[name] = single
        if not outcomes:
            return found
        numbers = {name: values.tolist() for name, values in outcomes.items()}
        labels = self.labels if captions == self.captions else []
        return with_categories({**found, OUTCOMES: packed(outcomes)}, numbers, labels)

    def _protocol(self, first: Path, captions: list[str], data: str) -> dict[str, Any]:
        """The settings that decide whether scores are comparable; `first` is a picture."""
        width, height = open_rgb(first).size
        protocol: dict[str, Any] = {}
        if captions:
            protocol["data"] = f"{data}, {captions_digest(captions)}"
            protocol["prompts"] = len(captions)
        protocol["reference"] = "none"
        if self._measures_needing("reference"):
            protocol["reference"] = f"{len(self.reference_paths)} pictures"
        crop = ", centred square" if self.square else ""
        protocol["pictures"] = f"{width} x {height}, 8 bit{crop}"
        for name in self.measures:
            settings = (str(self._network(name)), str(self.scores[name]))
            protocol[name] = "; ".join(filter(None, settings))
        return protocol


def _default_batch_size(teacher: PipelineTeacher, student: Any, shape: Sequence[int]) -> int:
    """Pictures at a time if `batch_size` is None: on one machine every run of a command gets the
    same.
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
    """Seconds per image of a row, from the batches of all processes and earlier attempts."""
    lines = [
        TIMED.fullmatch(line)
        for file in sorted(folder.iterdir())
        if re.fullmatch(r"seconds-\d+\.txt", file.name)
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    complete = [line for line in lines if line]  # a kill may have cut one short
    try:
        total = sum(int(line[2]) for line in complete)
        seconds = sum(float(line[1]) for line in complete)
    except ValueError:  # another program wrote the file
        return {}
    return {"seconds_per_image": seconds / total} if total else {}
