"""A model judged on prompts of COCO or of a file, against real pictures or without; likewise a folder of pictures.

<folder>/evaluation/<who>-<steps>-<hash>/000000.png   picture i, of seed + i; kept, so that a killed command goes on

The hash is of the weights and of all that makes a picture. A batch has the same pictures whoever makes it, one process
or one of several, and everything is scored at once from the files: scores do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ImageOps
from rich.progress import track
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from distill.data.datasets import Lines
from distill.evaluation import SHOWN, lineup, write_verdict
from distill.files import fingerprint
from distill.metrics.networks import Describer
from distill.metrics.pictures import Pictures, cache_folder, coco, in_folder, opened, put
from distill.metrics.scores import Score, Seen
from distill.sampling import FewSteps, seeded
from distill.teachers.pipeline import PipelineTeacher
from distill.types import Denoiser

TILE = 256  # pixels a side in the comparison


class Row(NamedTuple):
    who: str
    steps: int
    folder: Path
    paths: list[Path]
    make: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """The protocol.

    Args:
        networks, scores: by name; measures: which of the scores are taken.
        path: COCO2017's folder, with annotations/ and val2017/, or a text file, a prompt a line.
        prompts: how many of them, the first; None: all.
        reference: a folder of real pictures; None: COCO's, or none.
        variety: captions, pictures of each, for what needs several.
        guidance: the teacher's; the student has none.
        size: pixels a side; None: what the teacher was trained for.
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
    size: int | None = None
    square: bool = True
    batch_size: int = 16
    workers: int = 4

    def check(self, features: str) -> None:
        """Raise ValueError for what cannot be measured, or not fairly; `features` is the discriminator's class."""
        if unknown := [name for name in self.measures if name not in self.scores]:
            raise ValueError(f"metrics.measures: {unknown[0]} is none of {', '.join(self.scores)}")
        if not self.measures:
            raise ValueError(f"metrics.measures=[]: name some of {', '.join(self.scores)}")
        distances = self._needing("reference")
        if distances and not self.real:
            raise ValueError(f"metrics.measures: {distances[0]} needs metrics.reference=<folder of real pictures>")
        eyes = {self.networks[self.scores[name].network].dino for name in distances}
        if eyes == {True} and "ImageFeatures" in features:
            what = f"{', '.join(distances)} look with DINO, as this run's discriminator does, which flatters it"
            raise ValueError(f"metrics.measures: {what}; add a distance on other features, fid or cmmd")

    @cached_property
    def _world(self) -> tuple[list[str], list[Path]]:
        if self._is_coco:
            captions, real = coco(self.path, self.prompts)
        else:
            captions, real = [line.strip() for line in Lines(self.path, "metrics.path").lines][: self.prompts], []
        return captions, in_folder(self.reference, "metrics.reference") if self.reference else real

    @property
    def _is_coco(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def captions(self) -> list[str]:
        return self._world[0]

    @property
    def real(self) -> list[Path]:
        return self._world[1]

    def _needing(self, what: str) -> list[str]:
        return [name for name in self.measures if self.scores[name].needs == what]

    @property
    def asked(self) -> list[str]:
        """The caption of every picture of a row, those for variety last."""
        groups, each = self.variety
        several = [caption for caption in self.captions[:groups] for _ in range(each)]
        return self.captions + (several if self._needing("varied") else [])

    def __call__(
        self, student: Denoiser | None, teacher: PipelineTeacher, folder: Path, sampler: FewSteps | None = None
    ) -> list[dict[str, Any]]:
        """Judge, and write `evaluation.json` and `samples/comparison.png` into `folder`; returns the rows."""
        self.load()
        made, rows, strips = self.draw(student, teacher, folder, sampler), [], []
        for row in made:
            scores = self._scored(row.paths, row.folder, self.captions, teacher.device)
            rows.append({"who": row.who, "steps": row.steps, **scores, **_seconds(row.folder)})
            tiles = [ImageOps.fit(opened(path), (TILE, TILE)) for path in row.paths[: min(SHOWN, len(self.captions))]]
            strips.append(torch.stack([to_tensor(tile) for tile in tiles]))
        how = {"seeds": f"{self.seed} + number", "student sampler": str(sampler), "student guidance": "none"}
        how |= {"teacher guidance": self.guidance} if self.teacher_steps else {}
        write_verdict(folder, self._protocol() | how, rows, strips)
        return rows

    def judge_folder(self, folder: Path, out: Path, device: torch.device) -> list[dict[str, Any]]:
        """Judge pictures that are there already, and write `evaluation.json` and a strip of them into `out`."""
        self.load()
        (out / "evaluation").mkdir(parents=True, exist_ok=True)
        paths = in_folder(str(folder), "run")
        captions = self._told(paths) if self._needing("captions") else []
        rows = [{"who": "pictures", "steps": 0, **self._scored(paths, out / "evaluation", captions, device)}]
        tiles = [to_tensor(ImageOps.fit(opened(path), (TILE, TILE))) for path in paths[:SHOWN]]
        write_verdict(out, self._protocol() | {"pictures": f"{len(paths)}, in {folder}"}, rows, [torch.stack(tiles)])
        return rows

    def _told(self, paths: list[Path]) -> list[str]:
        """The captions of files, from .txt beside them, or by their names, which are then numbers of captions."""
        beside = [path.with_suffix(".txt") for path in paths]
        if all(text.is_file() for text in beside):
            return [text.read_text(encoding="utf-8").strip() for text in beside]
        if all(path.stem.isdecimal() and int(path.stem) < len(self.captions) for path in paths):
            return [self.captions[int(path.stem)] for path in paths]
        what = "a .txt beside every picture, or as names the numbers of their captions, 000000.png and so on"
        raise ValueError(f"run={paths[0].parent}: {self._needing('captions')[0]} needs {what}")

    def load(self) -> None:
        """Read what is needed of the networks: before hours of drawing, should one be out of reach."""
        for key in dict.fromkeys(self.scores[name].network for name in self.measures):
            self.networks[key].load()

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(
        self,
        student: Denoiser | None,
        teacher: PipelineTeacher,
        folder: Path,
        sampler: FewSteps | None = None,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> list[Row]:
        """Make every picture that is not there, or every world-th batch of them; returns all rows."""
        cell, (channels, *sides) = teacher.unit // teacher.patch, teacher.latent_shape
        if self.size is not None and self.size % teacher.unit:
            raise ValueError(f"metrics.size={self.size}: must be a multiple of {teacher.unit} for this model")
        shape = (channels, *([self.size // cell] * 2 if self.size else sides))
        told = hashlib.sha256(json.dumps([self.asked, self.seed, shape]).encode()).hexdigest()
        rows = []
        for who, n, make in lineup(self, student, teacher, sampler, shape):
            judged = teacher if who == "teacher" else student
            marks = [told, fingerprint(getattr(judged, "network", judged)), fingerprint(teacher.vae), self.batch_size]
            marks.append(self.guidance if who == "teacher" else str(sampler))
            key = hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:8]
            place = folder / "evaluation" / f"{who}-{n}-{key}"
            rows.append(Row(who, n, place, [place / f"{i:06d}.png" for i in range(len(self.asked))], make))
        for row in rows:
            self._fill(row, teacher, rank, world)
        return rows

    @torch.no_grad()
    def _fill(self, row: Row, teacher: PipelineTeacher, rank: int, world: int) -> None:
        row.folder.mkdir(parents=True, exist_ok=True)
        whole = range(len(row.paths))
        batches = [whole[i : i + self.batch_size] for i in whole[:: self.batch_size]][rank::world]
        missing = [batch for batch in batches if not all(row.paths[i].exists() for i in batch)]
        label = f"{row.who}, {row.steps} steps" + (f", process 1 of {world}" if world > 1 else "")
        for batch in track(missing, label, disable=rank != 0 or not missing):
            began = time.monotonic()
            cond = teacher.embed([self.asked[i] for i in batch])
            x0 = row.make(cond, seeded([self.seed + i for i in batch]))
            pixels = ((teacher.decode(x0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
            with (row.folder / f"seconds-{rank}.txt").open("a") as file:
                file.write(f"{time.monotonic() - began} {len(batch)}\n")
            for i, picture in zip(batch, pixels, strict=True):
                put(row.paths[i], partial(to_pil_image(picture).save, format="PNG"))

    # -- scoring ------------------------------------------------------------------------------------------------------

    def _scored(self, paths: list[Path], cache: Path, captions: list[str], device: torch.device) -> dict[str, float]:
        """The scores of the first pictures, one a caption if there are any; those behind them are for variety."""
        found: dict[str, float] = {}
        count = len(captions) or len(paths)
        how = {"batch_size": self.batch_size, "workers": self.workers, "device": device}
        for name in self.measures:
            score = self.scores[name]
            network, seen = self.networks[score.network], {}
            of_all = Pictures(paths, cache, self.square).features(network, **how)
            if score.needs == "varied":
                if len(paths) == count:
                    continue  # a folder of pictures
                seen["varied"] = of_all[count:].unflatten(0, (-1, self.variety[1]))
            elif score.needs == "reference":
                seen["reference"] = Pictures(self.real, cache_folder(), self.square).features(network, **how)
            else:
                seen |= {"captions": network.texts(captions, device), "scale": network.scale}
            found |= score(name, Seen(pictures=of_all[:count], **seen))
        return found

    def _protocol(self) -> dict[str, Any]:
        digest = hashlib.sha256("\n".join(self.captions).encode()).hexdigest()[:12]
        names = "COCO2017 val, first caption of each picture" if self._is_coco else Path(self.path).name
        about = {"data": f"{names}, sha256 {digest}", "prompts": len(self.captions)}
        if self._needing("reference"):
            about["reference"] = f"{len(self.real)} pictures"
        about["pictures"] = f"{self.size or 'own'} pixels a side, 8 bit" + (", centred square" if self.square else "")
        for name in self.measures:
            score = self.scores[name]
            about[name] = "; ".join(filter(None, [self.networks[score.network].about, score.about]))
        return about


def _seconds(folder: Path) -> dict[str, float]:
    """Of the batches of a row, whoever made them and when."""
    lines = [line.split() for file in folder.glob("seconds-*.txt") for line in file.read_text().splitlines()]
    total = sum(int(count) for _, count in lines)
    return {"seconds_per_image": sum(float(seconds) for seconds, _ in lines) / total} if total else {}
