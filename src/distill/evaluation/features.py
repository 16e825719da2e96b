"""Read pictures from files and compute their features, which are cached on disk."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import center_crop, to_tensor

from distill.evaluation.networks import Describer
from distill.machine.hardware import cores
from distill.machine.memory import to_shared_memory
from distill.machine.signals import init_loader_worker
from distill.storage import formats
from distill.storage.atomic import write_atomic
from distill.storage.pictures import to_rgb
from distill.terminal.progress import Bar


def features(
    paths: Sequence[Path],
    network: Describer,
    cache: Path,
    *,
    device: torch.device,
    square: bool = True,
    batch_size: int = 16,
    workers: int = 0,
    captions: Sequence[str] = (),
) -> Tensor:
    """Features [N, D] in float32, on the CPU; with `square`, of the largest centred square.

    They are cached in the folder `cache`. The file name is a hash of the network, its weights, and
    the names, sizes and times of the pictures. A network that needs captions gets one of each
    picture.
    """
    captions = captions if network.needs == "captions" else ()
    key = (
        f"{network} upright {square}"
        f" {[(path.name, (s := path.stat()).st_size, s.st_mtime_ns) for path in paths]}"
    )
    if captions:
        key += f" {list(captions)}"
    file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if not file.is_file():
        workers = min(workers, cores())
        loader = DataLoader(
            paths,
            batch_size,
            num_workers=workers,
            collate_fn=partial(_prepare_batch, network, square),
            worker_init_fn=init_loader_worker,
        )
        network.model.to(device)
        units = {"unit": "image", "rate": "images"}
        with (
            torch.inference_mode(),
            Bar(f"computing features by {network.name}", len(paths), **units) as bar,
        ):
            parts: list[Tensor] = []
            for batch in loader:
                done = sum(map(len, parts))
                said = [captions[done : done + len(batch)]] if captions else []
                parts.append(network.images(batch.to(device), *said).float().cpu())
                bar.advance(len(batch))
        found = torch.cat(parts)
        network.model.to("cpu")
        cache.mkdir(parents=True, exist_ok=True)
        np.save(content := BytesIO(), found.numpy())
        write_atomic(file, content.getvalue())
    return torch.from_numpy(np.load(file, allow_pickle=False))


def _prepare_batch(network: Describer, square: bool, paths: list[Path]) -> Tensor:
    pictures = [open_rgb(path) for path in paths]
    # center_crop cuts at integer pixels. ImageOps.fit would blur pictures whose centre lies at half
    # a pixel, such as COCO's 640 x 427.
    if square:
        pictures = [center_crop(picture, [min(picture.size)]) for picture in pictures]
    return to_shared_memory(torch.stack([network.prepare(picture) for picture in pictures]))


def open_rgb(path: Path, key: str = "") -> Image.Image:
    """The picture in RGB, converted as training pictures are.

    Raises ValueError, starting with `key`, for a file that cannot be read.
    """
    try:
        # Only formats that training reads: a file named .png may hold EPS, for which Pillow starts
        # another program.
        with warnings.catch_warnings():
            # Pillow warns of large pictures, which `to_rgb` bounds, and of odd metadata.
            warnings.simplefilter("ignore")
            with formats.open_picture(path, path.suffix.lower()) as picture:
                return to_rgb(picture)
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ValueError(f"{key}{path}: cannot be read as a picture ({error})") from None


def to_model_input(picture: Image.Image, width: int, height: int) -> Tensor:
    """Resize and crop for an autoencoder: [1, 3, height, width] in [-1, 1]."""
    return to_tensor(ImageOps.fit(picture, (width, height)))[None] * 2 - 1


def cache_folder() -> Path:
    """Where features of reference pictures are cached."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "features"
