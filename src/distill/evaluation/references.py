"""What is judged and by what: pictures in a folder, captions of COCO or of a file.

Nothing here imports torch.
"""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from distill.storage.bounded import MIB, json_of
from distill.storage.formats import is_hidden, suffixes

SAMPLE = re.compile(
    r".*_\d+step_seed\d+_[0-9a-f]{4}\.png", re.DOTALL
)  # as distill.sample names them
MOST_CAPTIONS = 256 * MIB  # ours: bytes of COCO's captions; those of its training pictures have 88


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder, by name, hidden ones left out; there may be no such folder.

    Beside pictures that `distill.sample` has named, grid.png is its sheet of them, and no picture.
    """
    pictures = (p for p in folder.glob("*") if p.suffix[1:].lower() in suffixes())
    found = sorted(p for p in pictures if not is_hidden(p.name))
    sheet = any(SAMPLE.fullmatch(path.name) for path in found)
    return [path for path in found if not (sheet and path.name == "grid.png")]


def coco(folder: str, count: int | None) -> tuple[list[str], list[Path]]:
    """Captions and pictures of COCO2017 val: of each of the first `count` pictures by id, its first
    caption by id.
    """
    name, advice = (
        "annotations/captions_val2017.json",
        "give the folder that holds annotations/ and val2017/",
    )
    try:
        said = json_of(Path(folder) / name, MOST_CAPTIONS)
        names = {entry["id"]: Path(str(entry["file_name"])).name for entry in said["images"]}
        firsts = {
            x["image_id"]: x["caption"].strip()
            for x in sorted(said["annotations"], key=lambda x: -x["id"])
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
    """Raise ValueError unless some of the scores are asked for, and no other."""
    if not measures or set(measures) - set(scores):
        raise ValueError(f"metrics.measures={list(measures)}: must be some of {', '.join(scores)}")


def check_reference(folder: str | None) -> None:
    """Raise ValueError for a folder without pictures; None means those that come with the captions,
    if any.
    """
    if folder is not None and not pictures_in(Path(folder)):
        raise ValueError(f"metrics.reference={folder}: holds no pictures")


def check_variety(variety: Sequence[int]) -> None:
    """Raise ValueError unless it is a number of captions, and one of pictures of each."""
    numbers = [] if isinstance(variety, int | str) else list(variety)
    whole = len(numbers) == 2 and all(type(n) is int for n in numbers)
    if not whole or numbers[0] < 1 or numbers[1] < 2:
        raise ValueError(
            f"metrics.variety={variety}: must be [captions, pictures of each, 2 or more]"
        )
