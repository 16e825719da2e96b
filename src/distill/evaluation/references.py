"""Inputs of an evaluation: pictures in a folder, captions and pictures of COCO.

Nothing here imports torch.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from distill.storage.bounded import MIB, json_of
from distill.storage.formats import is_hidden, suffixes

SAMPLE = re.compile(
    r".*_\d+step_seed\d+_[0-9a-f]{4}\.png", re.DOTALL
)  # the names that distill.sample gives
MOST_CAPTIONS = 256 * MIB  # ours: limit of COCO's caption file; that of train2017 has 88 MiB


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name, without hidden files; [] if there is no folder.

    Among pictures that `distill.sample` wrote, grid.png shows all of them and is left out.
    """
    pictures = (p for p in folder.glob("*") if p.suffix[1:].lower() in suffixes())
    found = sorted(p for p in pictures if not is_hidden(p.name))
    from_sample = any(SAMPLE.fullmatch(path.name) for path in found)
    return [path for path in found if not (from_sample and path.name == "grid.png")]


def coco(folder: str, count: int | None) -> tuple[list[str], list[Path]]:
    """Captions and pictures of COCO2017 val: the first `count` pictures by id, and the first
    caption by id of each.

    Raises ValueError if the folder lacks captions or pictures.
    """
    name = "annotations/captions_val2017.json"
    advice = "give the folder that holds annotations/ and val2017/"
    try:
        content = json_of(Path(folder) / name, MOST_CAPTIONS)
        names = {entry["id"]: Path(str(entry["file_name"])).name for entry in content["images"]}
        firsts = {
            x["image_id"]: x["caption"].strip()
            for x in sorted(content["annotations"], key=lambda x: -x["id"])
        }
        chosen = sorted(firsts.keys() & names)[:count]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"metrics.path={folder}: cannot read {name} ({error!r}); {advice}"
        ) from None
    if len(chosen) < (count or 1):
        raise ValueError(
            f"metrics.path={folder}: has captions of {len(chosen)} pictures,"
            f" metrics.prompts={count}"
        )
    paths = [Path(folder) / "val2017" / names[i] for i in chosen]
    if missing := [f"val2017/{path.name}" for path in paths if not path.is_file()]:
        what = f"{len(missing)} of {len(paths)} pictures are not there, the first {missing[0]}"
        raise ValueError(f"metrics.path={folder}: {what}; unpack val2017.zip there")
    return [firsts[i] for i in chosen], paths


def check_measures(measures: Sequence[str], scores: Collection[str]) -> None:
    """Raise ValueError unless `measures` are one or more of the `scores`."""
    if not measures or set(measures) - set(scores):
        raise ValueError(f"metrics.measures={list(measures)}: must be some of {', '.join(scores)}")


def check_reference(folder: str | None) -> None:
    """Raise ValueError for a folder without pictures; None is allowed."""
    if folder is not None and not pictures_in(Path(folder)):
        raise ValueError(f"metrics.reference={folder}: holds no pictures")


def check_variety(variety: Sequence[int]) -> None:
    """Raise ValueError unless it is [captions, pictures of each caption]."""
    numbers = [] if isinstance(variety, int | str) else list(variety)
    two_integers = len(numbers) == 2 and all(type(n) is int for n in numbers)
    if not two_integers or numbers[0] < 1 or numbers[1] < 2:
        raise ValueError(
            f"metrics.variety={variety}: must be [captions, pictures of each, 2 or more]"
        )
