"""The help page of a command: docstring, groups, and every key with default and comment."""

from __future__ import annotations

import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from distill.commandline.composed import Composed, Part
from distill.config.compose import dotted

FLAGS = ("--cfg", "--resolve", "--package", "--multirun", "--config-dir", "--info")
KEYS, OPTIONS = 36, 26  # columns, at most, before a comment
MISSING = "???"


def page(command: str, doc: str, config: str, arguments: Sequence[str]) -> str:
    """The output of `python -m distill.<command> --help` with the other arguments."""
    args = get_args_parser().parse_args(list(arguments))
    composed = Composed(config, tuple(args.overrides), args.config_dir)
    usage = "[group=option ...] [key=value ...]" if composed.groups else "[key=value ...]"
    parts = [
        f"python -m distill.{command} {usage}",
        inspect.cleandoc(doc),
        *([_groups(composed)] if composed.groups else []),
        *_sections(composed),
        _flags(),
    ]
    return "\n\n".join(part for part in parts if part)


def _groups(composed: Composed) -> str:
    """Each group with its options; a star marks the chosen one."""
    root = composed.parts[0].comments
    lines = ["Groups (group=option; * is chosen now)"]
    for group in composed.groups:
        comment = root.keys.get(f"defaults.{group}")
        lines += ["", f"  {group}{f': {comment}' if comment else ''}"]
        for option, summary in composed.options(group).items():
            star = "*" if composed.chosen.get(group) == option else " "
            lines += _row(f"  {star} {option}", summary, OPTIONS)
    return "\n".join(lines)


def _sections(composed: Composed) -> Iterator[str]:
    """The command's own keys, then those of each chosen option."""
    remarks = _remarks(composed.parts)
    own: list[str] = []
    others: dict[str, list[str]] = {}
    for key, value in dotted(composed.tree).items():
        first = key.partition(".")[0]
        lines = own if first not in composed.chosen else others.setdefault(first, [])
        inner = isinstance(value, dict) and bool(value)
        if key.rpartition(".")[2].startswith("_") or (inner and key not in remarks):
            continue
        if inner:
            lines += [] if key == first and lines is not own else _row(f"  {key}", remarks[key])
        else:
            lines += _row(*_key_row(key, value, remarks.get(key, "")))
    if own:
        yield "\n".join(["Keys (key=value)", *own])
    for group, lines in others.items():
        files = [part for part in composed.parts if part.group == group]
        summary = files[-1].comments.summary
        title = f"{group}={composed.chosen[group]}{f': {summary}' if summary else ''}"
        yield "\n".join([*textwrap.wrap(title, _width()), *lines])


def _key_row(key: str, value: Any, remark: str) -> tuple[str, str]:
    if value == MISSING:
        return f"  {key}=", f"(must be given) {remark}".rstrip()
    return f"  {key}={written(value)}", remark


def _remarks(parts: Sequence[Part]) -> dict[str, str]:
    """Dotted key -> the comment in its file, and the file that has changed its value, with the
    comment there.
    """
    found: dict[str, list[tuple[Part, str, Any]]] = {}
    for part in parts:
        tree: Any = OmegaConf.to_container(OmegaConf.load(part.file), resolve=False)
        keys = {k: v for k, v in tree.items() if k not in ("defaults", "hydra")} if tree else {}
        for key, value in dotted(keys).items():
            comment = part.comments.keys.get(key, "")
            found.setdefault(part.dotted(key), []).append((part, comment, value))
    return {key: text for key, entries in found.items() if (text := _remark(entries))}


def _remark(entries: list[tuple[Part, str, Any]]) -> str:
    meaning = next((comment for _, comment, _ in entries if comment), "")
    (_, _, before), (part, reason, value) = entries[0], entries[-1]
    if isinstance(value, dict) or value == before:
        return meaning
    reason = reason if reason != meaning else ""
    return f"{meaning} [{part.choice}{f': {reason}' if reason else ''}]".strip()


def written(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}:{written(v)}' for k, v in value.items())}}}"
    return json.dumps(value)


def _flags() -> str:
    """The useful flags of Hydra, with their help texts."""
    lines = ["Flags"]
    for action in get_args_parser()._actions:
        if set(FLAGS) & set(action.option_strings):
            text = " ".join((action.help or "").split())
            lines += _row(f"  {', '.join(action.option_strings)}", text, OPTIONS)
    return "\n".join(lines)


def _row(left: str, right: str, column: int = KEYS) -> list[str]:
    """Two columns; the right one is wrapped, and starts below the left one if that is too long."""
    if not right:
        return [left]
    rest = textwrap.wrap(right, max(30, _width() - column - 2), break_on_hyphens=False)
    first = [f"{left:{column}}  {rest.pop(0)}"] if len(left) <= column else [left]
    return [*first, *(f"{'':{column}}  {line}" for line in rest)]


def _width() -> int:
    return min(120, shutil.get_terminal_size((100, 24)).columns)
