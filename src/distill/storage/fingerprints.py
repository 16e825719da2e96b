"""Recognise moved files and folders: by names, sizes and samples of their bytes, or by their path.

Weights of gigabytes are not read completely. Two fine-tunes of one model have the same names, sizes
and headers, so pieces from the whole file are hashed. Nothing here imports torch.
"""

import hashlib
import os
from pathlib import Path

# Suffixes of files that define a model: without its card, pictures and licence, which a copy may
# lack.
ENDS = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".txt", ".model", ".npz")
PIECES, PIECE = 64, 4096  # ours: number of pieces that are hashed in a file, and their bytes
MOST = 10_000  # ours: limit of files in a folder


def same_path(one: object, other: object) -> bool:
    """Whether two values of a path key are the same existing path from the working folder."""
    if one == other:
        return True
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return os.path.abspath(one) == os.path.abspath(other) and os.path.exists(one)


def maybe_same_path(one: object, other: object) -> bool:
    """Whether two values may be the same path: one is absolute and ends with the other, which was
    typed in another folder.
    """
    if same_path(one, other):
        return True
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    places = [os.path.normpath(value).replace(os.sep, "/") for value in (one, other)]
    short, long = sorted(places, key=len)
    return os.path.isabs(long) and not os.path.isabs(short) and long.endswith(f"/{short}")


def path_fingerprint(path: str | Path) -> str | None:
    """Sixteen hex digits of a file, or of a model's files in a folder; None if nothing is there."""
    place = Path(path)
    digest = hashlib.sha256()
    try:
        if place.is_file():
            digest.update(_sample_digest(place))
            return digest.hexdigest()[:16]
        if not place.is_dir():
            return None
        for file in _files(place):
            digest.update(file.relative_to(place).as_posix().encode("utf-8", "surrogateescape"))
            digest.update(_sample_digest(file))
    except OSError:  # the code that reads the model reports the error
        return None
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """The files of a model in a folder and its subfolders, without hidden ones."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(name for name in folders if depth < 2 and not name.startswith("."))
        wanted = (name for name in names if name.endswith(ENDS) and not name.startswith("."))
        found += [Path(place, name) for name in wanted]
        if len(found) > MOST:
            break
    return sorted(found)[:MOST]


def _sample_digest(file: Path) -> bytes:
    """A hash of the size of a file and of evenly spaced pieces, with its start and end."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        last = max(0, size - PIECE)
        for start in sorted({last * i // (PIECES - 1) for i in range(PIECES)}):
            opened.seek(start)
            digest.update(opened.read(PIECE))
    return digest.digest()
