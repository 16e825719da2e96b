"""Where the random numbers of an iteration come from: generators seeded by what they are for, and
by nothing else.

A generator is a function of (seed, iteration, place, stream). A run that is resumed therefore draws
what the uninterrupted one would have drawn, and W processes draw what one process draws with W
times as many micro-batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

FromStream = Callable[[], torch.Generator]
"""Each call gives the same generator from its beginning."""
# Streams of a micro-batch. Those from COMMON down are the same on every rank and for all of them.
COMMON = -3
SAMPLE = -2  # of the student's sample
REAL = -1  # of samples that the teacher makes on the way
STUDENT = 0  # of the student's own terms
DISCRIMINATOR = 1  # of the discriminator's first update; the next ones follow


@dataclass(frozen=True, eq=False, kw_only=True)
class Streams:
    """What the random numbers of one micro-batch in one iteration are drawn from, a generator for
    each purpose.

    sample: the student's sample and how the discriminator reads it; discriminator: one for each of
    its updates, in turn; student: the terms that the student alone has; common: purpose -> a
    generator that is the same on every rank and whenever it is asked for by this name. step and
    iteration are counted from 0; only the latter counts the head start.
    """

    step: int
    iteration: int
    sample: torch.Generator
    discriminator: tuple[torch.Generator, ...]
    student: torch.Generator
    common: Callable[[str], torch.Generator]

    @property
    def features(self) -> FromStream:
        """What patches and augmentations of the feature network are drawn from."""
        return partial(self.common, "features")


def streams(
    *,
    seed: int = 0,
    iteration: int = 0,
    step: int = 0,
    place: int = 0,
    updates: int = 1,
    device: torch.device | str = "cpu",
) -> Streams:
    """Those of the micro-batch at `place`, which is micro * world + rank, for so many updates of
    the discriminator.
    """
    own = partial(generator, seed, iteration, place, device=device)
    return Streams(
        step=step,
        iteration=iteration,
        sample=own(SAMPLE),
        discriminator=tuple(own(DISCRIMINATOR + turn) for turn in range(updates)),
        student=own(STUDENT),
        common=partial(common, seed, iteration, device),
    )


def common(seed: int, iteration: int, device: torch.device | str, purpose: str) -> torch.Generator:
    """The same on every rank, for every micro-batch and whenever it is asked for by this name."""
    return generator(seed, iteration, 0, COMMON - zlib.crc32(purpose.encode()), device=device)


def generator(
    seed: int, iteration: int, place: int, stream: int, *, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A counter-based stream: splitmix-style mixing of the key into 63 bits."""
    mixed = 0
    for part in (seed, iteration, place, stream + 2):
        mixed = mixed * 0x9E3779B97F4A7C15 + part * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB
        mixed %= 2**63
        mixed ^= mixed >> 29
    return torch.Generator(device).manual_seed(mixed)
