"""The page on what goes wrong: each of its rows names a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "look_up" / "troubleshooting_runs.md"
LINK = re.compile(r'\[[^\]]+\]\(([^ )]+) "(test_\w+)"\) \|$')


def test_every_row_links_a_test_that_exists():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| symptom")]
    assert len(rows) > 40
    known: dict[Path, set[str]] = {}
    for row in rows:
        assert row.count(" | ") == 3, row
        found = LINK.search(row)
        assert found, f"no test: {row}"
        file = (PAGE.parent / found[1]).resolve()
        if file not in known:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
            known[file] = {function.name for function in functions}
        assert found[2] in known[file], f"{found[1]} has no {found[2]}"
