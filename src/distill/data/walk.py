"""The files below a folder, with links followed and none twice, in an order given by
their names.
"""

import os
from dataclasses import dataclass, field

from distill.storage.formats import is_hidden


@dataclass
class Below:
    """Paths from `root`, with "/" on all systems, sorted; without hidden files and folders.

    `files` can be read; `broken` are dangling links; `again` are links to folders that are included
    anyway.
    """

    root: str
    files: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return os.path.join(self.root, *name.split("/"))


def below(root: str) -> Below:
    """All files below a folder. Links are followed last, so each folder has its own name.

    Raises ValueError, naming the folder, if one cannot be read.
    """
    found, seen = Below(root), set[str]()
    links = _visit(found, "", seen)
    while links:
        link = links.pop(0)
        if os.path.realpath(found.path(link)) in seen:
            found.again.append(link)
        else:
            links += _visit(found, link, seen)
    for names in (found.files, found.broken, found.again):
        names.sort()
    return found


def _visit(found: Below, start: str, seen: set[str]) -> list[str]:
    """Add the files below `start`, without those behind links; returns the links to folders,
    sorted.
    """
    links, waiting = [], [start]
    while waiting:
        folder = waiting.pop()
        path = found.path(folder) if folder else found.root
        real = os.path.realpath(path)
        if real in seen:  # a junction of Windows, which is no link to Python
            continue
        seen.add(real)
        for entry in _entries(path):
            name = f"{folder}/{entry.name}" if folder else entry.name
            linked = entry.is_symlink()
            if linked and os.path.isdir(entry.path):
                links.append(name)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(name)
            elif entry.is_file(follow_symlinks=False) or (linked and os.path.isfile(entry.path)):
                found.files.append(name)
            elif linked:  # to nothing, to itself, or to a device
                found.broken.append(name)
    return sorted(links)


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise ValueError(
            f"data.path: the folder {path!r} cannot be read ({error.strerror}); make it readable"
        ) from None
