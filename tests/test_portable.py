"""What must hold on every system and in every locale: text is UTF-8, and nothing needs a POSIX system."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What `open` is called on that opens no text file.
OTHERS = ("Image", "tarfile", "os", "self")
PROCESSES = ("run", "Popen", "check_output")


def without_encoding(source: str) -> Iterator[int]:
    """The line of each call that reads or writes text in the locale's encoding.

    Calls are known by their names alone. Ruff's PLW1514 knows the types, but only where it can infer
    them, which of `folder / "run.json"` it cannot.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        of, _, name = ast.unparse(node.func).rpartition(".")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in keywords:
            continue
        if name == "open":
            mode = keywords.get("mode") or next(
                iter(node.args[0 if of else 1 :]), ast.Constant("r")
            )
            text = of not in OTHERS and "b" not in ast.literal_eval(mode)
        elif name in PROCESSES:
            text = "text" in keywords
        else:
            text = name in ("read_text", "write_text")
        if text:
            yield node.lineno


def test_every_text_file_is_utf8_whatever_the_locale():
    folders = ("src", "benchmarks", "experiments", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(files)
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found, f'add encoding="utf-8": {", ".join(found)}'


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, mode='rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open()", True),
        ("(folder / 'a').open('w')", True),
        ("path.open('rb')", False),
        ("Image.open(file)", False),
        ("(folder / 'a').read_text()", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command)", False),
    ],
)
def test_text_without_an_encoding_is_found(source, found):
    assert bool(list(without_encoding(source))) is found
