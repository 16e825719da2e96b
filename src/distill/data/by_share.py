"""Sizes that are drawn by share, for samples that a teacher makes: a function of a sample's number
alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from distill.core.limits import drawn_bucket

Kind = TypeVar("Kind")


def size_of(
    seed: int, buckets: Sequence[Sequence[int]], shares: Sequence[float] | None = None
) -> tuple[int, int]:
    """Width and height of the sample of this seed, one of `buckets` with these shares.

    The seed is hashed, so that neighbouring samples are independent.
    """
    digest = hashlib.blake2b(f"{seed}/bucket".encode(), digest_size=8).digest()
    return drawn_bucket(buckets, shares, int.from_bytes(digest, "big") / 2**64)


def batches_of(
    numbers: range, batch_size: int, kind_of: Callable[[int], Kind]
) -> Iterator[tuple[Kind, list[int]]]:
    """The numbers in batches of one kind each, in the order of the kinds' first numbers."""
    groups: dict[Kind, list[int]] = {}
    for i in numbers:
        groups.setdefault(kind_of(i), []).append(i)
    for kind, group in groups.items():
        for start in range(0, len(group), batch_size):
            yield kind, group[start : start + batch_size]
