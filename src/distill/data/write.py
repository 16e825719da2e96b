"""Writing shards, to be read by `shards`: equal samples give equal bytes, and a shard appears only when complete."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)
OWNER = "distill"  # in every tar header, with time 0: who wrote it, and when, must not change the bytes


def write_latents(pattern: str, samples: Iterable[tuple[str, np.ndarray, str]], per_shard: int) -> list[str]:
    """Write (key, latents [C, h, w], caption) as `.latent.npy` (fp16) and `.txt`; returns the shards' paths.

    `pattern` is like `out/shards-%06d.tar`. Raises ValueError for a bad pattern or key, no samples, or latents that
    are not 3-D or not finite in fp16; the shard under way is then removed, complete ones stay.
    """
    return _write(pattern, map(_latent_sample, samples), per_shard)


def write_images(pattern: str, samples: Iterable[tuple[str, np.ndarray, str, dict]], per_shard: int) -> list[str]:
    """Write (key, uint8 [H, W, 3], caption, record) as `.png`, `.txt` and `.json`; returns the shards' paths.

    Raises ValueError as `write_latents` does, and for arrays that are not uint8 RGB.
    """
    return _write(pattern, map(_image_sample, samples), per_shard)


def _latent_sample(sample: tuple[str, np.ndarray, str]) -> dict:
    key, latent, caption = sample
    with np.errstate(over="ignore"):  # checked just below
        latent = np.ascontiguousarray(latent, dtype="<f2")
    if latent.ndim != 3 or not np.isfinite(latent).all():
        raise ValueError(f"The latents of {key!r}, {list(latent.shape)}, must be [C, h, w] and finite in fp16.")
    file = io.BytesIO()
    np.lib.format.write_array(file, latent, allow_pickle=False)
    return {"__key__": key, "latent.npy": file.getvalue(), "txt": caption.encode()}


def _image_sample(sample: tuple[str, np.ndarray, str, dict]) -> dict:
    key, pixels, caption, record = sample
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"The image of {key!r} must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}.")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return {"__key__": key, "png": file.getvalue(), "txt": caption.encode(), "json": text.encode()}


def _write(pattern: str, samples: Iterator[dict], per_shard: int) -> list[str]:
    if per_shard < 1:
        raise ValueError(f"A shard must hold at least one sample, got per_shard={per_shard}.")
    _check(pattern)
    written: list[str] = []
    while (first := next(samples, None)) is not None:  # asked for before a file is made
        path = pattern % len(written)
        _write_shard(path, itertools.chain([first], itertools.islice(samples, per_shard - 1)))
        written.append(path)
    if not written:
        raise ValueError(f"There is no sample to write to {pattern!r}.")
    if os.path.exists(stale := pattern % len(written)):
        log.warning("%s is left from an earlier run and will be read along: remove it if you do not want that", stale)
    return written


def _write_shard(path: str, samples: Iterable[dict]) -> None:
    from webdataset import TarWriter

    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    part, keys = path + ".part", set()
    try:
        with open(part, "wb") as file, TarWriter(file, user=OWNER, group=OWNER, mtime=0, encoder=False) as tar:
            for sample in samples:
                _admit(sample["__key__"], keys)
                tar.write(sample)
        os.replace(part, path)
    except BaseException:
        os.remove(part)
        raise


def _check(pattern: str) -> None:
    try:
        numbered = pattern % 0 != pattern % 1 and os.path.dirname(pattern) == os.path.dirname(pattern % 1)
    except (TypeError, ValueError):
        numbered = False
    if not (numbered and pattern.endswith(".tar")):
        raise ValueError(f"The shard pattern {pattern!r} must number its files, like 'out/shards-%06d.tar'.")


def _admit(key: str, keys: set[str]) -> None:
    """Refuse what would be read back as another key, or not at all."""
    parts = key.split("/")
    if "." in parts[-1] or not all(parts) or ".." in parts or "\0" in key:
        raise ValueError(f"The key {key!r} must be a relative path whose last part is not empty and has no dot.")
    if key in keys:
        raise ValueError(f"The key {key!r} occurs twice in one shard: give every sample its own key.")
    keys.add(key)
