"""Files beside the shards of `cache` and `synthesize`: their manifest, and the empty caption."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.core.types import EMBEDDED
from distill.data import stores
from distill.data.cache import Cache, mirrored
from distill.data.named import BEGUN, expand
from distill.data.write import MANIFEST, NULL
from distill.machine.faults import first_line
from distill.storage import fingerprints as content
from distill.storage.bounded import MIB, check_archive, mapping_of
from distill.terminal.secret import masked
from distill.terminal.shown import shown

# Settings that must be equal for shards of several folders: one null caption and one set of
# buckets are used.
SHARED = ("teacher", "without", "embeddings", "what", "buckets", "size")
# Keys of a manifest that a run uses: the type, and the types of a list's items.
TYPES: dict[str, tuple[type, ...]] = {
    "teacher": (str,), "vae": (str,), "what": (str,), "told": (dict,), "without": (list, str),
    "buckets": (list, list),
}  # fmt: skip
MOST_NULL = 256 * MIB  # ours; the longest caption of SD3's three encoders takes 3 MiB


def made_of(path: str, cache: Cache | None = None) -> tuple[Path, dict[str, Any]]:
    """A folder with the shards, and its manifest, {} if there is none.

    Raises ValueError if the shard job is not finished, or for folders of different jobs.
    """
    about: dict[Path, dict[str, Any]] = {}
    named = {_folder_of(shard, cache or Cache.of()): _parent(shard) for shard in expand(path)}
    for folder in sorted(named):
        finished = (folder / MANIFEST).is_file()
        if (folder / BEGUN).is_file() and not finished:
            raise ValueError(
                f"data.path={path}: its shard job is not finished; give the command of the job"
                " once more"
            )
        about[folder] = _manifest(folder / MANIFEST, path) if finished else {}
    first, *others = about
    for other in others:
        pairs = {key: (about[first].get(key), about[other].get(key)) for key in SHARED}
        differs = [key for key, pair in pairs.items() if not content.maybe_same_path(*pair)]
        if differs:
            both = f"{named[first]} and {named[other]}"
            what = f"{both} were made with another {differs[0]}; give one"
            raise ValueError(f"data.path={masked(path)}: {what}")
    return first, about[first]


def _folder_of(shard: str, cache: Cache) -> Path:
    """The folder of a shard; for one in a store a copy of what is beside it."""
    if not stores.is_url(shard):
        return Path(shard).parent
    return mirrored(shard.rpartition("/")[0], (BEGUN, MANIFEST, NULL), cache, MOST_NULL)


def _parent(shard: str) -> str:
    """The folder of a shard as the user knows it."""
    return masked(shard.rpartition("/")[0]) if stores.is_url(shard) else str(Path(shard).parent)


def _manifest(file: Path, path: str) -> dict[str, Any]:
    """The manifest; ValueError for one that is not ours."""
    try:
        found = mapping_of(file)
    except ValueError as error:
        if not stores.is_url(path):
            raise
        # `file` is a copy on this disk, of which the user knows nothing.
        what = first_line(error, 300).removeprefix(f"{file}: ").partition(";")[0]
        advice = "repair it there, or if its store says a wrong size copy all to a disk"
        raise ValueError(f"data.path={masked(path)}: its {file.name} {what}; {advice}") from None
    for key, kinds in TYPES.items():
        if not _is_of(found.get(key), *kinds):
            what = f"its {file.name} says {key}={shown(found[key], 80)}"
            raise ValueError(f"data.path={masked(path)}: {what}; make it anew")
    return found


def _is_of(value: Any, kind: type, *inner: type) -> bool:
    """Whether a value is None or of this type, and the items of a list of the `inner` types."""
    if value is None or not isinstance(value, kind):
        return value is None
    return not inner or all(isinstance(each, inner) for each in value)


def null_of(file: Path, path: str) -> dict[str, Tensor]:
    """The embedded empty caption; ValueError for a file that is none."""
    try:
        check_archive(file, MOST_NULL)
        with np.load(file, allow_pickle=False) as archive:
            found = {name: torch.from_numpy(archive[name]) for name in archive.files}
        if set(found) - set(EMBEDDED) or "tokens" not in found:
            raise ValueError(f"it holds {', '.join(found) or 'nothing'}")
        if any(x.dtype != torch.float16 or not x.isfinite().all() for x in found.values()):
            raise ValueError("it is not of finite numbers in half precision")
    except Exception as error:  # damaged archives raise nearly anything
        what = f"its {file.name} is no embedded caption ({first_line(error, 120)}); make it anew"
        raise ValueError(f"data.path={masked(path)}: {what}") from None
    return found
