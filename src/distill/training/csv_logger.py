"""`metrics.csv`: one table over the whole run, continued on resume.

Lightning's CSVLogger deletes an existing file.
"""

import csv
import errno
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from distill.storage.atomic import open_atomic, write_atomic

MAX_HEADER = 2**24  # ours: characters of the line of column names


class CsvLog(Logger):
    """Rows {step, name: value}. Each row is written at once with one call, so a kill loses none.

    A new column is appended to the header, and the file is replaced. Earlier rows stay as they are,
    with fewer cells; csv and pandas read the rest as missing. An incomplete last line is being
    written, or was cut by a power failure. Resuming drops it.
    """

    name, version = "csv", ""

    def __init__(self, save_dir: str):
        super().__init__()
        self._path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8", errors="replace") as file:
                first = file.readline(MAX_HEADER)  # an open quote would read to the end of the file
            try:
                self._columns = next(csv.reader([first]), [])
            except csv.Error as error:
                what = f"its first line is no header ({error}); repair it, or move it away"
                raise ValueError(f"{self._path}: {what}") from None

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step or 0}
        new = sorted(row.keys() - {"step", *self._columns})
        if new:
            self._widen(new)
        self._append(_line([row.get(name, "") for name in self._columns]))

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Does nothing: config.yaml holds them."""

    @rank_zero_only
    def resume_at(self, step: int, iteration: int) -> None:
        """Drop rows after the resumed checkpoint: they are logged again."""

        def is_before(cells: list[str]) -> bool:
            row = dict(zip(self._columns, cells, strict=False))
            return int(row["step"]) <= step and float(row.get("iteration") or 0) <= iteration

        if self._columns:
            self._rewrite(is_before)

    @rank_zero_only
    def save(self) -> None:
        """Flush rows to the disk, so that they survive a power failure, as a checkpoint does."""
        if self._path.is_file():
            with self._path.open("ab") as file:
                os.fsync(file.fileno())

    def finalize(self, status: str) -> None:
        self.save()

    def _widen(self, new: Sequence[str]) -> None:
        """Replace the header. Complete rows are copied as they are, without being parsed."""
        self._columns = [*(self._columns or ["step"]), *new]
        if not self._path.is_file():
            write_atomic(self._path, _line(self._columns))
            return
        with self._path.open("rb") as rows:
            rows.readline()  # the header before
            self._replace(row for row in rows if row.endswith(b"\n"))

    def _rewrite(self, wanted: Callable[[list[str]], bool]) -> None:
        """Keep only the complete rows whose cells are `wanted`."""
        rows = self._path.read_bytes().splitlines(keepends=True)[1:]
        self._replace(row for row in rows if row.endswith(b"\n") and _is_row(row, wanted))

    def _replace(self, rows: Iterable[bytes]) -> None:
        """Replace the file by the header and these rows, on disk: a checkpoint may rely on them."""
        with open_atomic(self._path, flush=True) as file:
            file.write(_line(self._columns))
            file.writelines(rows)

    def _append(self, line: bytes) -> None:
        with self._path.open("ab", buffering=0) as file:
            written = file.write(line)
            if written < len(line):  # the disk is full: half a line would spoil the next
                file.truncate(file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()


def _is_row(line: bytes, wanted: Callable[[list[str]], bool]) -> bool:
    try:
        return wanted(next(csv.reader([line.decode()])))
    except (ValueError, KeyError, StopIteration, csv.Error):
        return False  # for example zeros after a power failure
