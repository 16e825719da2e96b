"""Run folders in which nothing has happened yet: what a command that failed before its first step leaves behind.

Nothing here imports torch.
"""

import shutil
from contextlib import suppress
from pathlib import Path

from distill.bounded import mapping_of

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


def check_ours(folder: Path, key: str, *names: str) -> None:
    """Raise FileExistsError, which begins with `key`, if such a file is there that no command of ours made."""
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
    """Whether a run was begun here, and came to no step: there is nothing to go on from, and nothing to look at."""
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


def cleared(folder: Path) -> None:
    """Remove what such a run has left, lest the next one take it for its own; what else is there stays."""
    for name in ("samples", "checkpoints"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for file in [
        *folder.glob("events.out.tfevents.*"),
        *(folder / n for n in ("hparams.yaml", "alarms.jsonl")),
    ]:
        with suppress(OSError):
            file.unlink()
    for name in reversed(BEGUN):
        with suppress(OSError):
            (folder / name).unlink()
