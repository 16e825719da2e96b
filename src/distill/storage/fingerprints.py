"""Whether files that lie elsewhere now are those of before: by names, sizes and a few bytes of
each, or by their path.

Weights of gigabytes are not read through. Two fine-tunes of one model have the same names, sizes
and headers, so bytes from all over a file count as well. Nothing here imports torch.
"""

import hashlib
import os
from pathlib import Path

# What decides what a model is: not its card, pictures or licence, which a copy may lack.
ENDS = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".txt", ".model", ".npz")
PIECES, PIECE = 64, 4096  # ours: looked at in a file; how many bytes each has
MOST = 10_000  # ours: files of a folder; more are no model


def same_path(one: object, other: object) -> bool:
    """Whether two values of a path key mean one place, as seen from the working folder."""
    if one == other:
        return True
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return os.path.abspath(one) == os.path.abspath(other) and os.path.exists(one)


def maybe_same_path(one: object, other: object) -> bool:
    """Whether two values may mean one place: one is absolute, and ends as the other was typed
    elsewhere.
    """
    if same_path(one, other):
        return True
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    places = [os.path.normpath(value).replace(os.sep, "/") for value in (one, other)]
    short, long = sorted(places, key=len)
    return os.path.isabs(long) and not os.path.isabs(short) and long.endswith(f"/{short}")


def path_fingerprint(path: str | Path) -> str | None:
    """Sixteen hex digits of the file, or of the model's files in the folder; None where there is
    neither.
    """
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
    except OSError:  # what cannot be read is said by who wants it
        return None
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """Those of a model: at the top of the folder and in its own folders, hidden ones left out."""
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
    """Size and pieces of the file: its beginning, where a header is, its end, and evenly
    between.
    """
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        last = max(0, size - PIECE)
        for start in sorted({last * i // (PIECES - 1) for i in range(PIECES)}):
            opened.seek(start)
            digest.update(opened.read(PIECE))
    return digest.digest()
