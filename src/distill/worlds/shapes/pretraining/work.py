"""The folder of a pretraining: its data, and the results of earlier stages."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from distill.data.datasets import ImageShards
from distill.sampling import to_bytes
from distill.storage.atomic import write_atomic
from distill.storage.fingerprints import maybe_same_path
from distill.terminal.progress import track
from distill.worlds.shapes.judge import MODEL, Judge
from distill.worlds.shapes.pretraining.asked import MIN_PICTURES, max_empty_share
from distill.worlds.shapes.pretraining.fit import Fit
from distill.worlds.shapes.render import render
from distill.worlds.shapes.world import SIDE, Scene

PER_SHARD = 1024


class Work:
    def __init__(self, asked: Mapping[str, Any]):
        self.asked, self.out, self.data = asked, Path(asked["out"]), asked["data"]
        self.train, self.models = self.out / "train", self.out / "models"
        self.of_shapes = self.data["path"] is None

    def fit(self, stage: str) -> Fit:
        """Training settings of a stage; a resumed stage keeps its precision, also on another
        machine.
        """
        kept = self.stage(stage).get("precision", self.asked["precision"])
        options = {"seed": self.asked["seed"], "precision": kept, **self.asked[stage]}
        return Fit(name=stage, out=self.train, **options)

    @cached_property
    def pictures(self) -> Tensor:
        return self.read()[0]

    @cached_property
    def captions(self) -> list[str]:
        return json.loads((self.out / "captions.json").read_text(encoding="utf-8"))

    @property
    def vae(self) -> AutoencoderKL:
        return AutoencoderKL.from_pretrained(self.train / "vae").eval().requires_grad_(False)

    @property
    def latents(self) -> Tensor:
        return torch.load(self.out / "latents.pt", weights_only=True)

    @property
    def judge(self) -> Judge:
        """Evaluation with the reader trained here, or else the shipped one."""
        own = self.models / "reader"
        return Judge.load(own if own.exists() else MODEL)

    def read(self) -> tuple[Tensor, list[str]]:
        """uint8 pictures [N, 3, S, S] and their captions. A bad sample is replaced, and named in
        the log.

        Scenes of `shapes` are in order. Other pictures are shuffled by the seed: the last ones are
        held out for scores, and files may be sorted by content.
        """
        path, size = self.data["path"], self.data["size"]
        share = max_empty_share(self.asked["stages"])
        dataset = ImageShards(path or str(self.out / "data"), size=size, max_empty_share=share)
        if len(dataset) < MIN_PICTURES:
            raise ValueError(
                f"data.path={path} holds {len(dataset)} pictures; at least {MIN_PICTURES} are"
                " needed"
            )
        order = torch.arange(len(dataset))
        if not self.of_shapes:
            order = torch.randperm(
                len(dataset), generator=torch.Generator().manual_seed(self.data["seed"])
            )
        order = order[: self.data["count"]].tolist()
        pictures, captions = torch.empty(len(order), 3, size, size, dtype=torch.uint8), []
        for row, number in enumerate(track(order, "data: reading", unit="image", rate="images")):
            item = dataset[number]
            pictures[row] = to_bytes(item["pixels"])
            captions.append(item["caption"])
        return pictures, captions

    def known(self) -> dict[str, Any]:
        """`pretraining.json`: the commands, and per stage its settings, seconds, scores and
        `finished`.
        """
        path = self.out / "pretraining.json"
        return (
            json.loads(path.read_text(encoding="utf-8"))
            if path.exists()
            else {"commands": [], "stages": {}}
        )

    def stage(self, name: str) -> dict[str, Any]:
        return self.known()["stages"].get(name, {})

    def note(self, stage: str, *commands: str, **values: Any) -> None:
        """Add values to a stage, and commands."""
        known = self.known()
        known["commands"] = list(dict.fromkeys([*known["commands"], *commands]))
        known["stages"].setdefault(stage, {}).update(values)
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomic(self.out / "pretraining.json", json.dumps(known, indent=2).encode() + b"\n")

    def start(self, stage: str, decided_by: Sequence[str], command: str) -> None:
        """Write the settings on which a stage depends; raise ValueError if it was started with
        others.
        """
        settings: dict[str, Any] = {}
        for name in ("seed", "data", *decided_by):
            node: Any = self.asked
            for key in name.split("."):
                node = node[key]
            settings |= (
                {f"{name}.{k}": v for k, v in node.items()}
                if isinstance(node, Mapping)
                else {name: node}
            )
        before = self.stage(stage).get("settings", settings)
        changed = [
            f"{k}={v} (was {before.get(k)})"
            for k, v in settings.items()
            if not maybe_same_path(v, before.get(k))
        ]
        if changed and not self._has_no_result(stage):
            what = (
                f"started with other settings, now {', '.join(changed)}; choose another out, or"
                " undo that"
            )
            raise ValueError(f"out={self.out}: its stage {stage} was {what}")
        self.note(stage, command, settings=settings)

    def _has_no_result(self, stage: str) -> bool:
        """Whether a stage was started without a result, so that its settings may change."""
        own = {"data": ["data", "captions.json"], "latents": ["latents.pt"]}.get(stage, [])
        left = [
            path
            for path in (*(self.out / name for name in own), self.models / stage)
            if path.exists()
        ]
        return not (self.stage(stage).get("finished") or left or any(self.train.glob(f"{stage}*")))


def pixels(pictures: Tensor) -> Tensor:
    """uint8 pictures -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def render_all(scenes: list[Scene]) -> Tensor:
    """Scenes -> uint8 pictures [N, 3, 64, 64]."""
    pictures = torch.empty(len(scenes), 3, SIDE, SIDE, dtype=torch.uint8)
    drawn = track(scenes, "drawing scenes", unit="image", rate="images")
    for picture, scene in zip(pictures, drawn, strict=True):
        picture.copy_(torch.from_numpy(render([scene])[0]).permute(2, 0, 1))
    return pictures
