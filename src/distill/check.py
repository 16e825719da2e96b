"""Read data as a run would. Say which samples would be dropped and why, which sizes there are, and
how long the captions are. The exit code is 1 if more than `data.max_bad_share` of the samples are
bad, or more than `data.max_empty_share` of the captions are empty. With a teacher, sizes that it
cannot use are refused; its weights are not read.

    python -m distill.check data.path=photos
    python -m distill.check teacher=sd3 data.path=photos data.buckets=[[1024,1024],[1216,832]]
    python -m distill.check data=images data.path='shards-{000..127}.tar' data.limit=1000
"""

import re
from collections import Counter
from math import log2
from statistics import median
from typing import Any

from omegaconf import DictConfig

from distill.config import picture_units, validate
from distill.config.compose import make
from distill.config.errors import command
from distill.terminal.progress import importing, stage, track

BAR = 40  # characters


@command("check")
def main(cfg: DictConfig) -> int:
    """Print the findings; returns the exit code."""
    validate.check_data(cfg.data)  # before make() imports torch
    if cfg.get("teacher"):
        validate.check_teacher(cfg.teacher)
        picture_units.check_fit(cfg.data, cfg.teacher, published=True)
    with importing("torch"), stage("opening the data"):
        source = make(cfg.data, "data")
    data, captions, bad = source.dataset, [], []
    batches = source.batches(range(len(data)))
    for found in track(source.once(batches), "reading", len(batches), unit="batch"):
        captions += [item["caption"] for item, _ in found if item]
        bad += [pair for _, pairs in found for pair in pairs]
    print(f"{len(captions)} of {len(data)} samples are good")
    print_reasons(bad)
    numbers = track(range(len(data)), "measuring", unit="sample")
    if sizes := [size for i in numbers if (size := data.measure(i))]:
        print_sizes(sizes)
        for bucket, group in data.groups.items():
            print(f"bucket {list(data.buckets[bucket])}: {len(group)}")
    if captions:
        print_captions(captions)
    return int(len(bad) > data.max_bad_share * len(data) or too_empty(captions, data))


def too_empty(captions: list[str], data: Any) -> bool:
    """Whether more captions are empty than data.max_empty_share allows; prints a line if so."""
    empty, share = captions.count(""), data.max_empty_share
    if empty <= share * len(captions):
        return False
    print(f"more than data.max_empty_share={share:g} of them: write them, or raise the share")
    return True


def print_captions(captions: list[str]) -> None:
    """Print the lengths of captions, and how many are empty or have several lines."""
    lengths = sorted(len(caption.split()) for caption in captions)
    empty, lines = captions.count(""), sum("\n" in caption for caption in captions)
    several = f"; {lines} have several lines, read as one caption" if lines else ""
    words = f"{lengths[0]} to {lengths[-1]}, median {median(lengths):g}"
    print(f"\nwords of a caption: {words}; {empty} are empty{several}")


def print_reasons(bad: list[tuple[str, str]]) -> None:
    """Print how many samples each reason drops, with an example.

    Reasons that differ only in numbers are counted together.
    """
    kinds: dict[str, list[tuple[str, str]]] = {}
    for name, reason in bad:
        kinds.setdefault(re.sub(r"0x[0-9a-f]+|\d+", "0", reason), []).append((name, reason))
    if kinds:
        print("\n  dropped  why")
    for pairs in sorted(kinds.values(), key=len, reverse=True):
        name, reason = pairs[0]
        print(f"{len(pairs):9}  {reason} (as {name})")


def print_sizes(sizes: list[tuple[int, int]]) -> None:
    """Print the range of sides, and a histogram of width / height in steps of 2 ** 0.25."""
    for what, sides in zip(("width", "height"), zip(*sizes, strict=True), strict=True):
        print(f"{what}: {min(sides)} to {max(sides)}, median {median(sides):g}")
    print("\nwidth / height")
    for step, count in sorted(
        Counter(round(4 * log2(width / height)) for width, height in sizes).items()
    ):
        print(f"{2 ** (step / 4):7.2f}  {count:8}  {'#' * max(1, round(BAR * count / len(sizes)))}")


if __name__ == "__main__":
    main()
