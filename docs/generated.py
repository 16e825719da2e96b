"""Write the pages that repeat the code: commands, configuration keys, API.

They are written anew at every build of the documentation.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "distill"
CONF = ROOT / "conf"
COLUMNS = "100"  # of a help page
# Rooms of the package in the order of the documentation.
ROOMS = {
    "methods": "Methods",
    "teachers": "Teachers",
    "students": "Students",
    "discriminators": "Discriminators",
    "data": "Data",
    "sampling": "Sampling",
    "evaluation": "Evaluation",
}


def write(folder: Path) -> None:
    """Write `commands.md`, `configuration.md` and `api/` below the folder."""
    folder.mkdir(exist_ok=True)
    put(folder / "commands.md", "\n".join(commands()))
    put(folder / "configuration.md", "\n".join(configuration()))
    api = folder / "api"
    api.mkdir(exist_ok=True)
    for room, title in ROOMS.items():
        put(api / f"{room}.md", "\n".join(api_page(room, title)))
    put(api / "python.md", "\n".join(python_page()))


def write_notebooks(folder: Path) -> None:
    """A page for each notebook, beside it: its text and its code."""
    for file in sorted(folder.glob("*.ipynb")):
        put(file.with_suffix(".md"), "\n".join(notebook(file)))


def copy_studies(folder: Path) -> None:
    """Copy the files of experiments/ that pages show or link into the documentation."""
    for file in sorted((ROOT / "experiments").rglob("*")):
        if file.suffix in (".md", ".png", ".svg", ".csv", ".yaml", ".json"):
            to = folder / file.relative_to(ROOT / "experiments")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, to)


def at_home(app: object, page: str, source: list[str]) -> None:
    """Correct the links of a page. In the repository experiments/ lies beside docs/; in the built
    documentation it lies inside.
    """
    source[0] = re.sub(r"\]\((?:\.\./)+experiments/", "](/experiments/", source[0])
    source[0] = re.sub(r"\]\((?:\.\./)+docs/", "](/", source[0])
    # tests are no pages, so they are named and not linked
    source[0] = re.sub(
        r"\[([^\]]*)\]\((?:\.\./)+tests/(\w+)\.py(?: \"\w+\")?\)", r"\1 (`\2`)", source[0]
    )


def put(file: Path, text: str) -> None:
    """Write only what has changed: Sphinx reads a page again if its file is newer."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


# -- commands --------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    from distill import cli

    yield "# Commands\n"
    yield (
        "This page holds the help page of every command. `distill COMMAND` and"
        " `python -m distill.COMMAND` are the same command, and `--help` prints its page.\n"
    )
    for name in cli.COMMANDS:
        if name not in cli.NO_CONFIG:
            yield f"## {name}\n\n```text\n{help_page(name).rstrip()}\n```\n"


def help_page(command: str) -> str:
    arguments, sys.argv = sys.argv, [f"distill.{command}", "--help"]
    width, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), COLUMNS
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            importlib.import_module(f"distill.{command}").main()
    except SystemExit:
        pass
    finally:
        sys.argv = arguments
        os.environ.pop("COLUMNS")
        if width:
            os.environ["COLUMNS"] = width
    return said.getvalue()


# -- configuration ---------------------------------------------------------------------------------


def configuration() -> Iterator[str]:
    yield "# Configuration\n"
    yield (
        "This page lists every key of every group, with its default and its comment. It is made"
        " from the files below `conf/`.\n"
    )
    for folder in sorted(p for p in CONF.iterdir() if p.is_dir()):
        yield f"## {folder.name}\n"
        for file in sorted(folder.rglob("*.yaml")):
            name = file.relative_to(folder).as_posix().removesuffix(".yaml")
            yield f"### {folder.name}={name}\n"
            yield f"```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```\n"


# -- API -------------------------------------------------------------------------------------------


def api_page(room: str, title: str) -> Iterator[str]:
    yield f"# {title}\n"
    for module in modules(SOURCE / room):
        yield f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def python_page() -> Iterator[str]:
    """A table of the names of `import distill`, then the functions with their arguments."""
    import distill

    yield "# From Python\n\nThe names that `import distill` offers.\n"
    yield "| name | what | where |\n|---|---|---|"
    for name, where in distill.PUBLIC.items():
        module, _, there = where.partition(":")
        yield f"| `distill.{name}` | {summary(name)} | {{py:obj}}`distill.{module}.{there}` |"
    yield ""
    for module in [*modules(SOURCE / "api"), "distill.training.data_module"]:
        yield f"## `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def summary(name: str) -> str:
    """First sentence of the docstring of a public name, or of its module if it starts with Args."""
    import distill

    found = getattr(distill, name)
    said = inspect.cleandoc(found.__doc__ or "")
    if said.startswith("Args:"):
        said = inspect.cleandoc(sys.modules[found.__module__].__doc__ or "")
    first = " ".join(said.partition("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", first)[0].rstrip(".:").replace("|", "\\|")


# -- notebooks -------------------------------------------------------------------------------------


def notebook(file: Path) -> Iterator[str]:
    """The text and code cells of a notebook in their order, without outputs."""
    title, *cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    yield "".join(title["source"])
    yield f"\nThis page is a notebook: {{download}}`{file.name}`.\n"
    for cell in cells:
        text = "".join(cell["source"])
        yield f"```python\n{text}\n```\n" if cell["cell_type"] == "code" else f"{text}\n"


# -- modules ---------------------------------------------------------------------------------------


def modules(folder: Path) -> Iterator[str]:
    """Dotted names of the modules that define a public class or function."""
    for file in sorted(folder.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        defined = (n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef))
        if any(not node.name.startswith("_") for node in defined):
            parts = file.relative_to(SOURCE.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# -- docstrings ------------------------------------------------------------------------------------

LITERAL = re.compile(r"``.+?``|`[^`]+`")
SECTION = re.compile(r"^[A-Z][a-z]+:$")  # napoleon's: Args, Raises, Returns


def as_rst(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Turn a docstring into reStructuredText: `code` becomes a literal, stars and bars are escaped,
    indented passages become literal blocks.
    """
    found: list[str] = []
    kept = inside = False  # in an indented passage; below a section of napoleon's
    for number, line in enumerate(lines):
        if SECTION.match(line):
            inside = True
        elif line and not line.startswith(" "):
            inside = False
        indented = line.startswith("    ") and not inside
        if indented and not kept:
            found += [] if number and not lines[number - 1] else [""]
            found += ["::", ""]
        if not indented and kept and line:
            kept = False
            found += [""] if found[-1] else []
        kept = kept or indented
        found.append(line if indented else escaped(line))
    lines[:] = found


def escaped(line: str) -> str:
    place, text = 0, ""
    for literal in LITERAL.finditer(line):
        text += marks(line[place : literal.start()]) + f"``{literal[0].strip('`')}``"
        place = literal.end()
    return text + marks(line[place:])


def marks(text: str) -> str:
    """Escape what reStructuredText would read as emphasis, a reference or a substitution."""
    return re.sub(r"([*|\\]|(?<=\w)_(?=\W|$))", r"\\\1", text)
