"""Samples that cannot be used, and limits of their files."""

from collections.abc import Mapping

from distill.data.folder import CAPTIONS, MOST_CAPTION
from distill.storage.bounded import MIB, format_bytes
from distill.terminal.secret import masked
from distill.terminal.shown import shown

# Ours, and far above what data have: a picture of 64 million pixels takes 200 MiB uncompressed.
MOST_BYTES = 512 * MIB  # of a file
MOST_TOGETHER = 1024 * MIB  # of the files of a sample
MOST_FILES = 1000  # of a sample


MOST_REASONS = 3  # ours: in a message


def reasons_of(bad: Mapping[str, str]) -> str:
    """One sentence on bad samples, name -> reason: each reason once, with the first sample."""
    first = {reason: name for name, reason in reversed(bad.items())}
    some = [f"{name}: {reason}" for reason, name in reversed(first.items())][:MOST_REASONS]
    return f"The first: {'; '.join(some)}"


def none_usable(path: str, bad: Mapping[str, str]) -> ValueError:
    """The error for data of which the first samples, name -> reason, are all bad."""
    name, reason = next(iter(bad.items()))
    what = f"none of its first {len(bad)} samples is usable, {name}: {reason}"
    return ValueError(f"data.path={masked(path)}: {what}")


class BadSample(ValueError):
    """A raw sample that cannot be used: `name` is `<shard>:<key>`, `reason` the cause, each one
    line of text.
    """

    def __init__(self, sample: dict, reason: str):
        self.name = shown(f"{sample['__url__']}:{sample['__key__']}")
        self.reason = shown(reason)
        super().__init__(f"{self.name}: {self.reason}")


class Unread(bytes):
    """Stands for a file of a sample that is too large to be read, with the `reason`."""

    reason: str

    @classmethod
    def of(cls, size: int, most: int) -> "Unread":
        found = cls()
        found.reason = f"has {format_bytes(size)}, more than the {format_bytes(most)} that are read"
        return found


def most_of(extension: str) -> int:
    """Maximum bytes of a file with this extension."""
    return MOST_CAPTION if extension.rpartition(".")[2] in CAPTIONS else MOST_BYTES
