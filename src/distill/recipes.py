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
COLUMN = 30  # characters before what is said of an experiment


def names() -> list[str]:
    """Every shipped experiment, those of a folder as `folder/name`."""
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
        said = textwrap.shorten(
            comments.summary(SHIPPED / f"{name}.yaml"), width, placeholder=" ..."
        )
        lines.append(f"  {name:{COLUMN}}  {said}")
    return "\n".join(
        [*lines, "", "distill recipes copy NAME puts one into conf/experiment to edit"]
    )


def copy(name: str, to: str = "conf", new: str | None = None) -> Path:
    """Write a copy of an experiment into `to`/experiment; returns the file.

    Raises ValueError for an experiment that there is not, and where something is already.
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
        raise ValueError(f"{file}: is there already, and stays; name the copy with as=")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(file, _text(name, new, to))
    return file


def _text(name: str, new: str, to: str) -> str:
    """The experiment under its new name, with the values of the recipe that its method has in its
    world.
    """
    text = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.replace(f"experiment={name}", f"--config-dir {to} experiment={new}")
    text = re.sub(r"(?m)^name: .*$", f"name: {new.replace('/', '_')}", text)
    # What another file of the same folder gives is named with the folder: the copy may lie
    # elsewhere.
    folder = f"/experiment/{name}".rpartition("/")[0]
    text = re.sub(r"(?m)^  - (?!_self_)(\w+)$", lambda m: f"  - {folder}/{m[1]}@_global_", text)
    recipe = Path(CONF_DIR) / "recipe" / f"{name}.yaml"
    if not recipe.is_file():
        return text
    values = recipe.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
    return f"{text}\n{values}"


def main() -> int:
    """The command `distill recipes`; returns the exit code."""
    words = sys.argv[1:]
    if not {"-h", "--help"}.isdisjoint(words):
        print(__doc__.rstrip())
        return 0
    with tolerate_closed_pipes(), print_mistakes():
        print(answer(words))
    return 0


def answer(words: Sequence[str]) -> str:
    """What is printed to these words. Raises ValueError for others than the docstring has."""
    if not words:
        return listing()
    given = dict(word.partition("=")[::2] for word in words if "=" in word)
    plain = [word for word in words if "=" not in word]
    if len(plain) != 2 or plain[0] != "copy" or set(given) - {"to", "as"}:
        raise ValueError(f"{' '.join(words)}: use `distill recipes copy NAME [to=conf] [as=NAME]`")
    to = given.get("to") or "conf"
    file = copy(plain[1], to, given.get("as"))
    new = file.relative_to(Path(to).expanduser() / "experiment").with_suffix("").as_posix()
    return f"wrote {file}\npython -m distill.run --config-dir {to} experiment={new}"


if __name__ == "__main__":
    sys.exit(main())
