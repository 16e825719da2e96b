"""Captions alone: the lines of a text file, a column of a table, or a list."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from distill.data.tables import is_table, texts_of, unreadable
from distill.storage.bounded import LINES, text_of


class Lines:
    """The lines of a text file that are not blank, those of a column of a table (`tables`), or the
    texts of a list, as raw samples.

    `labels`, read if `labelled`, are the categories of a table's lines; [] without such a column.
    Raises ValueError, naming `key`, if there are no lines.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        key: str = "data.path",
        column: str | None = None,
        category: str | None = None,
        labelled: bool = False,
    ):
        table = isinstance(path, str) and is_table(path)
        self.labels: list[str] = []
        for name, value in (("column", column), ("category", category)):
            if value is not None and not table:
                what = "are read of a .csv, .tsv, .jsonl or .parquet; leave it out"
                where = f"{key.rpartition('.')[0]}.{name}={value}"
                raise ValueError(f"{where}: columns {what}".lstrip("."))
        if table:
            self.path = str(path)
            self.lines, self.labels = texts_of(self.path, key, column, category, labelled)
            return
        if not isinstance(path, str):
            self.path, self.lines = key, [str(text) for text in path]
            if not self.lines:
                raise ValueError(f'{key}=[]: has no text; write ["one","two"], each in quotes')
            return
        try:
            text = text_of(Path(path), LINES, "utf-8-sig")
        except (OSError, ValueError) as error:
            raise unreadable(f"{key}={path}", "as lines of UTF-8 text", error) from None
        lines = text.split("\n")  # splitlines knows ten more separators
        self.path, self.lines = path, [line.strip() for line in lines if line.strip()]
        if not self.lines:
            raise ValueError(
                f"{key}={path}: has no line that is not blank; write one prompt a line"
            )

    def __len__(self) -> int:
        return len(self.lines)

    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()

    def read(self, i: int, at_most: int = -1) -> dict:
        return {"__url__": self.path, "__key__": str(i), "txt": self.lines[i].encode()}
