"""List the shipped experiments, or copy one to edit it. A copy of one that rests on conf/recipe has
its values too.

    distill recipes
    distill recipes copy sdxl_turbo
    distill recipes copy add_shapes as=my_add to=conf
    python -m distill.run --config-dir conf experiment=my_add

to=conf       the folder that --config-dir is given; the copy goes to its experiment/
as=NAME_mine  the name of the copy
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from distill.commandline import comments
from distill.config.compose import nearest
from distill.config.errors import print_mistakes
from distill.config.location import CONF_DIR
from distill.storage.atomic import write_text_atomic
from distill.terminal.console import tolerate_closed_pipes

SHIPPED = Path(CONF_DIR) / "experiment"
COLUMN = 30  # characters before the description of an experiment


def names() -> list[str]:
    """The names of all shipped experiments; those in a folder are `folder/name`."""
    files = SHIPPED.rglob("*.yaml")
    return sorted(file.relative_to(SHIPPED).with_suffix("").as_posix() for file in files)


def listing() -> str:
    """A line for each experiment: the first sentence of its header."""
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    lines = ["python -m distill.run experiment=<name>"]
    folder = ""
    for name in sorted(names(), key=lambda name: ("/" in name, name)):
        lines += [""] if not lines[1:] or name.rpartition("/")[0] != folder else []
        folder = name.rpartition("/")[0]
        summary = comments.summary(SHIPPED / f"{name}.yaml")
        summary = textwrap.shorten(summary, width, placeholder=" ...")
        lines.append(f"  {name:{COLUMN}}  {summary}")
    return "\n".join(
        [*lines, "", "distill recipes copy NAME puts one into conf/experiment to edit"]
    )


def copy(name: str, to: str = "conf", new: str | None = None) -> Path:
    """Write a copy of an experiment into `to`/experiment; returns the file.

    Raises ValueError for an unknown experiment, and if the file exists already.
    """
    known = names()
    if name not in known:
        near = nearest(name, known)
        raise ValueError(f"copy {name}: no such recipe{near}; `distill recipes` lists all")
    new = new or f"{name}_mine"
    if new in known:
        raise ValueError(f"as={new}: a shipped recipe has this name; choose another")
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", new):
        raise ValueError(f"as={new}: must be letters, digits, _ and -, with / for a folder")
    file = Path(to).expanduser() / "experiment" / f"{new}.yaml"
    if file.exists():
        raise ValueError(f"{file}: exists already; give the copy another name with as=")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, _text(name, new, to))
    return file


def _text(name: str, new: str, to: str) -> str:
    """The text of the experiment under its new name, with the values of its recipe."""
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.replace(f"experiment={name}", f"--config-dir {to} experiment={new}")
    text = re.sub(r"(?m)^name: .*$", f"name: {new.replace('/', '_')}", text)
    # Files of the same folder are named with the folder, since the copy may lie elsewhere.
    folder = f"/experiment/{name}".rpartition("/")[0]
    text = re.sub(r"(?m)^  - (?!_self_)(\w+)$", lambda m: f"  - {folder}/{m[1]}@_global_", text)
    recipe = Path(CONF_DIR) / "recipe" / f"{name}.yaml"
    if not recipe.is_file():
        return text
    values = recipe.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
    return f"{text}\n{values}"


def main() -> int:
    """The command `distill recipes`; returns the exit code."""
    arguments = sys.argv[1:]
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(__doc__.rstrip())
        return 0
    with tolerate_closed_pipes(), print_mistakes():
        print(answer(arguments))
    return 0


def answer(arguments: Sequence[str]) -> str:
    """The output for these arguments. Raises ValueError for unknown ones."""
    if not arguments:
        return listing()
    options = dict(argument.partition("=")[::2] for argument in arguments if "=" in argument)
    positional = [argument for argument in arguments if "=" not in argument]
    if len(positional) != 2 or positional[0] != "copy" or set(options) - {"to", "as"}:
        usage = "use `distill recipes copy NAME [to=conf] [as=NAME]`"
        raise ValueError(f"{' '.join(arguments)}: {usage}")
    to = options.get("to") or "conf"
    file = copy(positional[1], to, options.get("as"))
    new = file.relative_to(Path(to).expanduser() / "experiment").with_suffix("").as_posix()
    return f"wrote {file}\npython -m distill.run --config-dir {to} experiment={new}"


if __name__ == "__main__":
    sys.exit(main())
