"""Tables: prompts of a .csv, .tsv, .jsonl or .parquet, and Hugging Face's pictures in .parquet.

Pictures become shards once, one for each row group, in the folder of copies (`data.cache_dir`).
From there they are read as all shards are: at random, by any number of processes.

    <hash>-<name>-00003.tar    the samples of row group 3, in the order of the rows
    <hash>-<name>.done.json    how many row groups there are: written when all are complete
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.data import stores
from distill.data.cache import PART, Cache, locked
from distill.data.write import write_shard
from distill.machine.faults import first_line
from distill.storage import formats
from distill.storage.atomic import write_atomic
from distill.storage.bounded import LINES, text_of
from distill.terminal.secret import masked
from distill.terminal.shown import shown

# Columns that are taken without being named, best first; also in upper case or plural, as those of
# PartiPrompts and DrawBench.
TEXTS = ("prompt", "caption", "text")
PLURALS = ("prompts", "captions", "texts")
CATEGORIES = ("category",)
PICTURES = ("image", "jpg", "png", "webp", "img")
READ = (".csv", ".tsv", ".jsonl", ".parquet")  # suffixes of tables of prompts
TEXT = re.compile(r"(dictionary<values=)?(large_)?string\b")  # types in Parquet
ROWS = 64  # ours: read at once, so that memory does not grow with a row group
SIGNATURES = {  # first bytes -> suffix
    b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif",
    b"MM\0*": "tif",
}  # fmt: skip


def is_table(path: str) -> bool:
    """Whether prompts at this path are read as a table, by its suffix."""
    return path.lower().endswith(READ)


def need_pyarrow(what: str) -> Any:
    """pyarrow.parquet. Raises ValueError, starting with `what`, if it is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{what}: pyarrow is not installed; pip install 'distill[parquet]'")
    import pyarrow.parquet

    return pyarrow.parquet


# -- prompts ---------------------------------------------------------------------------------------


def texts_of(
    path: str, key: str, column: str | None, category: str | None = None, labelled: bool = False
) -> tuple[list[str], list[str]]:
    """The texts of a column, and their categories; rows without text are left out.

    `key` is that of the path. Without a name the column is one of TEXTS, or the only one. The
    categories, which are read if `labelled`, are those of the column `category`; None: of
    CATEGORIES, or [] if there is no such column; an empty cell is "none". Raises ValueError, naming
    the key.
    """
    columns_key = f"{key.rpartition('.')[0]}.column".lstrip(".")
    try:
        rows = _READERS[Path(path).suffix.lower()](path, f"{key}={path}")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise unreadable(f"{key}={path}", "as a table", error) from None
    if not rows:
        raise ValueError(f"{key}={path}: has no rows; write one for each text")
    names = list(dict.fromkeys(name for row in rows for name in row))
    name = _column(names, column, (*TEXTS, *PLURALS), f"{key}={path}", columns_key)
    cells = [row.get(name) for row in rows]
    if odd := next((cell for cell in cells if not isinstance(cell, str | None)), None):
        what = f"its column {name} holds {shown(odd, 40)}, which is no text"
        raise ValueError(f"{key}={path}: {what}; name another by {columns_key}=")
    texts = [re.sub(r"\r\n?|\n", " ", cell or "").strip() for cell in cells]
    if not any(texts):
        raise ValueError(f"{key}={path}: its column {name} has no text; check it")
    labels: list[str] = []
    if labelled and (category is not None or _named(names, CATEGORIES)):
        labels_key = f"{key.rpartition('.')[0]}.category".lstrip(".")
        of_labels = _column(names, category, CATEGORIES, f"{key}={path}", labels_key)
        said = (_label(row.get(of_labels)) for row in rows)
        labels = [label for label, text in zip(said, texts, strict=True) if text]
    return [text for text in texts if text], labels


def unreadable(where: str, what: str, error: Exception) -> ValueError:
    """The error for a list of prompts that cannot be read; `where` is its key and path."""
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{where}: no such file; check the path")
    said, path = first_line(error, 200), where.partition("=")[2]
    if said.startswith(where):
        return ValueError(said)
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.strerror}); check the path"
    elif said.startswith(f"{path}: "):  # of a file that is too large, or no text
        said = f"{said.removeprefix(f'{path}: ').replace('; ', '); ', 1)}"
    else:
        said = f"{said}); repair it"
    return ValueError(f"{where}: cannot be read {what} ({said}")


def _label(cell: Any) -> str:
    """The category of a cell; "none" for an empty one."""
    return ("" if cell is None else str(cell)).strip() or "none"


def _named(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The columns with one of these names, the best first; else those in another case."""
    exact = [name for name in wanted if name in names]
    return exact or [n for w in wanted for n in names if str(n).casefold() == w]


def _column(
    names: Sequence[str], wanted: str | None, usual: Sequence[str], where: str, key: str
) -> str:
    """The column that is named, or one of the usual names, or the only one."""
    if wanted is not None and wanted in names:
        return wanted
    found = _named(names, usual if wanted is None else [wanted.casefold()])
    if len(found) > 1 and found[0].casefold() == found[1].casefold():
        what = f"has the columns {found[0]} and {found[1]}"
        raise ValueError(f"{where}: {what}; name one by {key}=")
    if found or (wanted is None and len(names) == 1):
        return (found or list(names))[0]
    has = f"only {', '.join(map(str, names))[:120]}" if names else "nothing"
    usual = [name for name in usual if name not in PLURALS]
    known = f"{', '.join(usual[:-1])} or {usual[-1]}" if usual[1:] else usual[0]
    lacks = known if wanted is None else wanted
    raise ValueError(f"{where}: has no column {lacks}, {has}; name one by {key}=")


def _of_csv(path: str, where: str) -> list[dict[str, Any]]:
    text, is_tsv = text_of(Path(path), LINES, "utf-8-sig"), path.lower().endswith(".tsv")
    try:
        rows = _separated(text, where, is_tsv, strict=True)
        # A cell with a tab is several: two prompts that begin and end with a quote, say.
        if not is_tsv or not any("\t" in (cell or "") for row in rows for cell in row.values()):
            return rows
    except csv.Error:
        if not is_tsv:
            raise
    # Tabs need no quotes: those of PartiPrompts.tsv are part of its prompts.
    return _separated(text, where, is_tsv, quoting=csv.QUOTE_NONE)


def _separated(text: str, where: str, is_tsv: bool, **options: Any) -> list[dict[str, Any]]:
    """The rows of a text of separated values. Raises ValueError if they do not fit its header."""
    lines = io.StringIO(text, newline="")
    read = csv.DictReader(lines, delimiter="\t" if is_tsv else ",", **options)
    names = read.fieldnames = [name.strip() for name in read.fieldnames or ()]
    other, suffix = (",", ".csv") if is_tsv else ("\t", ".tsv")
    if len(names) == 1 and other in names[0]:
        what = f"its first line, of the columns' names, is {shown(names[0], 40)}"
        raise ValueError(f"{where}: {what}; name a file with these separators {suffix}")
    rows = []
    for row in read:
        more = row.pop(None, ())  # cells after those of the last column
        if any(more) and not is_tsv:
            what = f"line {read.line_num} has more cells than there are columns"
            raise ValueError(f'{where}: {what}; write a text with commas in quotes, "a, b"')
        rows.append(dict(row))
    return rows


def _of_jsonl(path: str, where: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text_of(Path(path), LINES, "utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{where}: line {number} is no JSON; repair it") from None
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise ValueError(f"{where}: line {number} is no record; write {{...}} on each line")
        rows.append(row)
    return rows


def _of_parquet(path: str, where: str) -> list[dict[str, Any]]:
    parquet = need_pyarrow(where)
    file = parquet.ParquetFile(path)
    kept = [field.name for field in file.schema_arrow if TEXT.match(str(field.type))]
    if not kept:
        raise ValueError(f"{where}: has no column of texts; give another file")
    return [row for part in file.iter_batches(columns=kept) for row in part.to_pylist()]


_READERS = {".csv": _of_csv, ".tsv": _of_csv, ".jsonl": _of_jsonl, ".parquet": _of_parquet}


# -- pictures --------------------------------------------------------------------------------------


def check_tables(
    tables: Sequence[str | stores.Stored],
    image_column: str | None = None,
    caption_column: str | None = None,
) -> None:
    """Raise ValueError if pyarrow is not installed, or if a table of this disk is damaged or has no
    such columns. Pictures are not read.
    """
    for table in tables:
        where = table if isinstance(table, str) else masked(table.url)
        parquet = need_pyarrow(f"data.path={where}")
        if isinstance(table, str):
            try:
                schema = parquet.read_schema(table)
            except (OSError, ValueError) as error:
                raise ValueError(_unreadable(where, error)) from None
            _columns(schema, where, (image_column, caption_column))


def as_shards(
    tables: Sequence[str | stores.Stored],
    cache: Cache,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> list[str]:
    """The shards of these tables of pictures, in the order of files and row groups.

    Raises ValueError for tables that cannot be read or do not fit into the cache, and as
    `stores.ask`.
    """
    cache.make()
    made: list[str] = []
    for table in tables:
        made += _shards_of(table, cache, (image_column, caption_column), set(map(Path, made)))
    return made


def _shards_of(
    table: str | stores.Stored, cache: Cache, columns: tuple[str | None, ...], mine: set[Path]
) -> list[str]:
    if isinstance(table, str):
        about = os.stat(table)
        identity = (os.path.abspath(table), about.st_size, about.st_mtime_ns)
        name, size, where = os.path.basename(table), about.st_size, table
    else:
        identity = (table.url, table.size, table.mark)  # type: ignore[assignment]
        name, size, where = stores.name_of(table.url), table.size, masked(table.url)
    digest = hashlib.sha256(repr((identity, columns)).encode()).hexdigest()[:24]
    stem = cache.folder / f"{digest}-{name[-80:].removesuffix('.parquet')}"
    done = Path(f"{stem}.done.json")
    with locked(Path(f"{stem}.lock")):
        if (found := _complete(done, stem)) is not None:
            for path in found:
                os.utime(path)  # used now
            return found
        if not cache.room(size, mine):
            what = f"{where} takes {size / 1e9:.3g} GB as shards, and {cache.folder} is full"
            raise ValueError(f"data.cache_gb={cache.most / 1e9:g}: {what}; raise it, or empty that")
        if isinstance(table, str):
            groups = _convert(table, where, stem, columns)
        else:
            part = Path(f"{stem}{PART}")
            try:
                with part.open("wb") as file:
                    file.writelines(stores.blocks(table))
                groups = _convert(str(part), where, stem, columns)
            finally:
                part.unlink(missing_ok=True)
        write_atomic(done, json.dumps({"groups": groups}).encode())
    return [_shard(stem, group) for group in range(groups)]


def _shard(stem: Path, group: int) -> str:
    return f"{stem}-{group:05d}.tar"


def _complete(done: Path, stem: Path) -> list[str] | None:
    """The shards that were made; None if not all are there."""
    try:
        groups = int(json.loads(done.read_bytes())["groups"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    shards = [_shard(stem, group) for group in range(min(groups, 10**6))]
    return shards if all(map(os.path.isfile, shards)) else None


def _convert(path: str, where: str, stem: Path, columns: tuple[str | None, ...]) -> int:
    """Write a shard for each row group; returns how many."""
    parquet = need_pyarrow(f"data.path={where}")
    try:
        table = parquet.ParquetFile(path)
        picture, caption = _columns(table.schema_arrow, where, columns)
        row = 0
        for group in range(table.num_row_groups):
            wanted = [name for name in (picture, caption) if name]
            parts = table.iter_batches(ROWS, row_groups=[group], columns=wanted)
            rows = (each for part in parts for each in part.to_pylist())
            samples = _samples(rows, row, picture, caption)
            write_shard(_shard(stem, group), samples)
            row += table.metadata.row_group(group).num_rows
        return table.num_row_groups
    except (OSError, RecursionError) as error:  # pyarrow's errors are of ValueError and OSError
        raise ValueError(_unreadable(where, error)) from error
    except ValueError as error:
        raise ValueError(
            str(error) if str(error).startswith("data.") else _unreadable(where, error)
        ) from None


def _unreadable(where: str, error: Exception) -> str:
    return f"data.path={where}: cannot be read as Parquet ({first_line(error, 160)}); fetch it anew"


def _columns(schema: Any, where: str, columns: tuple[str | None, ...]) -> tuple[str, str | None]:
    """The columns of pictures and of captions; None if there are no captions."""
    place, (picture, caption) = f"data.path={where}", columns
    kinds = {field.name: str(field.type) for field in schema}
    held = [n for n, kind in kinds.items() if "binary" in kind]
    picture = _column(held, picture, PICTURES, f"{place} (bytes)", "data.image_column")
    texts = [n for n, kind in kinds.items() if "string" in kind and n != picture]
    if caption is None and not set(TEXTS) & set(texts) and len(texts) != 1:
        return picture, None
    return picture, _column(texts, caption, TEXTS, place, "data.caption_column")


def _samples(
    rows: Iterator[Mapping[str, Any]], first: int, picture: str, caption: str | None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and files of each row. A row without a picture has none, and counts as bad."""
    for number, row in enumerate(rows, first):
        files: dict[str, bytes] = {}
        cell = row[picture]
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        name = cell.get("path") if isinstance(cell, Mapping) else None
        if data:
            files[_suffix(data, name)] = data
        text = row.get(caption) if caption else None
        text = text[0] if isinstance(text, list) and text else text  # several: the first
        if isinstance(text, str):
            files["txt"] = text.encode("utf-8", "replace")
        yield f"{number:08d}", files or {"txt": b""}


def _suffix(data: bytes, name: str | None) -> str:
    """The suffix of a picture, by its first bytes or else by its name."""
    for mark, end in SIGNATURES.items():
        if data.startswith(mark):
            return end
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    end = str(name or "").rpartition(".")[2].lower()
    return end if end in formats.suffixes() else "png"
