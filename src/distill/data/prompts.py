"""Captions alone, for methods whose teacher generates the samples."""

from typing import Any

from torch import Tensor

from distill.data.datasets import Samples, Size
from distill.data.lines import Lines


class Prompts(Samples):
    """Captions alone, one per line of a text file, or of a column of a table."""

    def __init__(self, path: str, *, column: str | None = None, **options: Any):
        self.column = column
        super().__init__(path, **options)

    def open(self, path: str) -> Lines:
        return Lines(path, column=self.column)

    def tensors(self, sample: dict, bucket: Size | None) -> dict[str, Tensor]:
        return {}
