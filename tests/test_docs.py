"""The documentation names what there is: its commands compose, its links lead somewhere, the README
stays short.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import tiny
from distill import cli
from distill.commandline.quoting import as_typed, for_hydra
from distill.config.location import CONF_DIR

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Written at every build, and not by hand.
GENERATED = (
    "look_up/commands.md",
    "look_up/configuration.md",
    "look_up/api/",
    "experiments/",
    "notebooks/",
    "_build/",
)
PAGES = [
    p for p in PAGES if not p.as_posix().removeprefix(f"{DOCS.as_posix()}/").startswith(GENERATED)
]
# Other pages of the repository, whose links must lead somewhere too.
OTHERS = [*sorted(ROOT.glob("[CS]*.md")), *sorted((ROOT / "experiments").rglob("*.md"))]
FENCE = re.compile(r"^```(\S*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^|-m )distill[. ](\w+)(.*)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)\s]+)\)")


def commands() -> list[tuple[str, str]]:
    """Page and command line, of every block of code."""
    found = []
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language not in ("", "sh", "bash", "text"):
                continue
            lines = block.replace("\\\n", " ").splitlines()
            found += [
                (page.relative_to(ROOT).as_posix(), line.partition("  #")[0].strip())
                for line in lines
                if re.search(r"(^|\s)-m distill\.\w+", line) and "torchrun" not in line
            ]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_a_page_composes(page, line):
    """Its groups, options and keys exist.

    What it does is shown in test_readme.py for the pages on real models.
    """
    words = shlex.split(line)
    module = next(word for word in words if word.startswith("distill."))
    name = module.removeprefix("distill.")
    arguments = words[words.index(module) + 1 :]
    assert name in cli.COMMANDS
    if name in cli.NO_CONFIG or {"--help", "--config-dir"} & set(arguments):
        return
    config = cli.config_of(name)
    sweep = "-m" in arguments
    typed = [as_typed(word) for word in arguments if word != "-m" and not word.startswith("hydra/")]
    if sweep:  # of a list of values the first
        typed = [re.sub(r"^([\w./@]+=)([^\[{,']+),.*$", r"\1\2", word) for word in typed]
    else:  # a list, where the command says that its key holds one
        typed = [re.sub(r"^(steps=)(\d[\d,]+)$", r"\1[\2]", word) for word in typed]
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        compose(
            config,
            overrides=[for_hydra(word, config) for word in typed if "=" in word or "~" in word],
        )


def anchors(page: Path) -> set[str]:
    """The names by which links reach the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, *OTHERS], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_links_to_a_heading_find_it(page):
    for target, name in ANCHOR.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert name in anchors(page.parent / target if target else page), f"{target}#{name}"


@pytest.mark.parametrize(
    "page", [*PAGES, *OTHERS], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if (
            "://" not in target
            and not target.endswith(("look_up/commands.md", "look_up/api/python.md"))
            and target != "commands.md"
        ):
            assert (page.parent / target).exists(), target


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_stands_in_the_table_of_contents():
    listed = (DOCS / "index.md").read_text(encoding="utf-8").split()
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix().removeprefix("docs/").removesuffix(".md")
        if page.parent != ROOT and name != "index":
            assert name in listed, name


SHOWN = re.compile(r"```\{literalinclude\} (\S+)\n:pyobject: (\S+)\n```")


def functions(file: Path) -> set[str]:
    """Dotted names of a module's classes, functions and methods."""
    found: set[str] = set()

    def enter(node: ast.AST, before: str) -> None:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ClassDef | ast.FunctionDef):
                found.add(before + inner.name)
                enter(inner, f"{before}{inner.name}.")

    enter(ast.parse(file.read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_that_a_page_shows_is_there(page):
    text = page.read_text(encoding="utf-8")
    shown = SHOWN.findall(text)
    assert len(shown) == text.count("{literalinclude}")
    for file, name in shown:
        assert name in functions((page.parent / file).resolve()), f"{file}: {name}"


WALK = re.compile(r"^\| \[(\S+\.py)\]\((\S+)\) \| `(\S+)` \|", re.MULTILINE)


def called_first(run: Callable[[], object]) -> list[tuple[str, str]]:
    """(file below src/distill, function) in the order in which `run` first calls each."""
    package = f"{ROOT / 'src' / 'distill'}{os.sep}"
    found: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            file = Path(code.co_filename.removeprefix(package)).as_posix()
            found.setdefault((file, code.co_qualname))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(found)


def test_the_walk_through_a_step_is_as_the_page_says(teachers, tmp_path):
    """Every function of the page's table is called in a LADD step, in this order; ten files at
    most.
    """
    rows = WALK.findall((DOCS / "understand" / "architecture.md").read_text(encoding="utf-8"))
    assert rows
    assert all(link == f"../../src/distill/{file}" for file, link, _ in rows)
    walk = [(file, function) for file, _, function in rows]
    assert len({file for file, _ in walk}) <= 10
    teacher = teachers("mmdit")
    method = tiny.ladd(teacher)
    batch = {"x0": torch.randn(2, *teacher.latent_shape), "caption": tiny.CAPTIONS[:2]}
    trainer = tiny.trainer(tmp_path, 1)
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    order = called_first(lambda: trainer.fit(method, loader))
    assert [call for call in order if call in walk] == walk
