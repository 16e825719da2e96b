"""Run folders in which nothing has happened yet: what a command that failed before its first step
leaves behind.

Nothing here imports torch.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.storage.atomic import PART, remove
from distill.storage.bounded import mapping_of

BEGUN = ("config.yaml", "run.json")  # what is written first
PAGE = " · distill</title>".encode()
# Files of plain names that commands write anew -> what stands at the beginning of theirs.
MARKS = {
    "grid.png": b"Xtrun\0",  # a text of a PNG: by which model it was drawn
    "compare.md": b"|  | steps | runs |",
    "compare.csv": b"group,run,seed,",
    "compare.html": PAGE,
    "evaluation.json": b'"protocol"',
    "report.html": PAGE,
}
HEAD = 2**16  # ours: bytes that are looked at
FIRST = "step_000000.png"  # drawn before the first step
LOG, PROCESSES = "run.log", "processes"
HEADING = re.compile(rb"== \d{4}-\d\d-\d\d [\d:+-]+ python -m distill\.run\b")  # of our log
NOTES = re.compile(r"\d+\.(log|beat|end)")
LOGGERS = ("lightning_logs", "wandb", "mlruns", "mlflow.db")  # what Lightning's loggers make


def check_ours(folder: Path, key: str, *names: str) -> None:
    """Raise FileExistsError, which begins with `key`, if such a file is there that no command of
    ours made.
    """
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        head = b""
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(HEAD)
        if MARKS[name] not in head:
            what = f"holds a {name} that was not made by this command, and would be lost"
            raise FileExistsError(f"{key}={folder}: {what}; name another {key}=")


def untouched(folder: Path) -> bool:
    """Whether a run was begun here, and came to no step: there is nothing to go on from, and
    nothing to look at.
    """
    try:
        facts = mapping_of(folder / "run.json")
    except (OSError, ValueError):
        return False
    if "began" not in facts or "iterations" in facts:
        return False
    alarms = folder / "alarms.jsonl"
    pictures = [p.name for p in (folder / "samples").glob("*.png")]
    return not (
        any((folder / "checkpoints").glob("*"))
        or (folder / "student").exists()
        or (folder / "evaluation.json").exists()
        or (folder / "metrics.csv").exists()  # which gets its first row at the first iteration
        or (alarms.is_file() and alarms.stat().st_size)
        or set(pictures) - {FIRST}
    )


def foreign(folder: Path) -> list[str]:
    """The names in a folder, in their order, that no run which came to no step has made; hidden
    ones do not count.

    All of them, `run.log` aside if a run of ours wrote it, where no such run was begun.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names if not name.startswith(".") and not PART.fullmatch(name)}
    if untouched(folder):
        return []
    log = {LOG} if _is_log(folder / LOG) else set()
    return sorted(names - log - ({PROCESSES} if log else set()))


def _is_log(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as opened:
        return HEADING.match(opened.read(100)) is not None
    return False


def cleared(folder: Path) -> None:
    """Remove what such a run has left, lest the next one take it for its own; what else is there
    stays.
    """
    ours = [folder / "samples" / name for name in (FIRST, "captions.txt")]
    ours += [*folder.glob("events.out.tfevents.*"), folder / "hparams.yaml"]
    ours += [folder / name for name in ("alarms.jsonl", *reversed(BEGUN))]
    for path in ours:
        _removed(path)
    for name in ("samples", "checkpoints"):
        with suppress(OSError):  # there is something of another's in it
            (folder / name).rmdir()


def undone(folder: Path, before: Collection[str], *, crashed: bool) -> None:
    """As `cleared`, with all else that this command has made: not what was there `before`, nor what
    others put there.

    Of a crash the log and notes stay. The folder itself is for `kept_if_filled`.
    """
    cleared(folder)
    for name in {*LOGGERS, *([] if crashed else [LOG])} - set(before):
        _removed(folder / name)
    if not crashed:
        for path in (folder / PROCESSES).glob("*"):
            if NOTES.fullmatch(path.name):
                _removed(path)
    with suppress(OSError):
        (folder / PROCESSES).rmdir()


@contextmanager
def kept_if_filled(folder: Path) -> Iterator[None]:
    """Remove the folder after what is inside, its lock too, if nothing is in it."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _removed(path: Path) -> None:
    with suppress(OSError):
        remove(path)
