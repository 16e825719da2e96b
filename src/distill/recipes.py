"""List the shipped experiments and recipes, or copy one to edit it.

    distill recipes
    distill recipes copy sdxl_turbo
    distill recipes copy add_shapes as=my_add to=conf
    python -m distill.run --config-dir conf method=add recipe=my_add

to=conf       the folder that --config-dir is given; the copy goes to its experiment/ or recipe/
as=NAME_mine  the name of the copy
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.commandline import comments
from distill.config.compose import nearest
from distill.config.errors import print_mistakes
from distill.config.location import CONF_DIR
from distill.storage.atomic import write_text_atomic
from distill.terminal.console import tolerate_closed_pipes

GROUPS = ("experiment", "recipe")
COLUMN = 30  # characters before the description of an experiment


def names(group: str = "experiment") -> list[str]:
    """Every shipped option of this group, those of a folder as `folder/name`."""
    shipped = Path(CONF_DIR) / group
    files = shipped.rglob("*.yaml")
    return sorted(file.relative_to(shipped).with_suffix("").as_posix() for file in files)


def groups() -> dict[str, str]:
    """Name -> group, of every experiment and recipe."""
    return {name: group for group in GROUPS for name in names(group)}


def listing() -> str:
    """A line for each experiment and recipe: the first sentence of its header."""
    lines = []
    for group in GROUPS:
        lines += [f"python -m distill.run {group}=<name>", *_lines(group), ""]
    return "\n".join([*lines, "distill recipes copy NAME puts one into ./conf to edit"])


def _lines(group: str) -> Iterator[str]:
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    before = None
    for name in sorted(names(group), key=lambda name: ("/" in name, name)):
        folder = name.rpartition("/")[0]
        if folder != before:
            yield ""
        before = folder
        header = comments.summary(Path(CONF_DIR) / group / f"{name}.yaml")
        yield f"  {name:{COLUMN}}  {textwrap.shorten(header, width, placeholder=' ...')}"


def copy(name: str, to: str = "conf", new: str | None = None) -> Path:
    """Write a copy of an experiment into `to`/experiment, or of a recipe into `to`/recipe; returns
    the file.

    Raises ValueError for a name that there is not, and where something is already.
    """
    known = groups()
    if name not in known:
        near = nearest(name, known)
        raise ValueError(f"copy {name}: no such recipe{near}; `distill recipes` lists all")
    new = new or f"{name}_mine"
    if new in known:
        raise ValueError(f"as={new}: a shipped recipe has this name; choose another")
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*", new):
        raise ValueError(f"as={new}: must be letters, digits, _ and -, with / for a folder")
    file = Path(to).expanduser() / known[name] / f"{new}.yaml"
    if file.exists():
        raise ValueError(f"{file}: exists already; give the copy another name with as=")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, _text(known[name], name, new, to))
    return file


def _text(group: str, name: str, new: str, to: str) -> str:
    """The file under its new name."""
    text = (Path(CONF_DIR) / group / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.replace(f"{group}={name}", f"--config-dir {to} {group}={new}")
    text = re.sub(r"(?m)^name: .*$", f"name: {new.replace('/', '_')}", text)
    # Files of the same folder are named with the folder, since the copy may lie elsewhere.
    folder = f"/experiment/{name}".rpartition("/")[0]
    return re.sub(r"(?m)^  - (?!_self_)(\w+)$", lambda m: f"  - {folder}/{m[1]}@_global_", text)


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
    name = positional[1]
    group = groups()[name]
    new = file.relative_to(Path(to).expanduser() / group).with_suffix("").as_posix()
    return f"wrote {file}\npython -m distill.run --config-dir {to} {_chosen(group, name, new)}"


def _chosen(group: str, name: str, new: str) -> str:
    """How a run chooses the copy; a recipe goes with the method that its name starts with."""
    method = name.partition("_")[0]
    with_method = group == "recipe" and method in names("method")
    return f"{f'method={method} ' if with_method else ''}{group}={new}"


if __name__ == "__main__":
    sys.exit(main())
