"""Tables: prompts of .csv, .tsv, .jsonl and .parquet, and Hugging Face's pictures in .parquet."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import source, stores
from distill.data.cache import Cache
from distill.data.lines import Lines

TEXTS = ["a red star", 'a "blue" ring, thin', "zwei Kreise\nübereinander"]
READ = ["a red star", 'a "blue" ring, thin', "zwei Kreise übereinander"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stores.listed.cache_clear()


def table(folder: Path, end: str, column: str = "prompt", texts=TEXTS) -> str:
    """A table with this column, and another one of texts."""
    import csv

    file = folder / f"p.{end}"
    rows = [{"id": str(i), column: text} for i, text in enumerate([*texts, None, "  "])]
    if end in ("csv", "tsv"):
        with file.open("w", newline="", encoding="utf-8-sig") as opened:
            writer = csv.DictWriter(opened, ["id", column], delimiter="\t" if end == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif end == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        file.write_text("\n".join(lines), encoding="utf-8")
    else:
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), file)
    return str(file)


# -- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", [None, "words"])
def test_the_texts_of_a_column(end, column, tmp_path):
    found = Lines(table(tmp_path, end, column or "caption"), column=column)
    assert found.lines == READ
    found = source.prompts(found.path, batch_size=3, column=column)
    assert sorted(next(iter(found.loader(seed=0)))["caption"]) == sorted(READ)


def test_lines_that_are_texts_and_tables_of_one_column(tmp_path):
    (tmp_path / "a.jsonl").write_text('"one"\n\n"two"\n', encoding="utf-8")
    assert Lines(str(tmp_path / "a.jsonl")).lines == ["one", "two"]
    (tmp_path / "b.csv").write_text("words\none\ntwo\n", encoding="utf-8")
    assert Lines(str(tmp_path / "b.csv")).lines == ["one", "two"]


PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "bond\tAbstract\tBasic\tseveral meanings\n"
    '"G O" painted on a wall\tIllustrations\tWriting & Symbols\t\n'
    'the words "Fly" on a wall\tOutdoor Scenes\tComplex\t\n'
)
DRAW = 'Prompts,Category\nA red car.,Colors\n"A car, and a dog.",Conflicting\n'


def test_lists_of_prompts_are_read_as_they_are_published(tmp_path):
    (parti := tmp_path / "PartiPrompts.tsv").write_text(PARTI, encoding="utf-8")
    found = Lines(str(parti), "metrics.path", labelled=True)
    assert found.lines == ["bond", '"G O" painted on a wall', 'the words "Fly" on a wall']
    assert found.labels == ["Abstract", "Illustrations", "Outdoor Scenes"]
    other = Lines(str(parti), "metrics.path", "prompt", "challenge", labelled=True)
    assert other.labels == ["Basic", "Writing & Symbols", "Complex"]
    (draw := tmp_path / "DrawBench.csv").write_text(DRAW, encoding="utf-8")
    found = Lines(str(draw), "metrics.path", labelled=True)
    assert found.lines == ["A red car.", "A car, and a dog."]
    assert found.labels == ["Colors", "Conflicting"]
    assert Lines(str(draw), "prompts").labels == []  # nobody asked
    with pytest.raises(ValueError, match=r"has no column topic, .* name one by metrics\.category="):
        Lines(str(draw), "metrics.path", None, "topic", labelled=True)
    draw.write_text("Prompt,PROMPT\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has the columns Prompt and PROMPT; name one by"):
        Lines(str(draw), "metrics.path")


@pytest.mark.parametrize(
    ("content", "lines", "labels"),
    [
        (
            'prompt\tcategory\r\n5" nail, new\tA, B\r\nb\t\r\n',
            ['5" nail, new', "b"],
            ["A, B", "none"],
        ),
        ("\ufeffprompt\tcategory\na\tA\nb\nc\t  \n", ["a", "b", "c"], ["A", "none", "none"]),
        ('prompt\tcategory\n"a ""b"" c"\tA\n"d\r\ne"\t"B"\n', ['a "b" c', "d e"], ["A", "B"]),
        # quotes that are part of two prompts, and read as marks join their rows
        ('prompt\tcategory\n"a" or\tA\n"b\tB\nc"\tC\n', ['"a" or', '"b', 'c"'], ["A", "B", "C"]),
        ('prompt\tcategory\n"b\tB\nc"\tC\n', ['"b', 'c"'], ["B", "C"]),
        (" prompt \t Category \n a \t A \n", ["a"], ["A"]),
        ("prompt\tcategory\tnote\na\tA\n", ["a"], ["A"]),
    ],
)
def test_categories_of_prompts_that_tabs_separate(content, lines, labels, tmp_path):
    (file := tmp_path / "x.tsv").write_bytes(content.encode())
    found = Lines(str(file), "metrics.path", labelled=True)
    assert (found.lines, found.labels) == (lines, labels)


@pytest.mark.parametrize(
    ("content", "end", "column", "said"),
    [
        (
            "id,words\n1,one\n",
            "csv",
            None,
            "has no column prompt, caption or text, only id, words;",
        ),
        (
            "id,words\n1,one\n",
            "csv",
            "word",
            "has no column word, only id, words; name one by data.",
        ),
        ("id,text\n1,\n", "csv", None, "its column text has no text; check it"),
        ('{"text": 3}\n', "jsonl", None, "its column text holds 3, which is no text; name another"),
        ('{"text": "a"}\n{oh\n', "jsonl", None, "line 2 is no JSON; repair it"),
        ("[1]\n", "jsonl", None, "line 1 is no record; write {...} on each line"),
        ("", "csv", None, "has no rows; write one for each text"),
        ("prompt\n", "csv", None, "has no rows; write one for each text"),
        (
            "prompt,id\na cat, a dog,1\n",
            "csv",
            None,
            "line 2 has more cells than there are columns; ",
        ),
        ("prompt,category\na,A\n", "tsv", None, "separators .csv"),
        ("prompt\tcategory\na\tA\n", "csv", None, "separators .tsv"),
        ('text\n"open\n', "csv", None, "cannot be read as a table ("),
        ("no parquet", "parquet", None, "cannot be read as a table ("),
        ("a\n", "txt", "text", "data.column=text: columns are read of a .csv, .tsv, .jsonl or"),
    ],
)
def test_a_table_that_is_wrong(content, end, column, said, tmp_path):
    if end == "parquet":
        pytest.importorskip("pyarrow")
    (file := tmp_path / f"x.{end}").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="data") as error:
        Lines(str(file), column=column)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_commands_take_tables_and_name_the_column(command, pipelines, tmp_path):
    path = table(tmp_path, "csv", "words")
    given = [f"run={pipelines('mmdit')}", f"prompts={path}", "out=pictures"]
    code, _, err = command("sample", *given)
    assert code == 1
    assert (
        f"prompts={path}: has no column prompt, caption or text, only id, words; name one by" in err
    )
    assert "column=" in err
    code, _, err = command("sample", *given, "column=words", "guidance=5", "steps=2", "size=64")
    assert code == 0, err
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 3
    words = ["data=prompts", f"data.path={path}", "data.column=words", f"metrics.path={path}"]
    words += ["metrics=prompts", "metrics.column=words", f"callbacks.samples.prompts={path}"]
    teacher = [f"teacher.path={pipelines('mmdit')}", "debug=smoke", "--cfg", "job"]
    code, _, err = command("run", *teacher, *words, "callbacks.samples.column=words")
    assert code == 0, err


def test_parquet_without_its_package(tmp_path, monkeypatch):
    import importlib.util

    path = table(tmp_path, "parquet")
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "pyarrow" else own(n, *a)
    )
    with pytest.raises(ValueError, match=r"pyarrow is not installed; pip install 'distill\[parq"):
        Lines(path)
    with pytest.raises(ValueError, match=r"data\.path=.*pyarrow is not installed; pip install"):
        source.images(path, size=8, batch_size=2)


# -- pictures --------------------------------------------------------------------------------------


def picture(number: int, form: str) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), form)
    return file.getvalue()


ROWS = [
    {
        "id": i,
        "image": {"bytes": picture(i, ("PNG", "JPEG", "WEBP")[i % 3]), "path": f"{i}.x"},
        "text": f"caption {i}",
    }
    for i in range(20)
]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A data set as Hugging Face keeps it: two files, in row groups of three rows."""
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("hf")
    (folder / "data").mkdir()
    for part in range(2):
        file = folder / "data" / f"train-0000{part}-of-00002.parquet"
        rows = ROWS[part * 10 : part * 10 + 10]
        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), file, row_group_size=3)
    (folder / "README.md").write_text("A data set.", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def as_tars(tmp_path_factory):
    """The same samples as shards: one for each row group."""
    from distill.data.write import write_shard

    folder = tmp_path_factory.mktemp("tars")
    ends = ("png", "jpg", "webp")
    for part, group in itertools.product(range(2), range(4)):
        numbers = range(part * 10 + 3 * group, min(part * 10 + 3 * group + 3, part * 10 + 10))
        samples = (
            (f"{i - part * 10:08d}", {ends[i % 3]: ROWS[i]["image"]["bytes"],
                                      "txt": ROWS[i]["text"].encode()})
            for i in numbers
        )  # fmt: skip
        write_shard(folder / f"{part}-{group}.tar", samples)
    return folder


def batches(path, count=9, workers=0, order=None, **options):
    keys = {"seed": 3, "rank": 0, "world": 1, "start": 0} | (order or {})
    data = source.images(str(path), size=16, batch_size=4, num_workers=workers, **options)
    return list(itertools.islice(data.loader(**keys), count)), data.dataset


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a["caption"] == b["caption"]
        assert torch.equal(a["pixels"], b["pixels"])


@pytest.mark.parametrize(
    "order", [{}, {"start": 4}, {"rank": 1, "world": 2}], ids=["fresh", "resumed", "second rank"]
)
def test_pictures_as_of_shards_in_the_same_order(order, tables, as_tars):
    found, data = batches(tables, order=order)
    expected, tars = batches(as_tars, order=order)
    same(found, expected)
    assert len(data) == len(ROWS)
    assert data.shards.digest() == tars.shards.digest()


def test_patterns_and_stores(tables, as_tars):
    expected, _ = batches(as_tars)
    fs = fsspec.filesystem("memory")
    for file in tables.rglob("*.parquet"):
        fs.pipe_file(f"/hf/data/{file.name}", file.read_bytes())
    for path in (f"{tables}/data/*.parquet", "memory://hf", "memory://hf/data/*.parquet"):
        same(batches(path)[0], expected)
    same(batches("memory://hf", workers=2)[0], expected)
    fs.rm("/hf", recursive=True)


def test_they_are_written_out_once(tables, tmp_path):
    batches(tables)
    place = tmp_path / "cache" / "distill" / "shards"
    times = {path: path.stat().st_ctime_ns for path in place.glob("*.json")}
    before = {path.name: path.stat().st_ino for path in place.glob("*.tar")}
    batches(tables)
    assert {path.name: path.stat().st_ino for path in place.glob("*.tar")} == before
    assert {path: path.stat().st_ctime_ns for path in place.glob("*.json")} == times


def test_tables_that_cannot_be_used(tables, tmp_path):
    with pytest.raises(
        ValueError, match=r"data\.cache_gb=1e-08: .* GB as shards, .*; raise it, or"
    ):
        batches(tables, cache_gb=1e-8)
    with pytest.raises(ValueError, match=r"has no column jpeg, only image; .* data\.image_column="):
        batches(tables, image_column="jpeg")
    with pytest.raises(ValueError, match="has no column words, only text; .* data.caption_column"):
        batches(tables, caption_column="words")
    (cut := tmp_path / "cut.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(ValueError, match=r"cut\.parquet: cannot be read as Parquet \("):
        batches(cut)
    with pytest.raises(FileNotFoundError, match=r"no\*\.parquet: no file matches; check"):
        batches(tmp_path / "no*.parquet")


def test_columns_by_name_and_rows_without_a_picture(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [
        {"raw": picture(i, "PNG") if i else None, "a": "no", "b": [f"b {i}", "other"]}
        for i in range(30)
    ]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    options = {"image_column": "raw", "caption_column": "b"}
    found, data = batches(tmp_path / "x.parquet", **options)
    assert all(caption.startswith("b ") for batch in found for caption in batch["caption"])
    assert len(data.bad) == 1


def test_texts_that_a_table_holds_as_categories_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as arrow

    words = arrow.array(["a star", "a ring", "a star"]).dictionary_encode()
    pyarrow.write_table(arrow.table({"prompt": words}), tmp_path / "x.parquet")
    assert Lines(str(tmp_path / "x.parquet")).lines == ["a star", "a ring", "a star"]


@pytest.mark.parametrize("most", [float("nan"), float("inf"), -1, True])
def test_what_copies_may_take_is_a_number(most):
    with pytest.raises(ValueError, match="data.cache_gb=.*: must be a finite number of at least 0"):
        Cache.of(None, most)
