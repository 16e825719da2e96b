"""Pictures as files, the captions they are of, and their features, which are kept: what is read once is not again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from distill.metrics.networks import Describer

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Pictures:
    """Picture files in their order; with `square` the largest centred square of each. Features are kept in `cache`."""

    paths: Sequence[Path]
    cache: Path
    square: bool = True

    @cached_property
    def digest(self) -> str:
        """Of the contents of all files."""
        whole = hashlib.sha256()
        for path in self.paths:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
        return whole.hexdigest()

    def features(self, network: Describer, *, batch_size: int, workers: int, device: torch.device) -> Tensor:
        """[N, D] in float32, on the CPU. Raises ValueError for a file that is no picture."""
        key = hashlib.sha256(f"{self.digest} {self.square} {network.about}".encode()).hexdigest()[:32]
        file = self.cache / f"{key}.npy"
        if not file.is_file():
            loader = DataLoader(_Prepared(self, network), batch_size, num_workers=workers)
            network.model.to(device)
            with torch.inference_mode():
                bar = track(loader, f"{network.name}: {len(self.paths)} pictures", len(loader))
                found = torch.cat([network.images(batch.to(device)).float().cpu() for batch in bar])
            network.model.to("cpu")
            self.cache.mkdir(parents=True, exist_ok=True)
            put(file, lambda part: np.save(part, found.numpy()))
        return torch.from_numpy(np.load(file, allow_pickle=False))


@dataclass(frozen=True)
class _Prepared:
    pictures: Pictures
    network: Describer

    def __len__(self) -> int:
        return len(self.pictures.paths)

    def __getitem__(self, i: int) -> Tensor:
        picture = opened(self.pictures.paths[i])
        if self.pictures.square:
            picture = ImageOps.fit(picture, (min(picture.size),) * 2)  # which cuts and does not resize
        return self.network.prepare(picture)


def opened(path: Path) -> Image.Image:
    """As RGB; ValueError if it cannot be."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError) as error:  # the last is what Pillow raises for some broken PNG
        raise ValueError(f"{path}: cannot be read as a picture ({error})") from None


def put(path: Path, write: Callable[[object], object]) -> None:
    """A file that is there only when whole."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as file:
        write(file)
    part.replace(path)


def cache_folder() -> Path:
    """Where features of reference pictures are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "features"


def in_folder(folder: str, key: str) -> list[Path]:
    """The pictures in a folder, by name; ValueError, naming `key`, if there is none."""
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{key}={folder}: holds no pictures ({', '.join(SUFFIXES)})")
    return found


def coco(folder: str, count: int | None) -> tuple[list[str], list[Path]]:
    """Captions and pictures of COCO2017 val: of each of the first `count` pictures by id, its first caption by id."""
    root = Path(folder)
    file = root / "annotations" / "captions_val2017.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        names = {entry["id"]: entry["file_name"] for entry in said["images"]}
        firsts = {x["image_id"]: x["caption"].strip() for x in sorted(said["annotations"], key=lambda x: -x["id"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"metrics.path={folder}: cannot read COCO's captions from {file.relative_to(root)} ({error})"
        raise ValueError(f"{what}; give the folder that holds annotations/ and val2017/") from None
    chosen = sorted(firsts.keys() & names)[:count]
    paths = [root / "val2017" / names[i] for i in chosen]
    if count and len(chosen) < count:
        raise ValueError(
            f"metrics.path={folder}: {len(chosen)} pictures have captions, metrics.prompts={count} asks for more"
        )
    if missing := [path for path in paths if not path.is_file()]:
        what = f"{len(missing)} of {len(paths)} pictures are not there, the first {missing[0].relative_to(root)}"
        raise ValueError(f"metrics.path={folder}: {what}; fetch val2017.zip and unpack it there")
    return [firsts[i] for i in chosen], paths
