"""Writing shards, to be read by `shards`: equal samples give equal bytes, and a shard appears only when complete."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
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
    from webdataset import ShardWriter

    _check(pattern, per_shard)
    first = next(samples, None)  # asked for before any file is made
    if first is None:
        raise ValueError(f"There is no sample to write to {pattern!r}.")
    files = _Files(per_shard)
    os.makedirs(os.path.dirname(pattern) or ".", exist_ok=True)
    writer = ShardWriter(
        pattern,
        maxcount=per_shard,
        maxsize=math.inf,
        opener=files.open,
        post=files.publish,
        verbose=0,
        encoder=False,
        mtime=0,
        user=OWNER,
        group=OWNER,
    )
    try:
        for sample in itertools.chain([first], samples):
            files.admit(sample["__key__"])
            writer.write(sample)
    except BaseException:
        writer.post = files.discard
        raise
    finally:
        writer.close()
    stale = pattern % len(files.written)
    if os.path.exists(stale):
        log.warning("%s is left from an earlier run and will be read along: remove it if you do not want that", stale)
    return files.written


def _check(pattern: str, per_shard: int) -> None:
    if per_shard < 1:
        raise ValueError(f"A shard must hold at least one sample, got per_shard={per_shard}.")
    try:
        numbered = pattern % 0 != pattern % 1 and os.path.dirname(pattern) == os.path.dirname(pattern % 1)
        numbered = numbered and pattern.endswith(".tar")
    except (TypeError, ValueError):
        numbered = False
    if not numbered:
        raise ValueError(f"The shard pattern {pattern!r} must number its files, like 'out/shards-%06d.tar'.")


class _Files:
    """The file under way, `<name>.part` until it is complete, and the names of those that are."""

    def __init__(self, per_shard: int):
        self.per_shard = per_shard
        self.written: list[str] = []
        self.keys: set[str] = set()

    def open(self, name: str) -> io.BufferedWriter:
        self.part = open(name + ".part", "wb")  # noqa: SIM115 - closed by publish or discard
        return self.part

    def admit(self, key: str) -> None:
        """Refuse what would be read back as another key, or not at all."""
        parts = key.split("/")
        if "." in parts[-1] or not all(parts) or ".." in parts or "\0" in key:
            raise ValueError(f"The key {key!r} must be a relative path whose last part is not empty and has no dot.")
        if len(self.keys) == self.per_shard:  # the shard is full: this key opens the next
            self.keys.clear()
        if key in self.keys:
            raise ValueError(f"The key {key!r} occurs twice in one shard: give every sample its own key.")
        self.keys.add(key)

    def publish(self, name: str) -> None:
        self.part.close()
        os.replace(self.part.name, name)
        self.written.append(name)

    def discard(self, name: str) -> None:
        self.part.close()
        os.remove(self.part.name)
