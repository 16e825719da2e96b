"""Shell completion: commands, flags, groups and their options, keys, values, paths."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from distill.cli import COMMANDS, NO_CONFIG, config_of
from distill.config.location import CONF_DIR

RUNS = {"run", "resume", "runs"}  # keys of run folders
PATHS = RUNS | {
    "prompts", "image", "out", "run_dir", "base", "delta", "parts", "teacher.weights",
    "student.init", "metrics.reference",
}  # fmt: skip
FLAGS = {  # flag of Hydra -> its values
    "--help": (), "--cfg": ("job", "hydra", "all"), "--resolve": (), "--multirun": (),
    "--config-dir": (), "--package": (), "--info": ("defaults", "defaults-tree", "searchpath"),
}  # fmt: skip
SHELLS = ("bash", "zsh", "fish")
UNFINISHED = ("=", ".", "/", ",")  # ends after which no space is added


def completions(words: Sequence[str]) -> list[str] | None:
    """Completions of the last word; None if the words are not a command of distill.

    `words` are those of `distill run ...` or `python -m distill.run ...` up to the cursor.
    """
    if not words:
        return None
    if Path(words[0]).name.startswith("python"):
        return _of_python(list(words[1:]))
    return _of_distill(list(words[1:]))


def _of_distill(words: list[str]) -> list[str]:
    if len(words) < 2:
        return _starting_with(words[-1] if words else "", [*COMMANDS, "--help", "--version"])
    return _argument(words[0], words[1:-1], words[-1]) if words[0] in COMMANDS else []


def _of_python(words: list[str]) -> list[str] | None:
    """For `python [flags] -m distill.run ...`; None for other modules."""
    if "-m" not in words[:-1]:
        return None
    module, *rest = words[words.index("-m") + 1 :]
    if not rest:
        found = _starting_with(module, ["distill", *(f"distill.{name}" for name in COMMANDS)])
        return found if module else None
    if module == "distill":
        return _of_distill(rest)
    command = module.removeprefix("distill.")
    known = module.startswith("distill.") and command in COMMANDS
    return _argument(command, rest[:-1], rest[-1]) if known else None


def _argument(command: str, before: list[str], word: str) -> list[str]:
    if command in NO_CONFIG:
        return _plain(command, before, word)
    last = before[-1] if before else ""
    if last in ("--config-dir", "-cd"):
        return [path for path in paths(word) if path.endswith("/")]
    if FLAGS.get(last):
        return _starting_with(word, FLAGS[last])
    if word.startswith("-"):
        return _starting_with(word, FLAGS)
    mark = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, value = word.removeprefix(mark).partition("=")
    config = _Config(command, before)
    found = config.values(key, value) if equals else config.keys(key)
    return [f"{mark}{each}" for each in found]


def _plain(command: str, before: list[str], word: str) -> list[str]:
    """For commands without a configuration."""
    if command == "completion":
        return _starting_with(word, SHELLS)
    from distill.recipes import groups

    if not before:
        return _starting_with(word, ["copy"])
    if word.startswith("to="):
        return [f"to={path}" for path in paths(word.removeprefix("to=")) if path.endswith("/")]
    return _starting_with(word, sorted(groups()) if before == ["copy"] else ["to=", "as="])


class _Config:
    """Keys and values of a command, composed with the words before the cursor."""

    def __init__(self, command: str, before: Sequence[str]):
        self.name, self.before, self.folder = config_of(command), before, _folder(before)
        self.places = [Path(place) for place in (self.folder, CONF_DIR) if place]

    def keys(self, start: str) -> list[str]:
        """Groups and dotted keys that start with `start`, up to their next dot."""
        from distill.config.compose import dotted

        composed = self.composed()
        found = [f"{group}=" for group in composed.groups]
        for key, value in dotted(composed.tree).items():
            if not key.rpartition(".")[2].startswith("_"):
                found.append(f"{key}." if isinstance(value, dict) and value else f"{key}=")
        cut = [each for each in found if each.startswith(start)]
        # only `trainer.`, not every key below it
        return sorted({_until_dot(each, len(start)) for each in cut})

    def values(self, key: str, value: str) -> list[str]:
        """`key=value` for each value that starts with `value`; after commas, for the last one."""
        if (group := self.group(key)) is not None:
            head, comma, last = value.rpartition(",")
            return [f"{key}={head}{comma}{option}" for option in _starting_with(last, group)]
        if key in PATHS or key.endswith(".path"):
            runs = _runs() if key in RUNS and not value else []
            words = ["teacher", "random"] if key == "student.init" else []
            return [f"{key}={found}" for found in dict.fromkeys([*words, *runs, *paths(value)])]
        return [f"{key}={word}" for word in _starting_with(value, self.words(key))]

    def group(self, key: str) -> list[str] | None:
        """The options of a group; None if the key is not a group."""
        folders = [place / key for place in self.places if key and (place / key).is_dir()]
        files = {
            file.relative_to(folder).with_suffix("").as_posix()
            for folder in folders
            for file in folder.rglob("*.yaml")
        }
        return sorted(files) if folders else None

    def words(self, key: str) -> Iterable[str]:
        """true and false, or the options in the annotation of the class that takes the key."""
        from distill.config import signatures
        from distill.config.compose import dotted

        known = dotted(self.composed().tree)
        if isinstance(known.get(key), bool):
            return ("true", "false")
        node, _, name = key.rpartition(".")
        target = known.get(f"{node}._target_")
        taken = signatures.signature_at(node, target) if target else None
        return signatures.options(taken, name) if taken else ()

    def composed(self):
        """Composed with the words before; without them if one of them is wrong."""
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from distill.commandline.composed import Composed

        given = tuple(word for word in self.before if "=" in word and not word.startswith("-"))
        composed = Composed(self.name, given, self.folder)
        try:
            composed.tree  # noqa: B018  # composes
        except (HydraException, OmegaConfBaseException):
            return Composed(self.name)
        return composed


def _folder(before: Sequence[str]) -> str | None:
    """The value of --config-dir."""
    for flag, value in zip(before, before[1:], strict=False):
        if flag in ("--config-dir", "-cd"):
            return value
    given = (word for word in before if word.startswith("--config-dir="))
    return next((word.partition("=")[2] for word in given), None)


def _until_dot(key: str, start: int) -> str:
    end = key.find(".", start)
    return key if end < 0 else key[: end + 1]


def _starting_with(start: str, known: Iterable[str]) -> list[str]:
    return [each for each in known if each.startswith(start)]


def _runs() -> list[str]:
    """The run folders in runs/, newest first."""
    folders = [file.parent for file in Path("runs").glob("*/config.yaml")]
    return [str(folder) for folder in sorted(folders, key=os.path.getmtime, reverse=True)]


def paths(start: str) -> list[str]:
    """Files, and folders with a final /, that start with `start`; hidden ones only after a dot."""
    folder, slash, name = start.rpartition("/")
    place = Path(os.path.expanduser(folder + slash) or ".")
    try:
        entries = sorted(place.iterdir())
    except OSError:
        return []
    shown = [e for e in entries if not e.name.startswith(".") or name.startswith(".")]
    return [
        f"{folder}{slash}{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in shown
        if entry.name.startswith(name)
    ]


# -- parsing and escaping of shells ----------------------------------------------------------------


def split(line: str) -> tuple[list[str], str]:
    """The words of an unfinished line, and the quote that is still open in the last one, or ""."""
    for quote in ("", "'", '"'):
        try:
            words = shlex.split(line + quote)
        except ValueError:
            continue
        unfinished = quote or (line and not line[-1].isspace()) or line.endswith("\\ ")
        return (words if unfinished else [*words, ""]), quote
    return [], ""


def for_bash(line: str, breaks: str) -> list[str] | None:
    """Completions for readline: of each word the part after the last break, with a space if it is
    finished.
    """
    words, quote = split(line)
    found = completions(words)
    if found is None:
        return None
    cut = 0 if quote else max(words[-1].rfind(mark) + 1 for mark in breaks if mark not in "'\"")
    ended = [each if each.endswith(UNFINISHED) else f"{each}{quote} " for each in found]
    return [each[cut:] if quote else _escaped(each[cut:]) for each in ended]


def _escaped(word: str) -> str:
    """With a backslash before special characters of the shell; the final space is kept."""
    text = word.removesuffix(" ")
    safe = "".join(c if c.isalnum() or c in "_@%+=:,./~-[]{}" else f"\\{c}" for c in text)
    return safe + word[len(text) :]
