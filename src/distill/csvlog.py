"""`metrics.csv`: one table over the whole run, kept on resume (Lightning's CSVLogger deletes what it finds)."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from distill.files import put

FLUSH = 20  # rows between writes


class CsvLog(Logger):
    """Rows {step, name: value}, written whole and atomically, with every column seen so far."""

    name, version = "csv", ""

    def __init__(self, save_dir: str):
        super().__init__()
        self._path = Path(save_dir) / "metrics.csv"
        self._rows: list[dict[str, Any]] = []
        self._earlier = self._path.is_file()
        if self._earlier:
            with self._path.open(newline="", encoding="utf-8") as file:
                self._rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._earlier:  # what the stopped run logged after its last checkpoint is done again
            self._rows = [row for row in self._rows if int(row["step"]) < (step or 0)]
            self._earlier = False
        self._rows.append({**metrics, "step": step or 0})
        if len(self._rows) % FLUSH == 0:
            self.save()

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Nothing: config.yaml has it all."""

    @rank_zero_only
    def save(self) -> None:
        columns = ["step", *sorted({key for row in self._rows for key in row} - {"step"})]
        writer = csv.DictWriter(table := io.StringIO(newline=""), columns)
        writer.writeheader()
        writer.writerows(self._rows)
        put(self._path, table.getvalue().encode())

    def finalize(self, status: str) -> None:
        self.save()
