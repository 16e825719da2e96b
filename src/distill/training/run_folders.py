"""Folders of runs that failed before their first step, and files that no command of ours wrote.

Nothing here imports torch.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.storage.atomic import PART, remove
from distill.storage.bounded import mapping_of

STARTED = ("config.yaml", "run.json")  # files that are written first
PAGE = " · distill</title>".encode()
# Files of common names that commands overwrite -> bytes near the start of ours.
SIGNATURES = {
    "grid.png": b"Xtrun\0",  # PNG text with the model that generated it
    "compare.md": b"|  | steps | runs |",
    "compare.csv": b"group,run,seed,",
    "compare.html": PAGE,
    "wins.md": b"| judge | model | against |",
    "wins.csv": b"judge,measure,model,against,",
    "wins.json": b'"verdicts"',
    "votes.html": PAGE,
    "votes_key.json": b'{"page": "',
    "evaluation.json": b'"protocol"',
    "report.html": PAGE,
}
HEAD = 2**16  # ours: bytes that are searched
FIRST = "step_000000.png"  # written before the first step
LOG, PROCESSES = "run.log", "processes"
HEADING = re.compile(
    rb"== \d{4}-\d\d-\d\d [\d:+-]+ python -m distill\.run\b"
)  # first line of our log
NOTES = re.compile(r"\d+\.(log|beat|end)")
LOGGERS = ("lightning_logs", "wandb", "mlruns", "mlflow.db")  # files of Lightning's loggers


def check_ours(folder: Path, key: str, *names: str) -> None:
    """Raise FileExistsError, starting with `key`, for a file of such a name that no command of ours
    wrote.
    """
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        head = b""
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(HEAD)
        if SIGNATURES[name] not in head:
            what = f"holds a {name} that this command did not write and would overwrite"
            raise FileExistsError(f"{key}={folder}: {what}; name another {key}=")


def untouched(folder: Path) -> bool:
    """Whether a run was started here but made no step: nothing to resume and nothing to show."""
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
        or (folder / "metrics.csv").exists()  # has its first row after the first iteration
        or (alarms.is_file() and alarms.stat().st_size)
        or set(pictures) - {FIRST}
    )


def foreign(folder: Path) -> list[str]:
    """Sorted names in a folder that are not from a run without steps. Hidden files do not count.

    If no such run was started here, all names except `run.log`, if a run of ours wrote it.
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
    """Remove the files of a run without steps, so that the next run does not take them for its own.

    Other files stay.
    """
    ours = [folder / "samples" / name for name in (FIRST, "captions.txt")]
    ours += [*folder.glob("events.out.tfevents.*"), folder / "hparams.yaml"]
    ours += [folder / name for name in ("alarms.jsonl", *reversed(STARTED))]
    for path in ours:
        _remove(path)
    for name in ("samples", "checkpoints"):
        with suppress(OSError):  # not empty: other files are in it
            (folder / name).rmdir()


def undone(folder: Path, before: Collection[str], *, crashed: bool) -> None:
    """As `cleared`, and remove all else that this command made, but nothing that was there
    `before`.

    After a crash the log and the notes stay. The folder itself is removed by `kept_if_filled`.
    """
    cleared(folder)
    for name in {*LOGGERS, *([] if crashed else [LOG])} - set(before):
        _remove(folder / name)
    if not crashed:
        for path in (folder / PROCESSES).glob("*"):
            if NOTES.fullmatch(path.name):
                _remove(path)
    with suppress(OSError):
        (folder / PROCESSES).rmdir()


@contextmanager
def kept_if_filled(folder: Path) -> Iterator[None]:
    """Afterwards remove the folder if it is empty, its lock included."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def _remove(path: Path) -> None:
    with suppress(OSError):
        remove(path)
