"""Random number generators of an iteration, each seeded by its purpose.

A generator is a function of (seed, iteration, position, stream). A resumed run therefore draws what
the uninterrupted run draws. W processes draw what one process draws with W times as many
micro-batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.core.transfers import send

if TYPE_CHECKING:
    from distill.core.types import Times

FromStream = Callable[[], torch.Generator]
"""Each call returns a new generator with the same seed."""
# Streams of a micro-batch. Streams from COMMON down are the same on every rank.
COMMON = -3
SAMPLE = -2  # the student's sample
TEACHER_SAMPLES = -1  # samples that the teacher generates during training
STUDENT = 0  # terms of the student alone
DISCRIMINATOR = 1  # the discriminator's first update; later ones follow


@dataclass(frozen=True, eq=False, kw_only=True)
class Streams:
    """Generators for one micro-batch in one iteration, one per purpose.

    sample: the student's sample and its renoising. discriminator: one for each discriminator
    update. student: terms of the student alone. common: purpose -> a generator that is the same on
    every rank and at every call: gradients are averaged over ranks, so all must train the same
    heads. step and iteration count from 0; only iteration counts the head start.
    """

    step: int
    iteration: int
    sample: torch.Generator
    discriminator: tuple[torch.Generator, ...]
    student: torch.Generator
    common: Callable[[str], torch.Generator]

    @property
    def patch_generator(self) -> FromStream:
        """For patches and augmentations of the feature network.

        Each call starts the same sequence again, so that real and fake get the same patch. It is
        the same on every rank too, like the heads that read the patch.
        """
        return partial(self.common, "features")  # the purpose fixes the numbers: keep the word


def streams(
    *,
    seed: int = 0,
    iteration: int = 0,
    step: int = 0,
    position: int = 0,
    updates: int = 1,
    device: torch.device | str = "cpu",
) -> Streams:
    """Generators of the micro-batch at `position`, which is micro * world + rank.

    `updates` is the number of discriminator updates in an iteration.
    """
    stream = partial(generator, seed, iteration, position, device=device)
    return Streams(
        step=step,
        iteration=iteration,
        sample=stream(SAMPLE),
        discriminator=tuple(stream(DISCRIMINATOR + update) for update in range(updates)),
        student=stream(STUDENT),
        common=partial(common, seed, iteration, device),
    )


def common(seed: int, iteration: int, device: torch.device | str, purpose: str) -> torch.Generator:
    """A generator that is the same on every rank, for every micro-batch and at every call."""
    return generator(seed, iteration, 0, COMMON - zlib.crc32(purpose.encode()), device=device)


def on_host(generator: torch.Generator, purpose: str) -> torch.Generator:
    """A CPU generator for numbers by which Python decides: reading those of a device would wait
    for it.

    A CPU generator is returned itself. For one on a device it is a new one, seeded by the other's
    seed and `purpose`; a later call of the same purpose starts it again.
    """
    if generator.device.type == "cpu":
        return generator
    seed = generator.initial_seed() ^ zlib.crc32(purpose.encode())
    return torch.Generator().manual_seed(seed % 2**63)


def uniform(count: int, generator: torch.Generator, purpose: str) -> list[float]:
    """`count` numbers uniform in [0, 1) by which Python decides; see `on_host`."""
    return torch.rand(count, generator=on_host(generator, purpose)).tolist()


def levels_like(
    x: Tensor,
    times: Times,
    step: int,
    generator: torch.Generator,
    purpose: str = "levels",
    convert: Callable[[Tensor], Tensor] = lambda t: t,
    *,
    one: bool = False,
) -> Tensor:
    """A level t [B] for each sample of x [B, ...], on its device; with `one` the same for all.

    They are drawn and converted on the host, and `transfers.host_values` gives them there: what
    Python decides by them need not wait for the device. `purpose` names the draw where one
    generator serves several. Times with a `shift` move with the size of x.
    """
    t = times.sample(1 if one else len(x), step, on_host(generator, purpose))
    shift = getattr(times, "shift", None)
    t = convert(t if shift is None else shift(t, x.shape))
    return send(t.expand(len(x)), x.device)


def seed_of(generator: torch.Generator, purpose: str = "seed") -> int:
    """A seed for a generator of numbers that are drawn later; see `on_host`."""
    return int(torch.randint(2**62, (), generator=on_host(generator, purpose)))


def generator(
    seed: int, iteration: int, position: int, stream: int, *, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A counter-based stream: the four numbers are mixed into a 63-bit seed, as in splitmix."""
    mixed = 0
    for part in (seed, iteration, position, stream + 2):  # SAMPLE counts 0, common ones below
        mixed = mixed * 0x9E3779B97F4A7C15 + part * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB
        mixed %= 2**63
        mixed ^= mixed >> 29
    # Meta tensors, on which memory is counted, have no generator: what is drawn has no values.
    kind = torch.device(device).type
    return torch.Generator("cpu" if kind == "meta" else device).manual_seed(mixed)
