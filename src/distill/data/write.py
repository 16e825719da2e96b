"""Writing shards for `shards`: equal samples give equal bytes, and a shard appears when
complete.
"""

import io
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from distill.storage.atomic import open_atomic

log = logging.getLogger(__name__)
# User and time of writing must not change the bytes.
HEADER = {"user": "distill", "group": "distill", "mtime": 0, "encoder": False}
JSON = {"sort_keys": True, "ensure_ascii": False}
# Files of a shard job beside its shards; the manifest is written last.
NULL, MANIFEST = "null.npz", "manifest.json"
# `what` in the manifest of distill.cache
PICTURES, EDIT_PAIRS = "encoded pictures", "encoded edit pairs"
PATTERN = re.compile(r"[^%]*%\d*d[^/%]*\.tar")  # the number is in the file name
# Other keys would be read back as another key, or not at all.
KEY = re.compile(r"(?:(?!\.\./)[^/\0]+/)*[^/.\0]+")


def write_latents(
    pattern: str, samples: Iterable[tuple[str, np.ndarray, str]], per_shard: int
) -> list[str]:
    """Write (key, latents [C, h, w], caption) as `.latent.npy` (fp16) and `.txt`; returns the
    shards' paths.

    `pattern` is like `out/shards-%06d.tar`. Raises ValueError for a bad pattern or key, no samples,
    or latents that are not 3-D or not finite in fp16. The current shard is then removed; complete
    ones stay.
    """
    files = (
        (key, {"latent.npy": _npy(key, x), "txt": caption.encode()}) for key, x, caption in samples
    )
    return _write(pattern, files, per_shard)


def write_preferences(
    pattern: str, pairs: Iterable[tuple[str, np.ndarray, np.ndarray, str]], per_shard: int
) -> list[str]:
    """Write (key, winner's latents, loser's latents, caption) as `.winner.npy`, `.loser.npy` (fp16)
    and `.txt`; returns the shards' paths. Raises ValueError as `write_latents`.
    """
    files = (
        (key, {"winner.npy": _npy(key, w), "loser.npy": _npy(key, x), "txt": caption.encode()})
        for key, w, x, caption in pairs
    )
    return _write(pattern, files, per_shard)


def write_images(
    pattern: str, samples: Iterable[tuple[str, np.ndarray, str, dict]], per_shard: int
) -> list[str]:
    """Write (key, uint8 [H, W, 3], caption, record) as `.png`, `.txt` and `.json`; returns the
    shards' paths.

    Raises ValueError as `write_latents`, and for arrays that are not uint8 RGB.
    """
    files = (
        (
            key,
            {
                "png": _png(key, x),
                "txt": caption.encode(),
                "json": json.dumps(record, **JSON).encode(),
            },
        )
        for key, x, caption, record in samples
    )
    return _write(pattern, files, per_shard)


def write_pairs(
    pattern: str, samples: Iterable[tuple[str, np.ndarray, np.ndarray, str, dict]], per_shard: int
) -> list[str]:
    """Write edit pairs (key, source, target, instruction, record), pictures uint8 [H, W, 3], as
    `.source.png`, `.target.png`, `.txt` and `.json`; returns the shards' paths.

    Raises ValueError as `write_images`.
    """
    files = (
        (
            key,
            {
                "source.png": _png(key, source),
                "target.png": _png(key, target),
                "txt": instruction.encode(),
                "json": json.dumps(record, **JSON).encode(),
            },
        )
        for key, source, target, instruction, record in samples
    )
    return _write(pattern, files, per_shard)


def cached(
    key: str, latent: np.ndarray, caption: str, embedded: Mapping[str, np.ndarray]
) -> tuple[str, dict]:
    """A sample for `write_shard`: latents [C, h, w] and the embedded caption, in fp16.

    Raises ValueError for values that are not finite in fp16.
    """
    return key, {
        "latent.npy": _npy(key, latent),
        "txt": caption.encode(),
        **{f"{name}.npy": _npy(key, x, None) for name, x in embedded.items()},
    }


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write one shard of (key, {extension: bytes}); it appears when it is complete and on the disk.

    Raises ValueError for a bad key; nothing is left then.
    """
    from webdataset import TarWriter

    keys: set[str] = set()
    with open_atomic(Path(path), flush=True) as file, TarWriter(file, **HEADER) as tar:
        for key, files in samples:
            if not KEY.fullmatch(key) or key in keys:
                what = (
                    "occurs twice"
                    if key in keys
                    else "must be a relative path, no dot in its last part"
                )
                raise ValueError(f"The key {key!r} {what}: give every sample its own.")
            keys.add(key)
            tar.write({"__key__": key, **files})


def _npy(key: str, x: np.ndarray, ndims: tuple[int, ...] | None = (3, 4)) -> bytes:
    with np.errstate(over="ignore"):  # checked just below
        x = np.ascontiguousarray(x, dtype="<f2")
    if (ndims and x.ndim not in ndims) or not np.isfinite(x).all():
        what = "latents" if ndims else "embeddings"
        wanted = "[C, h, w] or [C, T, h, w], and finite" if ndims else "finite"
        raise ValueError(f"The {what} of {key!r}, {list(x.shape)}, must be {wanted} in fp16.")
    np.lib.format.write_array(file := io.BytesIO(), x, allow_pickle=False)
    return file.getvalue()


def _png(key: str, pixels: np.ndarray) -> bytes:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"The image of {key!r} must be uint8 [H, W, 3], got {pixels.dtype}"
            f" {list(pixels.shape)}."
        )
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def _write(
    pattern: str, samples: Iterator[tuple[str, dict[str, bytes]]], per_shard: int
) -> list[str]:
    if per_shard < 1 or not PATTERN.fullmatch(pattern):
        raise ValueError(
            f"{pattern!r}, per_shard={per_shard}: must be like 'out/shards-%06d.tar', and 1 or more"
        )
    os.makedirs(os.path.dirname(pattern) or ".", exist_ok=True)
    written: list[str] = []
    while (first := next(samples, None)) is not None:  # before a file is created
        path = pattern % len(written)
        write_shard(path, itertools.chain([first], itertools.islice(samples, per_shard - 1)))
        written.append(path)
    if not written:
        raise ValueError(f"There is no sample to write to {pattern!r}.")
    if os.path.exists(stale := pattern % len(written)):
        log.warning(
            "%s is left from an earlier run and will be read along: remove it if you do not want"
            " that",
            stale,
        )
    return written
